"""`hf-vlm evaluate`: a two-tower checkpoint on the built-in pictures, on scenes, or on a data set of the user's own."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..data.collators import pair_id
from ..data.emoji import load_emoji
from ..data.emoji_pairs import TEST_SPLITS
from ..data.images import load_image
from ..data.scenes import load_scenes
from ..data.sources import DataSource, load_source
from ..evaluation import hard_negative_report, retrieval_report
from ..models import VlmClipModel

KS = (1, 5, 10)
Report = dict[str, dict[str, Any]]


def load_two_tower(checkpoint: str) -> tuple[VlmClipModel, ProcessorMixin]:
    """Model and processor of a checkpoint.

    Raises:
        ValueError: if it is of another architecture.
    """
    model = AutoModel.from_pretrained(checkpoint)
    if not isinstance(model, VlmClipModel):
        raise ValueError(
            f"{checkpoint} is a {model.config.model_type} checkpoint, not vlm_clip: convert it first "
            f"(hf-vlm convert {checkpoint} FOLDER) or evaluate another one."
        )
    return model.eval(), AutoProcessor.from_pretrained(checkpoint)


def emoji_report(model: PreTrainedModel, processor: ProcessorMixin) -> Report:
    """Retrieval between drawings and names on the three test sets of the built-in pictures, by test set."""
    splits = load_emoji()
    return {
        name: retrieval_report(
            model, processor, splits[name]["image"], splits[name]["name"], splits[name]["emoji_id"], ks=KS
        )
        for name in TEST_SPLITS
    }


def scenes_report(model: PreTrainedModel, processor: ProcessorMixin, num_scenes: int) -> Report:
    """Accuracy on captions that differ in one word, on scenes of each test set, by test set."""
    report = {}
    for name in TEST_SPLITS:
        scenes = load_scenes(name, num_scenes)
        report[name] = hard_negative_report(model, processor, scenes["image"], scenes["hard_negatives"])
    return report


def report_on_builtin_data(folder: str, num_scenes: int) -> None:
    """Evaluates a saved model on the built-in pictures and scenes, prints both tables and writes `results.json`."""
    model, processor = load_two_tower(folder)
    reports = {
        "retrieval": emoji_report(model, processor),
        "hard_negatives": scenes_report(model, processor, num_scenes),
    }
    for report in reports.values():
        print(format_report(report))
    Path(folder, "results.json").write_text(json.dumps(reports, indent=2))


def evaluate_checkpoint(checkpoint: str, data: str, split: str, columns: str, limit: int) -> Report:
    """The report behind `hf-vlm evaluate`; see the command's help for the arguments.

    Raises:
        ValueError: if the checkpoint is of another architecture or a column is missing.
    """
    model, processor = load_two_tower(checkpoint)
    if data == "emoji":
        return emoji_report(model, processor)
    if data == "scenes":
        return scenes_report(model, processor, limit)
    mapping = dict(item.split("=", 1) for item in columns.split(",")) if columns else None
    rows = load_source(DataSource(data, split=split, columns=mapping))
    rows = [rows[i] for i in range(len(rows) if limit == 0 else min(limit, len(rows)))]
    images = [load_image(row["image"], where=f"row {i}") for i, row in enumerate(rows)]
    ids = [pair_id(row["id"]) for row in rows] if "id" in rows[0] else None
    return {split: retrieval_report(model, processor, images, [row["caption"] for row in rows], ids, ks=KS)}


def format_report(report: Report) -> str:
    """A report as a plain table: recall at k beside chance, or accuracy by kind of hard negative."""
    if "accuracy" in next(iter(report.values())):
        kinds = sorted({key for scores in report.values() for key in scores if key.startswith("accuracy_")})
        table = [["test set", "pairs", "all", *(kind.removeprefix("accuracy_") for kind in kinds)]]
        for name, scores in report.items():
            cells = [f"{scores[kind]:.3f}" if kind in scores else "-" for kind in kinds]
            table.append([name, f"{scores['pairs']:.0f}", f"{scores['accuracy']:.3f}", *cells])
    else:
        table = retrieval_table(report)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def retrieval_table(report: Report) -> list[list[str]]:
    """Rows of cells: a test set's size, recall both ways and what chance gives for text to image."""
    head = ["test set", "images", "texts"]
    head += [f"{direction} R@{k}" for direction in ("text>image", "image>text") for k in KS]
    table = [[*head, *(f"chance R@{k}" for k in KS)]]
    for name, scores in report.items():
        recalls = [scores[f"{way}_r{k}"] for way in ("text_to_image", "image_to_text") for k in KS]
        recalls += [scores["chance"][f"text_to_image_r{k}"] for k in KS]
        counts = [str(scores["num_images"]), str(scores["num_texts"])]
        table.append([name, *counts, *(f"{recall:.3f}" for recall in recalls)])
    return table


__all__ = [
    "emoji_report",
    "evaluate_checkpoint",
    "format_report",
    "load_two_tower",
    "report_on_builtin_data",
    "retrieval_table",
    "scenes_report",
]
