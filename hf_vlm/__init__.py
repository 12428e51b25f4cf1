"""hf_vlm: the CLIP -> BLIP -> BLIP-2 -> InstructBLIP -> LLaVA lineage, trainable on the Hugging Face stack.

Importing the package registers its classes with transformers' Auto classes.
"""

from . import auto
from .models import (
    VlmBlip2Config,
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmBlip2Model,
    VlmBlip2Processor,
    VlmBlipConfig,
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipModel,
    VlmBlipProcessor,
    VlmBlipTextConfig,
    VlmClipConfig,
    VlmClipModel,
    VlmClipProcessor,
    VlmImageProcessor,
    VlmInstructBlipConfig,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipModel,
    VlmInstructBlipProcessor,
    VlmQFormerConfig,
    VlmQFormerModel,
    VlmTextTowerConfig,
    VlmTextTowerModel,
    VlmTowerConfig,
    VlmTowerModel,
)

__version__ = "0.1.0"

auto.register()

__all__ = [
    "VlmBlip2Config",
    "VlmBlip2ForConditionalGeneration",
    "VlmBlip2ForImageTextRetrieval",
    "VlmBlip2ForPreTraining",
    "VlmBlip2Model",
    "VlmBlip2Processor",
    "VlmBlipConfig",
    "VlmBlipForConditionalGeneration",
    "VlmBlipForImageTextRetrieval",
    "VlmBlipForPreTraining",
    "VlmBlipForQuestionAnswering",
    "VlmBlipModel",
    "VlmBlipProcessor",
    "VlmBlipTextConfig",
    "VlmClipConfig",
    "VlmClipModel",
    "VlmClipProcessor",
    "VlmImageProcessor",
    "VlmInstructBlipConfig",
    "VlmInstructBlipForConditionalGeneration",
    "VlmInstructBlipModel",
    "VlmInstructBlipProcessor",
    "VlmQFormerConfig",
    "VlmQFormerModel",
    "VlmTextTowerConfig",
    "VlmTextTowerModel",
    "VlmTowerConfig",
    "VlmTowerModel",
    "__version__",
]
