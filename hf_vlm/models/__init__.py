"""The architectures: configurations, models, processors, losses."""

from .configuration_clip import VlmClipConfig
from .configuration_tower import VlmTextTowerConfig, VlmTowerConfig
from .image_processing_vlm import VlmImageProcessor
from .modeling_clip import VlmClipModel, VlmClipOutput
from .modeling_tower import VlmTextTowerModel, VlmTowerModel
from .processing_clip import VlmClipProcessor

__all__ = [
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
