"""hf_vlm: the CLIP -> BLIP -> BLIP-2 -> InstructBLIP -> LLaVA lineage, trainable on the Hugging Face stack.

Importing the package registers its classes with transformers' Auto classes.
"""

from typing import TYPE_CHECKING

from . import models as models
from . import registration
from .lazy import lazy_names

__version__ = "0.1.0"

registration.register()

if TYPE_CHECKING:
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
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

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
    "VlmLlavaConfig",
    "VlmLlavaForConditionalGeneration",
    "VlmLlavaModel",
    "VlmLlavaProcessor",
    "VlmQFormerConfig",
    "VlmQFormerModel",
    "VlmTextTowerConfig",
    "VlmTextTowerModel",
    "VlmTowerConfig",
    "VlmTowerModel",
    "__version__",
]
