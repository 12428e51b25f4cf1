"""Several sources mixed by weight, and streams shared between ranks and workers.

One pass over a mixture contains every row of every source at least once; sources with a large weight for their size
repeat rows. The seed determines every choice, so a resumed run sees the same rows.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset

from .load import load_source, open_stream, read_stream
from .open import DataSource
from .rows import Check, OnError, SkipReport, SourceError, report_for

logger = logging.getLogger(__name__)

Weights = Literal["size", "sqrt"] | Sequence[float]


class Mixture(Dataset):
    """Map-style datasets mixed in fixed shares, in an order drawn from the seed.

    With shares p, a pass has max(size / p) rows, and each source its share of them to within a row. With shares
    proportional to size, each row comes once. Ids are prefixed by source, so that ids of two sources never match.

    Args:
        sources: Map-style datasets of rows, none of them empty.
        shares: One positive number per source; only the ratios matter.
        seed: Decides the order.
    """

    def __init__(self, sources: Sequence[Any], shares: Sequence[float], seed: int = 0):
        self.sources = list(sources)
        sizes = np.array([len(source) for source in sources])
        probabilities = np.array(shares) / np.sum(shares)
        length = np.max(sizes / probabilities)
        counts = np.maximum(np.rint(length * probabilities).astype(np.int64), sizes)
        order = np.random.default_rng(seed).permutation(counts.sum())
        self._source = np.repeat(np.arange(len(sources)), counts)[order]
        self._row = np.concatenate([np.arange(count) % size for count, size in zip(counts, sizes, strict=True)])[order]

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self._source[index])
        example = self.sources[number][int(self._row[index])]
        return example if example.get("id") is None else {**example, "id": f"{number}:{example['id']}"}


def mix(
    sources: Sequence[DataSource],
    weights: Weights | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    report: SkipReport | None = None,
    check: Check | None = None,
) -> Mixture | datasets.IterableDataset:
    """Opens several sources as one.

    Args:
        sources: What to mix: all streaming, or none.
        weights: "size": shares proportional to the number of rows; "sqrt": to its square root; or one positive
            number per source. Default: the sources' own weights, "size" if they have none. Streams do not know their
            sizes and need numbers.
        seed: Decides the order of rows and, for streams, the order of each source's shards.
        on_error: As in `load_source`.
        report: As in `load_source`.
        check: As in `load_source`.

    Returns:
        A map-style mixture, or a stream that ends when every source has been read to its end at least once
        (`interleave_datasets` with "all_exhausted"; each worker and rank decides that for its own shards).

    Raises:
        SourceError: if the sources or weights do not fit together, or one cannot be opened.
    """
    if len({source.streaming for source in sources}) != 1:
        raise SourceError("Mix at least one source; streaming must be true for all of them or for none.")
    report = report_for(on_error, report)
    if weights is None:
        weights = _own_weights(sources)
    if sources[0].streaming:
        return _mix_streams(sources, weights, seed, report, check)
    rows = [load_source(source, on_error, report, check=check) for source in sources]
    return Mixture(rows, _shares(weights, [len(part) for part in rows]), seed)


def check_weights(sources: Sequence[DataSource], weights: Weights | None) -> None:
    """Raises a SourceError if a file gives shares and its sources have weights, of which one would be ignored."""
    weighted = [source.path for source in sources if source.weight is not None]
    if weights is not None and weighted:
        raise SourceError(f"{weighted[0]}: has a weight, and mix is {weights!r}: leave out mix, or the weights.")


def _own_weights(sources: Sequence[DataSource]) -> Weights:
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        without = ", ".join(source.path for source in sources if source.weight is None)
        raise SourceError(f"{without}: has no weight while other sources have one; give all of them a weight or none.")
    return weights or "size"


def _shares(weights: Weights, sizes: Sequence[int]) -> list[float]:
    powers = {"size": 1.0, "sqrt": 0.5}
    if isinstance(weights, str):
        if weights in powers:
            return [size ** powers[weights] for size in sizes]
    elif len(weights) == len(sizes) and all(weight > 0 for weight in weights):
        return list(weights)
    raise SourceError(f"weights={weights!r}: write 'size', 'sqrt', or {len(sizes)} positive numbers.")


def _mix_streams(
    sources: Sequence[DataSource], weights: Weights, seed: int, report: SkipReport | None, check: Check | None
) -> datasets.IterableDataset:
    if isinstance(weights, str) and len(sources) > 1:
        raise SourceError(
            f"weights={weights!r}: streams do not know their sizes; write {len(sources)} numbers instead."
        )
    streams, origins = zip(*[open_stream(source, i, seed) for i, source in enumerate(sources)], strict=True)
    mixed = streams[0]
    if len(streams) > 1:
        shares = np.array(_shares(weights, [0] * len(sources)))
        probabilities = list(shares / shares.sum())
        mixed = datasets.interleave_datasets(list(streams), probabilities, seed, stopping_strategy="all_exhausted")
    return read_stream(mixed, list(origins), report, check)


def split_stream(
    stream: datasets.IterableDataset, rank: int, world_size: int, workers: int = 0
) -> datasets.IterableDataset:
    """The part of a stream that one rank reads: each row goes to exactly one rank, for any number of shards.

    Ranks get whole shards if there are enough. Otherwise every rank reads the whole stream and keeps every
    `world_size`-th row, and workers without a shard are idle. This is slow, so a warning is logged.

    Args:
        stream: What `load_source` or `mix` returned, the same on all ranks.
        rank: This process's number.
        world_size: The number of processes.
        workers: The number of data loader workers of each process.

    Returns:
        The rank's part, which a `DataLoader` shares between its workers. Parts can differ in length: train for a fixed
        number of steps.
    """
    wanted = world_size * max(workers, 1)
    if stream.num_shards < wanted and rank == 0:
        logger.warning(
            "A stream of %d shards for %d ranks x %d workers: no row is lost or repeated, but %s; write >= %d shards.",
            stream.num_shards,
            world_size,
            workers,
            "workers stay idle" if stream.num_shards >= world_size else "every rank reads all of it",
            wanted,
        )
    strategy = "shards" if stream.num_shards >= world_size else "examples"
    return split_dataset_by_node(stream, rank, world_size, strategy)


__all__ = ["Mixture", "check_weights", "mix", "split_stream"]
