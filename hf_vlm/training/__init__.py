"""Training: arguments, trainers, LLaVA's stages, LoRA, cached features, and the checkpoint to resume from."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .arguments import ContrastiveTrainingArguments, VlmTrainingArguments
    from .contrastive import ContrastiveTrainer
    from .features import cache_text_features, cache_vision_features, cached_tower_features
    from .lora import add_lora, base_of, save_trained
    from .open_parts import open_language_model
    from .precision import choose_bf16
    from .pretraining import Blip2Trainer, BlipTrainer, BlipTrainingArguments
    from .resume import last_checkpoint
    from .sft import VlmSFTConfig, VlmSFTTrainer
    from .stages import STAGES, Stage, apply_stage, stage_named
    from .trainer import VlmTrainer
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "STAGES",
    "Blip2Trainer",
    "BlipTrainer",
    "BlipTrainingArguments",
    "ContrastiveTrainer",
    "ContrastiveTrainingArguments",
    "Stage",
    "VlmSFTConfig",
    "VlmSFTTrainer",
    "VlmTrainer",
    "VlmTrainingArguments",
    "add_lora",
    "apply_stage",
    "base_of",
    "cache_text_features",
    "cache_vision_features",
    "cached_tower_features",
    "choose_bf16",
    "last_checkpoint",
    "open_language_model",
    "save_trained",
    "stage_named",
]
