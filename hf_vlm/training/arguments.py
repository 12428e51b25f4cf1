"""Training arguments of all recipes: transformers' own, with defaults for vision-language models."""

from dataclasses import dataclass, field

import torch
import yaml
from transformers import TrainingArguments
from transformers.utils import logging

from .precision import choose_bf16

logger = logging.get_logger(__name__)


@dataclass
class VlmTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with `bf16="auto"`, and all columns passed to the collator."""

    bf16: str = field(  # the parser reads a field's type from its annotation
        default="auto",
        metadata={"help": "true, false, or auto: a one-second probe on a CPU, the device's support on a GPU."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave it false: image collators need all columns."}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of Muon for the layers' matrices; AdamW trains the rest. None: AdamW only."},
    )
    learning_rates: dict | str | None = field(
        default=None,
        metadata={"help": "Learning rates by module, which override learning_rate: '{\"language_projection\": 0.01}'."},
    )
    logging_steps: float = field(default=20, metadata={"help": "Log every N steps; below 1, a fraction of the run."})
    hub_strategy: str = field(
        default="end", metadata={"help": "Only end is supported: push_to_hub makes one commit at the end."}
    )

    def __post_init__(self):
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(f"hub_strategy is {self.hub_strategy!r}: only end (one commit at the end) is supported.")
        if isinstance(self.learning_rates, str):
            self.learning_rates = parse_rates(self.learning_rates)
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: give a positive number, or leave it out to train num_train_epochs.")
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}: give a positive number, or max_steps.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number.")
        if self.learning_rates and self.muon_learning_rate is not None:
            raise ValueError("learning_rates work with AdamW only: leave out muon_learning_rate.")
        choice = str(self.bf16).lower()
        if choice not in ("auto", "true", "false"):
            raise ValueError(f"bf16 must be true, false or auto, not {self.bf16!r}.")
        self.bf16 = choice == "true"  # type: ignore[assignment]
        if choice == "auto":
            self.bf16, reason = choose_bf16()  # type: ignore[assignment]
            logger.warning(reason)
        # Otherwise transformers refuses bf16 on a machine without an accelerator.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


@dataclass
class ContrastiveTrainingArguments(VlmTrainingArguments):
    """Arguments of [`ContrastiveTrainer`]."""

    grad_cache_chunk: int | None = field(
        default=None,
        metadata={"help": "Rows per chunk of GradCache: memory of one chunk, gradients of the whole batch."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.grad_cache_chunk is not None and self.grad_cache_chunk < 1:
            raise ValueError(
                f"grad_cache_chunk must be a positive number of rows or left out, not {self.grad_cache_chunk}."
            )


def parse_rates(text: str) -> dict[str, float]:
    """The learning rates by module that an option holds as YAML or JSON.

    Raises:
        ValueError: if the text is not a mapping of names to numbers.
    """
    try:
        rates = yaml.safe_load(text)
        return {name: float(rate) for name, rate in rates.items()}
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):
        example = "'{\"language_projection\": 0.01}'"
        raise ValueError(f"learning_rates is {text!r}: write learning rates by module, {example}.") from None


__all__ = ["ContrastiveTrainingArguments", "VlmTrainingArguments"]
