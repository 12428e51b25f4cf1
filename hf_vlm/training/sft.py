"""Supervised fine-tuning of a model with an LLM by TRL, and LoRA on that LLM."""

from dataclasses import dataclass, field

import datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer

from ..data.pairs import Rows
from ..models.modeling_blip2 import VlmBlip2PreTrainedModel
from .arguments import VlmTrainingArguments
from .trainer import VlmTrainer

# What is trained in full beside LoRA: what stands between the tower and the LLM.
TRAINED_IN_FULL = {
    "vlm_blip2": ["qformer", "vision_norm", "language_projection"],
    "vlm_instructblip": ["qformer", "vision_norm", "language_projection"],
    "vlm_llava": ["projector"],
}


@dataclass
class VlmSFTConfig(VlmTrainingArguments, SFTConfig):  # type: ignore[misc]  # bf16 may be "auto"
    """TRL's `SFTConfig` with the defaults of [`VlmTrainingArguments`]; rows reach the collator as they are."""

    max_length: int | None = field(default=None, metadata={"help": "Leave it out: the collator cuts responses."})
    dataset_kwargs: dict | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "Leave it: the collator tokenizes."}
    )
    eos_token: str | None = field(default=None, metadata={"help": "Leave it out: the tokenizer's own."})


class VlmSFTTrainer(VlmTrainer, SFTTrainer):
    """TRL's `SFTTrainer` that takes the model's own loss.

    TRL makes logits at every position where there is no Triton, image placeholders included; the model's forward makes
    them at supervised positions only. The loss is the same.
    """

    args: VlmSFTConfig

    def __init__(self, model, args: VlmSFTConfig, train_dataset: datasets.Dataset | Rows, **kwargs):
        if not isinstance(train_dataset, datasets.Dataset | datasets.IterableDataset):
            train_dataset = as_dataset(train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the model's forward, divided by the supervised tokens of all ranks and micro-batches."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: logits of a whole evaluation set are of no use."""
        return Trainer.prediction_step(self, model, inputs, True, ignore_keys)


def as_dataset(rows: Rows) -> datasets.Dataset:
    """Rows that are made when they are asked for as a data set, which TRL wants: nothing is copied or stored."""

    def read(batch: dict[str, list[int]]) -> dict[str, list]:
        found = [rows[row] for row in batch["row"]]
        return {name: [row[name] for row in found] for name in found[0]}

    return datasets.Dataset.from_dict({"row": range(len(rows))}).with_transform(read)


def add_lora(model: PreTrainedModel, r: int, alpha: int, dropout: float = 0.0) -> PeftModel:
    """LoRA on every linear layer of the LLM; what stands before the LLM is trained in full and saved with it.

    Args:
        model: A head with an LLM.
        r: Rank.
        alpha: Numerator of the scale `alpha / r`.
        dropout: Dropout probability before the adapters.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=r".*(vision_model|qformer|language_projection|projector|lm_head).*",
        modules_to_save=TRAINED_IN_FULL[model.config.model_type],
    )
    adapted = get_peft_model(model, config)
    if isinstance(model, VlmBlip2PreTrainedModel):
        # PEFT thaws all of these; a trained parameter without a gradient stalls data parallelism.
        model.body.qformer.freeze_text(all_layers=not model.body.reads_instruction)
    return adapted


__all__ = ["TRAINED_IN_FULL", "VlmSFTConfig", "VlmSFTTrainer", "add_lora", "as_dataset"]
