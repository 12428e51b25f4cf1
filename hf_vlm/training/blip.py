"""Training of BLIP: every part of the loss over its own global count, momentum and queue once a step, exact resume."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback

from ..data.batches.pairs import PairStream
from ..models.modeling_blip import VlmBlipForPreTraining
from ..models.modeling_blip_generation import VlmBlipForQuestionAnswering
from .arguments import VlmTrainingArguments
from .parts import PartsTrainer

MOMENTUM_NAME = "momentum.safetensors"


@dataclass
class BlipTrainingArguments(VlmTrainingArguments):
    """Arguments of [`BlipTrainer`]."""

    soft_target_ramp_epochs: float = field(
        default=2.0, metadata={"help": "Epochs over which the momentum encoders' share of the targets rises from 0."}
    )
    lr_decay_per_epoch: float | None = field(
        default=None,
        metadata={"help": "Factor on the rate after each epoch (BLIP: 0.9), in place of lr_scheduler_type."},
    )
    min_learning_rate: float = field(
        default=1e-6, metadata={"help": "Where lr_decay_per_epoch ends, and warm-up begins."}
    )


class MomentumStep(TrainerCallback):
    """What happens once a step: momentum before its first micro-batch, queue after its last."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer before the first micro-batch."""
        if model.config.itc_weight:
            model.update_momentum()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer after the last micro-batch."""
        if model.config.itc_weight:
            model.enqueue()


class BlipTrainer(PartsTrainer):
    """Trains any head of BLIP on the batches of `CaptionCollator` or `QuestionCollator`; see [`PartsTrainer`].

    - Answers to questions are averaged over questions.
    - Momentum encoders and queue are in the checkpoints to resume from, not in the model that is saved.
    """

    args: BlipTrainingArguments
    lr_scheduler: LRScheduler | None
    contrasting = (VlmBlipForPreTraining,)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._steps_per_epoch = 1.0  # see set_initial_training_values
        if self.contrasts:
            self.add_callback(MomentumStep())

    def count_items(self, batch: dict[str, torch.Tensor]) -> int:
        """Questions, or supervised tokens, of a micro-batch."""
        if isinstance(self.head, VlmBlipForQuestionAnswering):
            return len(batch["input_ids"])
        return super().count_items(batch)

    def loss_options(self) -> dict:
        """Also the momentum encoders' share of the targets, which rises from 0."""
        ramp = self.args.soft_target_ramp_epochs
        share = min(1.0, self.state.global_step / self._steps_per_epoch / ramp) if ramp > 0 else 1.0
        return super().loss_options() | {"soft_target_weight": share * self.head.config.soft_target_weight}

    def set_initial_training_values(self, args, dataloader):
        """The Trainer's, and the steps of an epoch: of a stream, its part of `max_steps` by `num_train_epochs`."""
        values = super().set_initial_training_values(args, dataloader)
        is_stream = isinstance(self.train_dataset, PairStream)
        self._steps_per_epoch = values[-1] / args.num_train_epochs if is_stream else values[1]
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        """BLIP's schedule with `lr_decay_per_epoch`: linear warm-up, then a step down after each epoch."""
        if self.lr_scheduler is None and self.args.lr_decay_per_epoch is not None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            lowest = self.args.min_learning_rate / self.args.learning_rate
            decay = self.args.lr_decay_per_epoch

            def factor(step: int) -> float:
                if step < warmup:
                    return lowest + (1 - lowest) * step / warmup
                return max(lowest, decay ** int(step / self._steps_per_epoch))

            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # the Trainer makes it first
            self.lr_scheduler = LambdaLR(optimizer, factor)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.contrasts and self.head.config.itc_weight and self.args.should_save:
            state = {name: tensor.contiguous() for name, tensor in self.head.momentum.state_dict().items()}
            save_file(state, Path(output_dir) / MOMENTUM_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (self.contrasts and self.head.config.itc_weight):
            return
        path = Path(checkpoint) / MOMENTUM_NAME
        if not path.is_file():
            raise ValueError(f"{path} is missing: the run cannot go on without its momentum encoders and queue.")
        self.head.momentum.load_state_dict(load_file(path))


__all__ = ["BlipTrainer", "BlipTrainingArguments"]
