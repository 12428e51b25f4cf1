"""Supervised fine-tuning of a model with an LLM, with TRL."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import datasets
import torch
from peft import PeftModel
from torch.utils.data import Sampler
from tqdm import trange
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTConfig, SFTTrainer

from ..data.batches.conversation_collator import ConversationCollator
from ..data.sources.rows import Rows
from .arguments import VlmTrainingArguments
from .lora import base_of
from .trainer import VlmTrainer


@dataclass
class VlmSFTConfig(VlmTrainingArguments, SFTConfig):  # type: ignore[misc]  # bf16 may be "auto"
    """TRL's `SFTConfig` with the defaults of [`VlmTrainingArguments`]; rows reach the collator unchanged."""

    max_length: int | None = field(default=None, metadata={"help": "Leave it out: the collator truncates responses."})
    dataset_kwargs: dict | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True},
        metadata={"help": "Leave it as it is: the collator tokenizes."},
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # None leaves it to the newer name
        default=None, metadata={"help": "Old name of activation_checkpointing; off by default, unlike TRL."}
    )
    eos_token: str | None = field(default=None, metadata={"help": "Leave it out: the tokenizer's own is used."})


class LengthSampler(LengthGroupedSampler):
    """Groups rows of similar length, in a different order in each epoch.

    transformers shuffles with the global RNG, whose state differs after a resume and between ranks.

    Args:
        rows: Rows per group.
        lengths: Lengths of all rows.
        seed: Returns the seed of the epoch that begins.
    """

    def __init__(self, rows: int, lengths: list[int], seed: Callable[[], int]):
        super().__init__(rows, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed())
        return super().__iter__()


class VlmSFTTrainer(VlmTrainer, SFTTrainer):
    """TRL's `SFTTrainer` with the model's own loss.

    Without Triton, TRL computes logits at every position, image placeholders included. The model's forward computes
    them at supervised positions only. The loss is the same.

    With `train_sampling_strategy="group_by_length"` the collator's `length` gives the length of a row, so that unpacked
    batches have little padding.

    Raises:
        ValueError: if the collator packs rows and the LLM lets packed samples attend to each other (`check_packing`).
    """

    args: VlmSFTConfig

    def __init__(self, model, args: VlmSFTConfig, train_dataset: datasets.Dataset | Rows, **kwargs):
        self.lengths: list[int] | None = None
        if not isinstance(train_dataset, datasets.Dataset | datasets.IterableDataset):
            if args.train_sampling_strategy == "group_by_length":
                self.lengths = row_lengths(train_dataset, kwargs["data_collator"])
            train_dataset = as_dataset(train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        # TRL binds its forward to this instance: a copy, such as a merged model, would still run this instance.
        vars(base_of(self.model)).pop("forward", None)
        if isinstance(self.data_collator, ConversationCollator) and self.data_collator.packed and self._can_run():
            with self.accelerator.autocast():
                check_packing(self.model)

    def _can_run(self) -> bool:
        """Whether the model can run before training: not sharded, and on a device that its attention supports."""
        needs_gpu = is_flash_attention_requested(base_of(self.model).body.language_model.config)
        return not is_deepspeed_zero3_enabled() and not (needs_gpu and self.model.device.type == "cpu")

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler | None:
        """Groups by the lengths computed before; the Trainer would compute every row again to read its length."""
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSampler(rows, self.lengths, lambda: seed + int(self.state.epoch or 0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the model's forward, divided by the supervised tokens of all ranks and micro-batches."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss only: the logits of an evaluation set would not fit in memory."""
        return Trainer.prediction_step(self, model, inputs, True, ignore_keys)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes nothing: TRL's card would replace ours at every save."""


def as_dataset(rows: Rows) -> datasets.Dataset:
    """Rows as a `datasets.Dataset`, which TRL needs; each row is computed on access."""

    def read(batch: dict[str, list[int]]) -> dict[str, list]:
        found = [rows[row] for row in batch["row"]]
        return {name: [row.get(name) for row in found] for name in dict.fromkeys(chain.from_iterable(found))}

    return datasets.Dataset.from_dict({"row": range(len(rows))}).with_transform(read)


@torch.no_grad()
def check_packing(model: PreTrainedModel | PeftModel) -> None:
    """Checks that an LLM keeps the samples of a packed row apart. Some, such as OPT, build no mask from position ids.

    Raises:
        ValueError: if an earlier sample in a row changes the hidden states of a later one.
    """
    body = base_of(model).body
    llm = body.language_model
    was_training = llm.training
    llm.eval()
    input_ids = torch.tensor([[1, 2, 3, 4], [5, 6, 3, 4]], device=llm.device)  # the second samples are equal
    position_ids = torch.tensor([[0, 1, 0, 1]] * 2, device=llm.device)
    embeds = body.get_input_embeddings()(input_ids)
    output = body(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)
    one, other = output.last_hidden_state[:, 2:].float()
    llm.train(was_training)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        kind = llm.config.model_type
        raise ValueError(f"The {kind} LLM does not keep the samples of a packed row apart: set packed to false.")


def row_lengths(rows: Rows, collator: ConversationCollator) -> list[int]:
    """Number of tokens of each row. Images are not opened; each counts as one tile."""
    return [collator.length(rows[row]) for row in trange(len(rows), desc="lengths of the rows", unit="row")]


__all__ = ["VlmSFTConfig", "VlmSFTTrainer", "as_dataset", "check_packing", "row_lengths"]
