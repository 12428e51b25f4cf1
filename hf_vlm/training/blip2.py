"""Training of BLIP-2's first stage."""

from ..models.modeling_blip2_pretraining import VlmBlip2ForPreTraining
from .parts import PartsTrainer


class Blip2Trainer(PartsTrainer):
    """Trains the Q-Former on the batches of `CaptionCollator`; see [`PartsTrainer`]."""

    contrasting = (VlmBlip2ForPreTraining,)


__all__ = ["Blip2Trainer"]
