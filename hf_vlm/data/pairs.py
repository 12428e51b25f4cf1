"""Image-caption pairs whose random choices depend only on seed, epoch and row.

A resumed run therefore sees the same captions and the same augmentations as an uninterrupted one, whatever the number
of workers or ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from .mixing import Weights, mix, split_stream
from .rows import OnError
from .sources import DataSource


class Rows(Protocol):
    """What is read by row number: a list, a `datasets.Dataset`, a mixture."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Pair(TypedDict):
    """One example: a picture, one of its captions, and where it came from."""

    image: Image.Image
    caption: str
    id: Any
    index: int
    seed: int


def make_pair(row: dict[str, Any], index: int, seed: int, epoch: int, shuffle_captions: bool) -> Pair:
    """Chooses a caption of a row.

    Raises:
        ValueError: if the row has no caption or an empty one.
    """
    rng = np.random.default_rng((seed, epoch, index))
    captions = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError(f"Row {index} has an empty caption: {row['caption']!r}. Remove it or give it a text.")
    choice = int(rng.integers(len(captions))) if shuffle_captions else 0
    return {
        "image": row["image"],
        "caption": captions[choice],
        "id": row.get("id", captions[0]),
        "index": index,
        "seed": int(rng.integers(2**63)),
    }


class PairDataset(Dataset):
    """Chooses one caption of each row, anew each epoch.

    Args:
        rows: A sequence of dicts with `image`, `caption` (a string or a list of strings) and optionally `id`; rows with
            equal ids are positives of each other. Without ids, rows with equal captions are.
        seed: Decides captions and augmentation.
        shuffle_captions: Whether to choose a caption at random; otherwise the first is taken.
    """

    def __init__(self, rows: Rows, seed: int = 0, shuffle_captions: bool = True):
        self.rows = rows
        self.seed = seed
        self.epoch = 0
        self.shuffle_captions = shuffle_captions

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer's data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        return make_pair(self.rows[index], index, self.seed, self.epoch, self.shuffle_captions)


class PairStream(IterableDataset):
    """The same for a stream, which is read in its own order; see [`PairDataset`].

    Args:
        stream: What [`load_source`] or [`mix`] returned for streaming sources, on every rank the same.
        seed: Decides captions and augmentation.
    """

    def __init__(self, stream: datasets.IterableDataset, seed: int = 0):
        self.stream = stream
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch; shuffles the stream's shards."""
        self.epoch = epoch
        self.stream.set_epoch(epoch)

    def split(self, rank: int, world_size: int, workers: int) -> "PairStream":
        """The rows of one rank; see [`split_stream`]."""
        return PairStream(split_stream(self.stream, rank, world_size, workers), self.seed)

    def __iter__(self) -> Iterator[Pair]:
        for index, row in enumerate(self.stream):
            yield make_pair(row, index, self.seed, self.epoch, shuffle_captions=True)


def load_pairs(
    sources: Sequence[dict[str, Any]],
    weights: Weights | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    shuffle_captions: bool = True,
) -> PairDataset | PairStream:
    """Opens the sources that a YAML file lists.

    Args:
        sources: Fields of [`DataSource`], one dict a source.
        weights: How to mix several; see [`mix`].
        seed: Decides mixing, captions and augmentation.
        on_error: `"raise"` or `"skip"` for bad rows.
        shuffle_captions: Whether to choose among a row's captions at random.
    """
    rows = mix([DataSource(**source) for source in sources], weights, seed, on_error)
    if isinstance(rows, datasets.IterableDataset):
        return PairStream(rows, seed)
    return PairDataset(rows, seed, shuffle_captions)


__all__ = ["Pair", "PairDataset", "PairStream", "load_pairs", "make_pair"]
