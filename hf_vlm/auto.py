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
    VlmBlipConfig,
    VlmBlipForConditionalGeneration,
    VlmBlipForPreTraining,
    VlmBlipModel,
    VlmBlipProcessor,
    VlmClipConfig,
    VlmClipModel,
    VlmClipProcessor,
    VlmImageProcessor,
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
}
PROCESSORS: dict[type[PreTrainedConfig], type[ProcessorMixin]] = {
    VlmClipConfig: VlmClipProcessor,
    VlmBlipConfig: VlmBlipProcessor,
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
