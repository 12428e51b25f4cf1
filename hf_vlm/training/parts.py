"""Training by several losses at once, each over its own global count: what BLIP's and BLIP-2's trainers share."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from ..models.losses import gather_with_grad
from .trainer import VlmTrainer


class StepCounter(TrainerCallback):
    """Counts the micro-batches of a step, and keeps the temperature within its bounds after it."""

    def __init__(self) -> None:
        self.micro_batch = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer before the first micro-batch."""
        self.micro_batch = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer after `optimizer.step()`."""
        model.similarity.clamp()


class PartsTrainer(VlmTrainer):
    """Trains a model whose output has `parts`: sum and count `(2,)` of each loss.

    - Language modelling is averaged over the supervised tokens of all micro-batches and ranks: how a batch is split
      changes nothing.
    - Contrastive and matching losses are averaged over ranks, with candidates from all of them. Micro-batches are
      contrasted each for itself, since accumulation cannot do more.

    Evaluation hands `compute_metrics` the predictions `(image_embeds, text_embeds)` and, as `label_ids`, the pair ids,
    where the head contrasts; else the loss alone.
    """

    loss_is_scaled_for_ga = True
    contrasting: tuple[type[nn.Module], ...] = ()  # heads with several weighted losses

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process on {self.args.n_gpu} GPUs would contrast each GPU's part only with itself: "
                f"start one process a GPU, with torchrun --nproc_per_node {self.args.n_gpu}."
            )
        model = self.accelerator.unwrap_model(self.model)
        self.head: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.contrasts = isinstance(self.head, self.contrasting)
        self.step_counter = StepCounter()
        if self.contrasts:
            self.add_callback(self.step_counter)

    def loss_options(self) -> dict:
        """Arguments of a contrasting head's forward: a seed of the hard negatives for every micro-batch of the run."""
        micro_batches = self.args.gradient_accumulation_steps
        seed = self.state.global_step * micro_batches + self.step_counter.micro_batch
        return {"return_loss": True, "sample_seed": 2 * (seed + self.args.seed * 2**32)}  # two draws a micro-batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """What the language-modelling loss of a step is divided by: tokens of all ranks."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(self.count_items(batch) for batch in batch_samples))
        return self.accelerator.gather(count.to(device).view(1)).sum().clamp(min=1)

    def count_items(self, batch: dict[str, torch.Tensor]) -> int:
        """Supervised tokens of a micro-batch; without labels every unpadded token is one."""
        learned = batch["labels"] != -100 if "labels" in batch else batch["attention_mask"] != 0
        return int(learned[:, 1:].sum())

    def _forward(self, model, inputs: dict) -> ModelOutput:
        return model(**inputs, **self.loss_options()) if self.contrasts else model(**inputs)

    def _parts_by_count(
        self, outputs: ModelOutput, mean_lm_count: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Each part's sum on this rank over its mean count on all, so that the mean over ranks is the global mean."""
        parts = {}
        for name, (total, count) in outputs.parts.items():
            if name != "lm" or mean_lm_count is None:
                mean_count = gather_with_grad(count.detach().view(1)).mean().clamp(min=1)
            else:
                mean_count = mean_lm_count
            parts[name] = total / mean_count
        return parts

    def _weighted(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Their sum with the weights of the config; a head that writes has one part."""
        weights = self.head.config.loss_weights if self.contrasts else dict.fromkeys(parts, 1.0)
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the parts, each divided by its global count and the number of micro-batches."""
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
        """Loss and, where the head contrasts, `(image_embeds, text_embeds)` and pair ids of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = self._forward(model, inputs)
        loss = self._weighted(self._parts_by_count(outputs))
        if prediction_loss_only or not self.contrasts:
            return loss, None, None
        return loss, (outputs.image_embeds, outputs.text_embeds), inputs["pair_ids"]


__all__ = ["PartsTrainer", "StepCounter"]
