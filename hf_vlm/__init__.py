"""hf_vlm: the CLIP -> BLIP -> BLIP-2 -> InstructBLIP -> LLaVA lineage, trainable on the Hugging Face stack.

Importing the package registers its classes with transformers' Auto classes.
"""

from . import auto
from .models import (
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
    VlmTextTowerConfig,
    VlmTextTowerModel,
    VlmTowerConfig,
    VlmTowerModel,
)

__version__ = "0.1.0"

auto.register()

__all__ = [
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
    "VlmTextTowerConfig",
    "VlmTextTowerModel",
    "VlmTowerConfig",
    "VlmTowerModel",
    "__version__",
]
