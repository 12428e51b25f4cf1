"""Evaluation of the filter with known labels: scenes whose captions are corrupted at a known rate.

The captions are scored by the matching head (ITM), by BLIP's embeddings (ITC), and optionally by another model such as
CLIP. Each score's threshold is the one with the best F1 on the validation split. ITM is also measured at its
given threshold, one half by default.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.builtin.corruption import JudgedCaption, corrupt_captions
from ..data.builtin.emoji import TEST_SPLITS
from ..data.builtin.scenes import load_scenes
from ..evaluation import GREY, best_threshold, filter_metrics
from ..evaluation.tasks import load_checkpoint
from ..files import write_text
from ..hub.cards.card import RESULTS_NAME, read_results, write_card
from .filter import PairFilter, similarity

Score = Callable[[Sequence[Image.Image], Sequence[str], Sequence[int]], torch.Tensor]
# Nested metrics of a report -> row names.
ROWS = {
    "itm": "ITM, threshold from validation",
    "itc": "ITC, threshold from validation",
    "clip": "CLIP, threshold from validation",
    "blind": "ITM with a grey image",
}
SHOWN = {"precision": "precision", "recall": "recall", "f1": "F1", "average_precision": "AP", "roc_auc": "ROC AUC"}


@dataclass(frozen=True)
class Corruption:
    """The corruption of the captions of scenes: its rates, seed and scenes.

    Args:
        num_scenes: Scenes per split, each with one caption.
        size: Side of a scene in pixels.
        another_image: Share of captions that are another scene's.
        wrong_attribute: Share of captions with one wrong attribute.
        seed: Seed of the corruption.
        splits: Test sets, from `EMOJI_SPLITS`.
    """

    num_scenes: int = 1000
    size: int = 64
    another_image: float = 0.2
    wrong_attribute: float = 0.2
    seed: int = 0
    splits: Sequence[str] = TEST_SPLITS

    def captions(self, split: str) -> tuple[Sequence[Image.Image], list[JudgedCaption]]:
        """The images of the scenes and one caption for each."""
        scenes = load_scenes(split, self.num_scenes, size=self.size)
        parts = scenes.select_columns(["objects", "hard_negatives"]).to_list()
        return scenes["image"], corrupt_captions(parts, self.another_image, self.wrong_attribute, self.seed)


def filter_scenes(pair_filter: PairFilter, corruption: Corruption, clip: str | None = None) -> dict[str, dict]:
    """Detection of the corrupted captions by each score.

    Args:
        pair_filter: The BLIP that filters; the threshold of its settings applies to ITM.
        corruption: See [`Corruption`].
        clip: Folder or Hub id of a two-tower model to compare with.

    Returns:
        Test set -> the metrics of `filter_metrics` for ITM at the given threshold. Under `itm`, `itc`, `clip`: the same
        metrics at thresholds chosen on validation scenes; under `blind`, those of ITM with a grey image.
    """
    scores: dict[str, Score] = {"itm": pair_filter.match, "itc": pair_filter.similarity}
    if clip is not None:
        model, processor = load_checkpoint(clip)
        scores["clip"] = lambda *pairs: similarity(model, processor, *pairs, **pair_filter.shown)
    images, judged = corruption.captions("validation")
    texts, kinds = _columns(judged)
    thresholds = {
        name: best_threshold(score(images, texts, range(len(texts))), kinds) for name, score in scores.items()
    }
    reports: dict[str, dict[str, Any]] = {}
    for split in corruption.splits:
        images, judged = corruption.captions(split)
        texts, kinds = _columns(judged)
        found = {name: score(images, texts, range(len(texts))) for name, score in scores.items()}
        blind = pair_filter.match([GREY], texts, [0] * len(texts))
        threshold = pair_filter.settings.threshold
        reports[split] = {
            **filter_metrics(found["itm"], kinds, threshold),
            **{name: filter_metrics(values, kinds, thresholds[name]) for name, values in found.items()},
            "blind": filter_metrics(blind, kinds, threshold),
        }
    return reports


def filter_table(reports: dict[str, dict[str, Any]]) -> str:
    """The reports of [`filter_scenes`] as a table for the terminal."""
    first = next(iter(reports.values()))
    kinds = sorted(key.removeprefix("bad_") for key in first if key.startswith("bad_"))
    lines = ["  ".join([f"{'':<34}", *(f"{label:>9}" for label in SHOWN.values()), *(f"AUC {k}" for k in kinds)])]
    for split, report in reports.items():
        lines.append(f"{split}: {report['bad']:.0f} of {report['pairs']:.0f} captions are bad")
        rows = {f"ITM, threshold {report['threshold']:g}": report}
        rows |= {label: report[key] for key, label in ROWS.items() if key in report}
        for label, row in rows.items():
            cells = [f"{row[key]:>9.3f}" for key in SHOWN]
            cells += [f"{row.get(f'roc_auc_{kind}', float('nan')):>{len(kind) + 4}.3f}" for kind in kinds]
            lines.append("  ".join([f"  {label:<32}", *cells]))
    return "\n".join(lines)


def add_results(folder: str | Path, results: dict[str, dict]) -> None:
    """Adds evaluations to a checkpoint's `results.json` and card; replaces earlier ones of the same name."""
    path = Path(folder) / RESULTS_NAME
    write_text(path, json.dumps({**read_results(folder), **results}, indent=2))
    write_card(folder)


def _columns(judged: Sequence[JudgedCaption]) -> tuple[list[str], list[str]]:
    return [caption.caption for caption in judged], [caption.corruption for caption in judged]


__all__ = ["ROWS", "Corruption", "add_results", "filter_scenes", "filter_table"]
