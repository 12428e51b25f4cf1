"""The one table: which config, model and processor goes with which Auto class."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from .models import (
    VlmBlip2Config,
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForPreTraining,
    VlmBlip2Model,
    VlmBlip2Processor,
    VlmBlipConfig,
    VlmBlipForConditionalGeneration,
    VlmBlipForPreTraining,
    VlmBlipModel,
    VlmBlipProcessor,
    VlmClipConfig,
    VlmClipModel,
    VlmClipProcessor,
    VlmImageProcessor,
    VlmInstructBlipConfig,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipModel,
    VlmInstructBlipProcessor,
    VlmLlavaConfig,
    VlmLlavaForConditionalGeneration,
    VlmLlavaModel,
    VlmLlavaProcessor,
    VlmQFormerConfig,
    VlmQFormerModel,
    VlmTextTowerConfig,
    VlmTextTowerModel,
    VlmTowerConfig,
    VlmTowerModel,
)

MODELS: dict[type[PreTrainedConfig], dict[Any, type[PreTrainedModel]]] = {
    VlmTowerConfig: {AutoModel: VlmTowerModel},
    VlmTextTowerConfig: {AutoModel: VlmTextTowerModel},
    VlmClipConfig: {AutoModel: VlmClipModel, AutoModelForZeroShotImageClassification: VlmClipModel},
    VlmBlipConfig: {
        AutoModel: VlmBlipModel,
        AutoModelForPreTraining: VlmBlipForPreTraining,
        AutoModelForImageTextToText: VlmBlipForConditionalGeneration,
    },
    VlmQFormerConfig: {AutoModel: VlmQFormerModel},
    VlmBlip2Config: {
        AutoModel: VlmBlip2Model,
        AutoModelForPreTraining: VlmBlip2ForPreTraining,
        AutoModelForImageTextToText: VlmBlip2ForConditionalGeneration,
    },
    VlmInstructBlipConfig: {
        AutoModel: VlmInstructBlipModel,
        AutoModelForImageTextToText: VlmInstructBlipForConditionalGeneration,
    },
    VlmLlavaConfig: {AutoModel: VlmLlavaModel, AutoModelForImageTextToText: VlmLlavaForConditionalGeneration},
}
PROCESSORS: dict[type[PreTrainedConfig], type[ProcessorMixin]] = {
    VlmClipConfig: VlmClipProcessor,
    VlmBlipConfig: VlmBlipProcessor,
    VlmBlip2Config: VlmBlip2Processor,
    VlmInstructBlipConfig: VlmInstructBlipProcessor,
    VlmLlavaConfig: VlmLlavaProcessor,
}


def register() -> None:
    """Makes `AutoConfig`, `AutoModel*`, `AutoProcessor` and `AutoImageProcessor` know every class of the table."""
    for config_class, heads in MODELS.items():
        AutoConfig.register(config_class.model_type, config_class)
        for auto_class, model_class in heads.items():
            auto_class.register(config_class, model_class)
        AutoImageProcessor.register(config_class, image_processor_classes={"pil": VlmImageProcessor})
    for config_class, processor_class in PROCESSORS.items():
        AutoProcessor.register(config_class, processor_class)


__all__ = ["MODELS", "PROCESSORS", "register"]
