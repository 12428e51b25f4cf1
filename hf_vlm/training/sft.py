"""Supervised fine-tuning of a model with an LLM by TRL, and LoRA on that LLM."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
    """TRL's `SFTConfig` with the defaults of [`VlmTrainingArguments`]; rows reach the collator as they are."""

    max_length: int | None = field(default=None, metadata={"help": "Leave it out: the collator cuts responses."})
    dataset_kwargs: dict | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "Leave it: the collator tokenizes."}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # None leaves it to the newer name
        default=None, metadata={"help": "Older name of activation_checkpointing; TRL's default would be true."}
    )
    eos_token: str | None = field(default=None, metadata={"help": "Leave it out: the tokenizer's own."})


class LengthSampler(LengthGroupedSampler):
    """Rows of about the same length together, in an order of its own in each epoch.

    transformers draws the order from the random numbers of the process: those of a resumed run, and of ranks of which
    one has drawn more of them for dropout, are others.

    Args:
        rows: Rows that go together.
        lengths: Of all rows.
        seed: Gives the seed of the epoch that begins.
    """

    def __init__(self, rows: int, lengths: list[int], seed: Callable[[], int]):
        super().__init__(rows, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed())
        return super().__iter__()


class VlmSFTTrainer(VlmTrainer, SFTTrainer):
    """TRL's `SFTTrainer` that takes the model's own loss.

    TRL makes logits at every position where there is no Triton, image placeholders included; the model's forward makes
    them at supervised positions only. The loss is the same.

    With `train_sampling_strategy="group_by_length"` the collator's `length` says how long a row will be, so that
    batches which are not packed have little padding.

    Raises:
        ValueError: if the collator packs rows for an LLM whose samples would see each other (`check_packing`).
    """

    args: VlmSFTConfig

    def __init__(self, model, args: VlmSFTConfig, train_dataset: datasets.Dataset | Rows, **kwargs):
        self.lengths: list[int] | None = None
        if not isinstance(train_dataset, datasets.Dataset | datasets.IterableDataset):
            if args.train_sampling_strategy == "group_by_length":
                self.lengths = row_lengths(train_dataset, kwargs["data_collator"])
            train_dataset = as_dataset(train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        # TRL's forward, bound to this model: of a copy, such as a merged one, it would still run this model.
        vars(base_of(self.model)).pop("forward", None)
        if isinstance(self.data_collator, ConversationCollator) and self.data_collator.packed and self._can_run():
            with self.accelerator.autocast():
                check_packing(self.model)

    def _can_run(self) -> bool:
        """Whether the model can be tried before training: it is whole, and where its attention has kernels."""
        needs_gpu = is_flash_attention_requested(base_of(self.model).body.language_model.config)
        return not is_deepspeed_zero3_enabled() and not (needs_gpu and self.model.device.type == "cpu")

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler | None:
        """By the lengths that were counted; the Trainer would make every row once more to read its length."""
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSampler(rows, self.lengths, lambda: seed + int(self.state.epoch or 0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the model's forward, divided by the supervised tokens of all ranks and micro-batches."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: logits of a whole evaluation set are of no use."""
        return Trainer.prediction_step(self, model, inputs, True, ignore_keys)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes nothing. TRL's would replace the card in the output folder at every save."""


def as_dataset(rows: Rows) -> datasets.Dataset:
    """Rows that are made when they are asked for as a data set, which TRL wants: nothing is copied or stored."""

    def read(batch: dict[str, list[int]]) -> dict[str, list]:
        found = [rows[row] for row in batch["row"]]
        return {name: [row[name] for row in found] for name in found[0]}

    return datasets.Dataset.from_dict({"row": range(len(rows))}).with_transform(read)


@torch.no_grad()
def check_packing(model: PreTrainedModel | PeftModel) -> None:
    """Tries whether an LLM keeps the samples of a packed row apart. Some, such as OPT, make no mask of the positions.

    Raises:
        ValueError: if what stands before a sample in its row changes the sample's states.
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
    """How many tokens each row will have, its images taken to be as large as a tile: they are not opened."""
    return [collator.length(rows[row]) for row in trange(len(rows), desc="lengths of the rows", unit="row")]


__all__ = ["VlmSFTConfig", "VlmSFTTrainer", "as_dataset", "check_packing", "row_lengths"]
