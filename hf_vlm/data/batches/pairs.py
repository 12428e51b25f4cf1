"""Image-caption pairs whose random choices depend only on seed, epoch and row.

A resumed run therefore sees the same captions and augmentations as an uninterrupted run.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..sources.mixing import Weights, check_weights, mix, split_stream
from ..sources.open import DataSource
from ..sources.rows import OnError, Rows
from ..sources.skipped import SkipReport


class Pair(TypedDict):
    """One example: an image, one of its captions, and its row."""

    image: Image.Image
    caption: str
    id: Any
    index: int
    seed: int


def row_id(row: Mapping[str, Any]) -> Any:
    """The id of a row, or its first caption where it has none: a pair with "caption", which equals no id."""
    if row.get("id") is not None:
        return row["id"]
    return "caption", row["caption"] if isinstance(row["caption"], str) else row["caption"][0]


def make_pair(row: dict[str, Any], index: int, seed: tuple[int, ...], epoch: int, shuffle_captions: bool) -> Pair:
    """Chooses one caption of a row.

    Args:
        row: `image`, `caption` (a string or a list of strings) and optionally `id`.
        index: The row's number.
        seed: Determines, together with epoch and index, the caption and the pair's seed.
        epoch: The number of the pass.
        shuffle_captions: Whether to choose a caption at random; otherwise the first is taken.

    Raises:
        ValueError: if the row has no caption or an empty one.
    """
    rng = np.random.default_rng((*seed, epoch, index))
    captions = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError(f"Row {index} has an empty caption: {row['caption']!r}. Add a text or remove the row.")
    choice = int(rng.integers(len(captions))) if shuffle_captions else 0
    return {
        "image": row["image"],
        "caption": captions[choice],
        "id": row_id(row),
        "index": index,
        "seed": int(rng.integers(2**63)),
    }


class PairDataset(Dataset):
    """One pair per row; the caption is chosen again each epoch.

    Args:
        rows: A sequence of dicts with `image`, `caption` (a string or a list of strings) and optionally `id`; rows with
            equal ids are positives of each other. Without ids, rows with equal captions are.
        seed: Decides captions and augmentation.
        shuffle_captions: Whether to choose a caption at random; otherwise the first is taken.
    """

    def __init__(self, rows: Rows, seed: int = 0, shuffle_captions: bool = True):
        self.rows = rows
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see the new epoch
        self.shuffle_captions = shuffle_captions

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        return make_pair(self.rows[index], index, (self.seed,), int(self.epoch), self.shuffle_captions)


class PairStream(IterableDataset):
    """[`PairDataset`] for a stream, which is read in its own order.

    Args:
        stream: The result of [`load_source`] or [`mix`] for streaming sources, the same on every rank.
        seed: Decides captions and augmentation.
        shuffle_captions: Whether to choose a caption at random; otherwise the first is taken.
    """

    def __init__(self, stream: datasets.IterableDataset, seed: int = 0, shuffle_captions: bool = True):
        self.stream = stream
        self.seed = seed
        self.shuffle_captions = shuffle_captions
        self.rank: int | None = None

    def split(self, rank: int, world_size: int, workers: int) -> "PairStream":
        """The rows of one rank (see [`split_stream`]), repeated forever.

        Ranks and workers end their passes at different steps, and a resumed run must find its place in a later pass.
        Every pass after the first shuffles the shards.
        """
        part = PairStream(split_stream(self.stream, rank, world_size, workers), self.seed, self.shuffle_captions)
        part.rank = rank
        return part

    def __iter__(self) -> Iterator[Pair]:
        worker = get_worker_info()
        reader = (self.rank or 0, worker.id if worker else 0)
        stream = copy.deepcopy(self.stream)  # workers would share the epoch counter
        for epoch in itertools.count():
            stream.set_epoch(epoch)
            index = -1
            for index, row in enumerate(stream):
                yield make_pair(row, index, (self.seed, *reader), epoch, self.shuffle_captions)
            if self.rank is None or index < 0:
                return


def load_pairs(
    sources: Sequence[dict[str, Any]],
    weights: Weights | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    shuffle_captions: bool = True,
    report: SkipReport | None = None,
) -> PairDataset | PairStream:
    """Opens the sources that a YAML file lists.

    Args:
        sources: Fields of [`DataSource`], one dict per source.
        weights: How to mix several; see [`mix`]. Not with sources that have a weight.
        seed: Decides mixing, captions and augmentation.
        on_error: `"raise"` or `"skip"` for bad rows.
        shuffle_captions: Whether to choose among a row's captions at random.
        report: Counts the skipped rows; a new one by default.
    """
    opened = [DataSource(**source) for source in sources]
    check_weights(opened, weights)
    rows = mix(opened, weights, seed, on_error, report)
    if isinstance(rows, datasets.IterableDataset):
        return PairStream(rows, seed, shuffle_captions)
    return PairDataset(rows, seed, shuffle_captions)


__all__ = ["Pair", "PairDataset", "PairStream", "load_pairs", "make_pair", "row_id"]
