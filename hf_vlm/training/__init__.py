"""Trainers, stages and callbacks."""

from .arguments import ContrastiveTrainingArguments, VlmTrainingArguments
from .blip import BlipTrainer, BlipTrainingArguments
from .checkpoints import last_checkpoint
from .contrastive import ContrastiveTrainer
from .lit import cache_text_features, cache_vision_features
from .precision import choose_bf16
from .trainer import VlmTrainer

__all__ = [
    "BlipTrainer",
    "BlipTrainingArguments",
    "ContrastiveTrainer",
    "ContrastiveTrainingArguments",
    "VlmTrainer",
    "VlmTrainingArguments",
    "cache_text_features",
    "cache_vision_features",
    "choose_bf16",
    "last_checkpoint",
]
