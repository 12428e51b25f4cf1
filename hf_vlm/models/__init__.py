"""The architectures: configurations, models, processors, losses."""

from .configuration_blip import BLIP_VISION, VlmBlipConfig, VlmBlipTextConfig
from .configuration_clip import VlmClipConfig
from .configuration_tower import VlmTextTowerConfig, VlmTowerConfig
from .image_processing_vlm import VlmImageProcessor
from .modeling_blip import VlmBlipForImageTextRetrieval, VlmBlipForPreTraining, VlmBlipModel
from .modeling_blip_generation import VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering
from .modeling_blip_text import VlmBlipOutput, VlmBlipTextModel
from .modeling_clip import VlmClipModel, VlmClipOutput
from .modeling_tower import VlmTextTowerModel, VlmTowerModel
from .processing_blip import VlmBlipProcessor
from .processing_clip import VlmClipProcessor

__all__ = [
    "BLIP_VISION",
    "VlmBlipConfig",
    "VlmBlipForConditionalGeneration",
    "VlmBlipForImageTextRetrieval",
    "VlmBlipForPreTraining",
    "VlmBlipForQuestionAnswering",
    "VlmBlipModel",
    "VlmBlipOutput",
    "VlmBlipProcessor",
    "VlmBlipTextConfig",
    "VlmBlipTextModel",
    "VlmClipConfig",
    "VlmClipModel",
    "VlmClipOutput",
    "VlmClipProcessor",
    "VlmImageProcessor",
    "VlmTextTowerConfig",
    "VlmTextTowerModel",
    "VlmTowerConfig",
    "VlmTowerModel",
]
