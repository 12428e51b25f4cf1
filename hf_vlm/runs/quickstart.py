"""`hf-vlm quickstart`: train a small CLIP on the built-in drawings, evaluate it, load it again, and search with it."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, concatenate_datasets
from PIL import Image
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed

from ..data.batches.augment import Augmentation
from ..data.batches.collators import ContrastiveCollator
from ..data.batches.pairs import PairDataset
from ..data.builtin.emoji import emoji_pairs, load_emoji
from ..data.wheels import resolve_part
from ..evaluation.tables import describe, format_report, report_table
from ..evaluation.test_sets import emoji_report
from ..files import write_text
from ..models import VlmClipModel, VlmClipProcessor, VlmTowerConfig, VlmTowerModel
from ..search import DatasetItems, EmbeddingIndex, Hit, Result, write_sheet
from ..training import ContrastiveTrainer, ContrastiveTrainingArguments, cache_text_features

IMAGE_SIZE = 64
MAX_STEPS = 1200
BATCH_SIZE = 256
TEXT_QUERIES = ("a red fruit", "an animal with wings", "a vehicle on rails", "a musical instrument", "something cold")
IMAGE_QUERIES = ("🐬", "🍕")
BOTH_QUERIES = (("🚗", "police"),)
MINUS_QUERIES = (("a musical instrument", "a guitar"),)
NUM_HITS = 8


def build_model() -> tuple[VlmClipModel, VlmClipProcessor]:
    """A new vision transformer of 2.8 million parameters with a frozen MiniLM text encoder, and their processor."""
    minilm = resolve_part("wheel:minilm")
    tower = VlmTowerConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=IMAGE_SIZE
    )
    # An initial scale of 30, because MiniLM's features are very similar to each other.
    model = VlmClipModel.from_parts(
        VlmTowerModel(tower), minilm, projection_dim=256, logit_scale_init_value=math.log(30)
    )
    model.lock_tower("text")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return model, VlmClipProcessor.from_parts(minilm, size=size, resize_mode="squash", max_length=77)


class TimeLimit(TrainerCallback):
    """Stops training after a time limit, in case the machine is slower than measured."""

    def __init__(self, seconds: float):
        self.deadline = time.perf_counter() + seconds

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after each step."""
        control.should_training_stop = control.should_training_stop or time.perf_counter() > self.deadline


def steps_within(
    seconds: float, model: VlmClipModel, collator: ContrastiveCollator, pairs: PairDataset, bf16: bool
) -> int:
    """Number of training steps that fit into the given seconds, measured on three steps; at most `MAX_STEPS`."""
    batch = [pairs[i % len(pairs)] for i in range(BATCH_SIZE)]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            model(**collator(batch), return_loss=True).loss.backward()
        times.append(time.perf_counter() - start)
    model.zero_grad()
    return max(50, min(MAX_STEPS, int(seconds / min(times) / 1.2)))


def train(model: VlmClipModel, processor: ProcessorMixin, splits: DatasetDict, output: Path, minutes: float, seed: int):
    """Trains the image tower; returns the number of steps and their seconds."""
    args = ContrastiveTrainingArguments(
        output_dir=str(output / "training"),
        max_steps=MAX_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        dataloader_drop_last=True,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        weight_decay=0.1,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        seed=seed,
    )
    rows = emoji_pairs(splits["train"])
    captions = (caption for row in rows for caption in row["caption"])
    features = cache_text_features(model, processor, captions, bf16=bool(args.bf16))
    collator = ContrastiveCollator(processor, Augmentation.drawing(), features)
    pairs = PairDataset(rows, seed)
    args.max_steps = steps_within(60 * minutes, model, collator, pairs, bool(args.bf16))
    trainer = ContrastiveTrainer(model, args, train_dataset=pairs, data_collator=collator)
    start = time.perf_counter()
    trainer.add_callback(TimeLimit(60 * minutes))
    trainer.train()
    return trainer.state.global_step, time.perf_counter() - start


def search(model: PreTrainedModel, processor: ProcessorMixin, splits: DatasetDict, folder: Path) -> list[Result]:
    """Indexes drawings in a style not used in training, and runs the queries on the index."""
    pool = concatenate_datasets([splits["unseen_style"], splits["unseen_both"]])
    index = EmbeddingIndex.create(folder, model, processor, replace=True)
    index.add(DatasetItems(pool, {"caption": "name"}), progress=False)

    def answer(label: str, image: Image.Image | None = None, **query: Any) -> Result:
        found = index.search(image=image, k=NUM_HITS, **query)
        return Result(
            label, [Hit(f"{each.metadata['emoji']} {each.text}", each.score, each.image) for each in found], image
        )

    def drawing(emoji: str) -> dict[str, Any]:
        return next(row for name in ("train", "unseen_emoji") for row in splits[name] if row["emoji"] == emoji)

    results = [answer(text, text=text) for text in TEXT_QUERIES]
    for row in map(drawing, IMAGE_QUERIES):
        results.append(answer(f"images like this {row['style']} drawing", row["image"]))
    for emoji, text in BOTH_QUERIES:
        results.append(answer(f"images like this, and: {text}", drawing(emoji)["image"], text=text, text_weight=2.0))
    for text, minus in MINUS_QUERIES:
        results.append(answer(f"{text}, but not {minus}", text=text, minus=minus, minus_weight=0.3))
    return results


def run(output: Path, max_minutes: float = 7.5, seed: int = 0) -> dict[str, Any]:
    """Runs the quickstart.

    Args:
        output: Folder for the model, the index, `results.json` and `results.html`.
        max_minutes: Maximum training time; the number of steps is chosen to fit.
        seed: Seed of weights, data order and augmentation.

    Returns:
        The contents of `results.json`.
    """
    set_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    print("1/5  Data: OpenMoji and Twemoji drawings for training, Noto for testing.")
    splits = load_emoji()
    print("2/5  Model: a new vision transformer with a frozen MiniLM text encoder.")
    model, processor = build_model()
    print(f"3/5  Training for at most {max_minutes:g} minutes.")
    steps, seconds = train(model, processor, splits, output, max_minutes, seed)
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    print(f"4/5  Evaluation of {output / 'model'}, loaded with AutoModel.")
    loaded, loaded_processor = (
        AutoModel.from_pretrained(output / "model"),
        AutoProcessor.from_pretrained(output / "model"),
    )
    report = emoji_report(loaded.eval(), loaded_processor)
    print(format_report(report, "retrieval"))
    print("5/5  Search.")
    results = search(loaded, loaded_processor, splits, output / "index")
    note = f"{steps} steps in {seconds / 60:.1f} minutes; results are Noto drawings, a style not used in training."
    sheet = write_sheet(
        output / "results.html", "hf_vlm quickstart", note, results, report_table(report, describe("retrieval", report))
    )
    record = {"steps": steps, "training_seconds": seconds, "retrieval": report}
    write_text(output / "results.json", json.dumps(record, indent=2))
    print(f"Model: {output / 'model'}\nIndex: {output / 'index'}\nSheet: {sheet}")
    print(f'Search: hf-vlm index search {output / "index"} "a red fruit"')
    return record


__all__ = ["run"]
