"""A tiny contrastive training that the tests and the programs they start have in common."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from cases import tiny
from hf_vlm import VlmClipModel
from hf_vlm.data.batches.augment import Augmentation
from hf_vlm.data.batches.collators import ContrastiveCollator
from hf_vlm.data.batches.pairs import PairDataset, PairStream
from hf_vlm.training import ContrastiveTrainer, ContrastiveTrainingArguments

THINGS = ["cat", "dog", "house", "tree"]
DROPOUT = {
    "vision": {"attention_dropout": 0.1, "patch_dropout": 0.25, "drop_path_rate": 0.2},
    "text": {"attention_dropout": 0.1},
}


def rows(count: int) -> list[dict[str, Any]]:
    """Examples with two captions each; every fifth row is a second image of the one before."""
    examples = []
    for i in range(count):
        thing, other = THINGS[i % 4], THINGS[(i // 4) % 4]
        captions = [f"a {thing} on the left of the {other}", f"two red {thing} and a blue {other}"]
        examples.append({"image": tiny.image(seed=i).convert("RGBA"), "caption": captions, "id": i - (i % 5 == 4)})
    return examples


def model(dropout: bool = False, **options) -> VlmClipModel:
    """A randomised CLIP; for the options, see `tiny.clip_config`."""
    return tiny.clip_model(**({**DROPOUT, **options} if dropout else options))


def collator(augment: bool = False, **options) -> ContrastiveCollator:
    """A collator with the tiny processor."""
    return ContrastiveCollator(tiny.clip_processor(), Augmentation.drawing() if augment else None, **options)


def arguments(output_dir: str | Path, **options) -> ContrastiveTrainingArguments:
    """Arguments of a short, quiet, reproducible run on the CPU."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": "false",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return ContrastiveTrainingArguments(output_dir=str(output_dir), **{**defaults, **options})


def stream(count: int, num_shards: int) -> PairStream:
    """[`rows`] as a stream."""
    return PairStream(Dataset.from_list(rows(count)).to_iterable_dataset(num_shards))


def trainer(
    output_dir: str | Path,
    clip: VlmClipModel,
    train_dataset: PairDataset | PairStream | None = None,
    eval_dataset: PairDataset | None = None,
    data_collator: ContrastiveCollator | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options,
) -> ContrastiveTrainer:
    """A trainer, by default over 16 [`rows`] that are not augmented; the options are training arguments."""
    return ContrastiveTrainer(
        clip,
        arguments(output_dir, **options),
        train_dataset=train_dataset or PairDataset(rows(16)),
        eval_dataset=eval_dataset,
        data_collator=data_collator or collator(),
        eval_collator=collator(),
        callbacks=callbacks,
    )
