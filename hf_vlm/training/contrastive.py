"""Trainer of CLIP: contrastive loss over the global batch, GradCache, clamped temperature."""

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.utils import logging

from ..models.modeling_clip import VlmClipModel
from .arguments import ContrastiveTrainingArguments
from .grad_cache import grad_cache_backward
from .trainer import VlmTrainer

logger = logging.get_logger(__name__)


class ClampTemperature(TrainerCallback):
    """Clamps the logit scale after every optimiser step (CLIP, section 2.5)."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer after `optimizer.step()`."""
        model.similarity.clamp()


class ContrastiveTrainer(VlmTrainer):
    """Trains a [`VlmClipModel`] on the batches of [`ContrastiveCollator`].

    With `grad_cache_chunk` the batch is embedded in chunks of that many rows. The gradients are those of the whole
    batch.
    `gradient_accumulation_steps` is different: the negatives then come from the same micro-batch only.

    Evaluation passes `compute_metrics` the predictions `(image_embeds, text_embeds)`, each of shape
    `(rows, projection_dim)`, and `label_ids`, the pair ids.
    """

    args: ContrastiveTrainingArguments
    loss_is_scaled_for_ga = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(ClampTemperature())
        self.check_negatives()
        if self.args.grad_cache_chunk is not None and self.is_fsdp_enabled:
            raise ValueError("grad_cache_chunk works with data parallelism (torchrun), not with FSDP: use one of them.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process on {self.args.n_gpu} GPUs would take negatives only from each GPU's part of the batch: "
                f"start one process per GPU with torchrun --nproc_per_node {self.args.n_gpu}."
            )
        if self.args.gradient_accumulation_steps > 1:
            logger.warning(
                "gradient_accumulation_steps=%d: negatives come from the same micro-batch of %d only. For the "
                "negatives of a larger batch set grad_cache_chunk instead.",
                self.args.gradient_accumulation_steps,
                self.args.per_device_train_batch_size,
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss over the pairs of all ranks."""
        outputs = model(**inputs, return_loss=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(
        self, model: VlmClipModel | DistributedDataParallel, inputs: dict, num_items_in_batch=None
    ) -> torch.Tensor:
        """Forward and backward pass of one micro-batch; returns its loss divided by the number of micro-batches."""
        self.record("temperature", self.accelerator.unwrap_model(model).similarity.temperature)
        if self.args.grad_cache_chunk is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        steps = self.current_gradient_accumulation_steps
        loss = grad_cache_backward(
            model,
            self._prepare_inputs(inputs),
            self.args.grad_cache_chunk,
            backward=lambda surrogate: self.accelerator.backward(surrogate / steps),
            autocast=self.compute_loss_context_manager,
        )
        return loss / steps

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, `(image_embeds, text_embeds)` and pair ids of one evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), (outputs.image_embeds, outputs.text_embeds), inputs["pair_ids"]


__all__ = ["ContrastiveTrainer"]
