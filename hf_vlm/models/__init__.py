"""The architectures: configurations, models, processors, losses."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .chat_templates import with_image_token
    from .configuration_blip import VlmBlipConfig, VlmBlipTextConfig
    from .configuration_blip2 import EVA_VISION, VlmBlip2Config
    from .configuration_clip import VlmClipConfig
    from .configuration_instructblip import VlmInstructBlipConfig
    from .configuration_llava import VlmLlavaConfig
    from .configuration_qformer import VlmQFormerConfig
    from .configuration_tower import BLIP_VISION, VlmTextTowerConfig, VlmTowerConfig
    from .image_processing_vlm import VlmImageProcessor
    from .language_model import cast_weights
    from .modeling_blip import VlmBlipForImageTextRetrieval, VlmBlipForPreTraining, VlmBlipModel
    from .modeling_blip2 import VlmBlip2Model
    from .modeling_blip2_generation import VlmBlip2ForConditionalGeneration, VlmBlip2GenerationOutput
    from .modeling_blip2_pretraining import VlmBlip2ForImageTextRetrieval, VlmBlip2ForPreTraining, VlmBlip2Output
    from .modeling_blip_generation import VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering
    from .modeling_blip_text import VlmBlipOutput, VlmBlipTextModel
    from .modeling_clip import VlmClipModel, VlmClipOutput
    from .modeling_instructblip import VlmInstructBlipForConditionalGeneration, VlmInstructBlipModel
    from .modeling_llava import VlmLlavaForConditionalGeneration, VlmLlavaModel, VlmLlavaOutput
    from .modeling_qformer import VlmQFormerModel, VlmQFormerOutput
    from .modeling_tower import VlmTextTowerModel, VlmTowerModel
    from .processing_blip import VlmBlipProcessor
    from .processing_blip2 import VlmBlip2Processor, VlmInstructBlipProcessor
    from .processing_clip import VlmClipProcessor
    from .processing_llava import VlmLlavaProcessor
    from .towers import tower_states
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "BLIP_VISION",
    "EVA_VISION",
    "VlmBlip2Config",
    "VlmBlip2ForConditionalGeneration",
    "VlmBlip2ForImageTextRetrieval",
    "VlmBlip2ForPreTraining",
    "VlmBlip2GenerationOutput",
    "VlmBlip2Model",
    "VlmBlip2Output",
    "VlmBlip2Processor",
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
    "VlmInstructBlipConfig",
    "VlmInstructBlipForConditionalGeneration",
    "VlmInstructBlipModel",
    "VlmInstructBlipProcessor",
    "VlmLlavaConfig",
    "VlmLlavaForConditionalGeneration",
    "VlmLlavaModel",
    "VlmLlavaOutput",
    "VlmLlavaProcessor",
    "VlmQFormerConfig",
    "VlmQFormerModel",
    "VlmQFormerOutput",
    "VlmTextTowerConfig",
    "VlmTextTowerModel",
    "VlmTowerConfig",
    "VlmTowerModel",
    "cast_weights",
    "tower_states",
    "with_image_token",
]
