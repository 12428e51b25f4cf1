"""Trainers of BLIP and BLIP-2: several losses at once, each averaged over its own global count."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from ..data.batches.pairs import PairStream
from ..models.distributed import gather_with_grad
from ..models.modeling_blip import VlmBlipForPreTraining
from ..models.modeling_blip2_pretraining import VlmBlip2ForPreTraining
from ..models.modeling_blip_generation import VlmBlipForQuestionAnswering
from ..models.pretraining import total_loss
from .arguments import VlmTrainingArguments
from .trainer import VlmTrainer


class StepCounter(TrainerCallback):
    """Counts the micro-batches of a step, and clamps the temperature after the step."""

    def __init__(self) -> None:
        self.micro_batch = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer before the first micro-batch."""
        self.micro_batch = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer after `optimizer.step()`."""
        model.similarity.clamp()


class PretrainingTrainer(VlmTrainer):
    """Trains a model whose output has `parts`: sum and count `(2,)` of each loss.

    - The language-modelling loss is averaged over the supervised tokens of all micro-batches and ranks, so it does not
      depend on how a batch is split.
    - Contrastive and matching losses are averaged over ranks, with negatives from all ranks. With gradient accumulation
      the negatives come from the same micro-batch only.

    For contrastive heads, evaluation passes `compute_metrics` the predictions `(image_embeds, text_embeds)` and the
    pair ids as `label_ids`. For other heads it returns only the loss.
    """

    loss_is_scaled_for_ga = True
    contrasting: tuple[type[nn.Module], ...] = ()  # heads with contrastive, matching and language-modelling losses

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process on {self.args.n_gpu} GPUs would take negatives only from each GPU's part of the batch: "
                f"start one process per GPU with torchrun --nproc_per_node {self.args.n_gpu}."
            )
        model = self.accelerator.unwrap_model(self.model)
        self.head: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.contrasts = isinstance(self.head, self.contrasting)
        self.step_counter = StepCounter()
        if self.contrasts:
            if self.head.config.itc_weight or self.head.config.itm_weight:
                self.check_negatives()
            self.add_callback(self.step_counter)

    def loss_options(self) -> dict:
        """Arguments of a contrastive head's forward: the seed of this micro-batch's hard negatives."""
        micro_batches = self.args.gradient_accumulation_steps
        seed = self.state.global_step * micro_batches + self.step_counter.micro_batch
        return {"return_loss": True, "sample_seed": 2 * (seed + self.args.seed * 2**32)}  # two draws a micro-batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """The divisor of a step's language-modelling loss: supervised tokens of all ranks."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(self.count_items(batch) for batch in batch_samples))
        return self.accelerator.gather(count.to(device).view(1)).sum().clamp(min=1)

    def count_items(self, batch: dict[str, torch.Tensor]) -> int:
        """Number of supervised tokens of a micro-batch; without labels, of unpadded tokens."""
        learned = batch["labels"] != -100 if "labels" in batch else batch["attention_mask"] != 0
        return int(learned[:, 1:].sum())

    def _forward(self, model, inputs: dict) -> ModelOutput:
        return model(**inputs, **self.loss_options()) if self.contrasts else model(**inputs)

    def _parts_by_count(
        self, outputs: ModelOutput, mean_lm_count: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Each loss's sum on this rank, divided by its mean count per rank; averaged over ranks, the global mean."""
        parts = {}
        for name, (total, count) in outputs.parts.items():
            if name != "lm" or mean_lm_count is None:
                mean_count = gather_with_grad(count.detach().view(1)).mean().clamp(min=1)
            else:
                mean_count = mean_lm_count
            parts[name] = total / mean_count
        return parts

    def _weighted(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the losses, weighted by the config; a generating head has one loss, of weight 1."""
        weights = self.head.config.loss_weights if self.contrasts else dict.fromkeys(parts, 1.0)
        return total_loss(parts, weights)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the losses, each divided by its global count and the number of micro-batches."""
        outputs = self._forward(model, inputs)
        if num_items_in_batch is None:
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        self.step_counter.micro_batch += 1
        micro_batches = self.current_gradient_accumulation_steps
        parts = self._parts_by_count(outputs, num_items_in_batch / (self.args.world_size * micro_batches))
        for name, part in parts.items():
            self.record(f"loss_{name}", gather_with_grad(part.detach().view(1)).mean())
        loss = self._weighted(parts) / micro_batches
        if self.contrasts:
            self.record("temperature", self.head.similarity.temperature[0].clone())  # the step changes it in place
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of one evaluation batch; for contrastive heads also `(image_embeds, text_embeds)` and pair ids."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._forward(model, inputs)
        loss = self._weighted(self._parts_by_count(outputs))
        if prediction_loss_only or not self.contrasts:
            return loss, None, None
        return loss, (outputs.image_embeds, outputs.text_embeds), inputs["pair_ids"]


MOMENTUM_NAME = "momentum.safetensors"


@dataclass
class BlipTrainingArguments(VlmTrainingArguments):
    """Arguments of [`BlipTrainer`]."""

    soft_target_ramp_epochs: float = field(
        default=2.0, metadata={"help": "Epochs over which the weight of the soft targets rises from 0."}
    )
    lr_decay_per_epoch: float | None = field(
        default=None,
        metadata={"help": "Factor on the learning rate after each epoch (BLIP: 0.9); replaces lr_scheduler_type."},
    )
    min_learning_rate: float = field(
        default=1e-6, metadata={"help": "Lowest rate of lr_decay_per_epoch, and start of its warm-up."}
    )


class MomentumStep(TrainerCallback):
    """Updates the momentum encoders before a step's first micro-batch, and the queue after its last."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer before the first micro-batch."""
        if model.config.itc_weight:
            model.update_momentum()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer after the last micro-batch."""
        if model.config.itc_weight:
            model.enqueue()


class BlipTrainer(PretrainingTrainer):
    """Trains any head of BLIP on the batches of `CaptionCollator` or `QuestionCollator`; see [`PretrainingTrainer`].

    - The loss of answers is averaged over questions.
    - Momentum encoders and queue are saved in the checkpoints of a run, not with the final model.
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
        """Number of questions, or of supervised tokens, of a micro-batch."""
        if isinstance(self.head, VlmBlipForQuestionAnswering):
            return len(batch["input_ids"])
        return super().count_items(batch)

    def loss_options(self) -> dict:
        """Adds the weight of the soft targets, which rises from 0."""
        ramp = self.args.soft_target_ramp_epochs
        share = min(1.0, self.state.global_step / self._steps_per_epoch / ramp) if ramp > 0 else 1.0
        return super().loss_options() | {"soft_target_weight": share * self.head.config.soft_target_weight}

    def set_initial_training_values(self, args, dataloader):
        """Also stores the number of steps per epoch; for a stream it is `max_steps / num_train_epochs`."""
        values = super().set_initial_training_values(args, dataloader)
        is_stream = isinstance(self.train_dataset, PairStream)
        self._steps_per_epoch = values[-1] / args.num_train_epochs if is_stream else values[1]
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        """BLIP's schedule with `lr_decay_per_epoch`: linear warm-up, then a lower rate after each epoch."""
        if self.lr_scheduler is None and self.args.lr_decay_per_epoch is not None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            lowest = self.args.min_learning_rate / self.args.learning_rate
            decay = self.args.lr_decay_per_epoch

            def factor(step: int) -> float:
                if step < warmup:
                    return lowest + (1 - lowest) * step / warmup
                return max(lowest, decay ** int(step / self._steps_per_epoch))

            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # the Trainer creates it first
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
            raise ValueError(f"{path} is missing: the run cannot resume without its momentum encoders and queue.")
        self.head.momentum.load_state_dict(load_file(path))


class Blip2Trainer(PretrainingTrainer):
    """Trains the Q-Former on the batches of `CaptionCollator`; see [`PretrainingTrainer`]."""

    contrasting = (VlmBlip2ForPreTraining,)


__all__ = ["Blip2Trainer", "BlipTrainer", "BlipTrainingArguments", "PretrainingTrainer", "StepCounter"]
