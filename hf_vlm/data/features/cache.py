"""Feature cache: a frozen tower's outputs for a dataset, computed once and memory-mapped in training.

- A folder of shards in bfloat16 (safetensors). Each shard is written atomically with a header that describes it, so a
  killed run resumes at the first missing shard. `cache.json`, written last, marks the cache as complete.
- A key names what the features were computed from: weights, preprocessing, data. A cache with another key is refused.
- Shards are mapped lazily: opening a cache reads headers only, and a batch reads its own rows.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...models.images import to_rgb
from ..sources.images import ImageError, load_image
from ..sources.rows import CaptionError, Rows, SourceError
from .key import compared, feature_key, first_difference, plain_json
from .shards import (
    INDEX,
    OTHER,
    FeatureCacheError,
    Plan,
    any_shard,
    defect,
    locked,
    map_features,
    read_header,
    read_index,
    save_shard,
    write_index,
)

_ANEW = "cache the features again into this folder; only missing or damaged shards are computed."


class CachedFeatures:
    """The features of a complete cache by row number. Picklable; every process maps the files itself.

    Indexed by a list or tensor of row numbers it gives `torch.bfloat16` features of shape `(n, tokens, width)`.
    Made by [`~CachedFeatures.open`] and [`cache_features`].
    """

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder = folder
        self.key: dict[str, Any] = index["key"]
        self.num_rows, self.tokens, self.width = index["num_rows"], index["tokens"], index["width"]
        self._plan = Plan(folder, self.key, self.num_rows, index["rows_per_shard"])
        self._maps: dict[int, np.memmap] = {}

    @classmethod
    def open(
        cls, folder: str | os.PathLike, key: dict[str, Any] | None = None, verify: bool = False
    ) -> "CachedFeatures":
        """Opens a complete cache.

        Args:
            folder: Where [`cache_features`] wrote it.
            key: The key that the cache must have, from [`feature_key`]; None accepts any.
            verify: Read all features and compare their checksums, in addition to sizes and headers.

        Raises:
            FeatureCacheError: if the cache is incomplete or damaged, or has another key.
        """
        folder = Path(folder)
        index = read_index(folder)
        if index is None:
            state = "is damaged" if (folder / INDEX).exists() else "is missing: the cache is not complete"
            raise FeatureCacheError(f"{folder / INDEX} {state}; {_ANEW}")
        if key is not None:
            _refuse_another(folder, index["key"], plain_json(key))
        features = cls(folder, index)
        for shard, checksum in enumerate(index["sha256"]):
            shape = {"tokens": features.tokens, "width": features.width, "sha256": checksum}
            if wrong := defect(features._plan, shard, shape, verify):
                raise FeatureCacheError(f"{features._plan.path(shard)} {wrong}; {_ANEW}")
        return features

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        return 2 * self.num_rows * self.tokens * self.width

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
        numbers = np.asarray(rows)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError(f"Cached features are indexed by a list of row numbers, got {rows!r}.")
        wrong = numbers[(numbers < 0) | (numbers >= self.num_rows)]
        if wrong.size:
            raise IndexError(f"{self.folder} has no row {wrong[0]}: its rows are numbered 0 to {self.num_rows - 1}.")
        found = np.empty((len(numbers), self.tokens, self.width), dtype=np.uint16)
        for place, number in enumerate(numbers.tolist()):
            shard, row = divmod(number, self._plan.rows_per_shard)
            found[place] = self._map(shard)[row]
        return torch.from_numpy(found).view(torch.bfloat16)

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            shape = (len(self._plan.rows(shard)), self.tokens, self.width)
            self._maps[shard] = map_features(self._plan.path(shard), shape)
        return self._maps[shard]


def cache_features(
    folder: str | os.PathLike,
    rows: Rows,
    processor: Callable[..., Any],
    encode: Callable[[torch.Tensor], torch.Tensor],
    key: dict[str, Any],
    batch_size: int = 128,
    rows_per_shard: int = 4096,
    num_workers: int = 0,
    progress: bool = True,
    verify: bool = False,
) -> CachedFeatures:
    """Computes the features of all rows into a folder; features that exist already are kept.

    A second process with the same folder waits for the first and then opens its cache. A shard stays in memory until it
    is written.

    Args:
        folder: The folder of the cache; created if missing.
        rows: Dicts with an `image` in any form that [`load_image`] takes.
        processor: Makes `pixel_values` of `images`: an image processor, or a processor that has one.
        encode: Features `(batch, tokens, width)` of `pixel_values` `(batch, channels, height, width)`, on any device
            and of any precision; they are rounded to bfloat16. Called without gradients.
        key: What the features depend on; see [`feature_key`].
        batch_size: Images per call of `encode`.
        rows_per_shard: Rows per file. A resumed cache keeps its own number.
        num_workers: Processes that load images.
        progress: Show a progress bar.
        verify: Also read a complete cache, and recompute shards with a wrong checksum.

    Raises:
        FeatureCacheError: if the folder holds a cache of another key or number of rows, it cannot be written, there are
            no rows, or a feature is not a finite number.
        ImageError: if an image cannot be read.
    """
    folder, key, num_rows = Path(folder), plain_json(key), len(rows)
    if num_rows == 0:
        raise FeatureCacheError(f"{folder}: there are no rows to cache; name data with images.")
    with locked(folder):
        index = read_index(folder)
        found = index or any_shard(folder)
        if found is not None:
            _refuse_another(folder, found["key"], key, found["num_rows"], num_rows)
            rows_per_shard = found["rows_per_shard"]
        plan = Plan(folder, key, num_rows, rows_per_shard)
        known = [{"sha256": checksum} for checksum in index["sha256"]] if index else [{}] * len(plan)
        deep = verify or index is None
        missing = [shard for shard in range(len(plan)) if defect(plan, shard, known[shard], deep)]
        if missing or index is None:
            (folder / INDEX).unlink(missing_ok=True)
            _write_shards(plan, missing, rows, processor, encode, batch_size, num_workers, progress)
            write_index(plan)
        return CachedFeatures.open(folder, key)


def _refuse_another(
    folder: Path, has: dict[str, Any], asked: dict[str, Any], has_rows: int = 0, asked_rows: int = 0
) -> None:
    difference = first_difference(compared(has), compared(asked))
    if difference is None and has_rows != asked_rows:
        difference = ("number of rows", has_rows, asked_rows)
    if difference is not None:
        name, old, new = difference
        raise FeatureCacheError(f"{folder} is a cache of other features: its {name} is {old!r}, not {new!r}; {OTHER}")


class _ImageBatches(Dataset):
    """Pixels of a range of rows. Data errors are returned, since a worker would raise them with its traceback."""

    def __init__(self, rows: Rows, processor: Callable[..., Any]):
        self.rows, self.processor = rows, processor

    def __getitem__(self, numbers: range) -> torch.Tensor | ValueError:
        try:
            images = [load_image(self.rows[number]["image"], where=f"row {number}") for number in numbers]
        except (ImageError, CaptionError, SourceError) as error:
            return error
        rgb = [to_rgb(image) for image in images]  # an image processor of transformers reads some modes as black
        return self.processor(images=rgb, return_tensors="pt")["pixel_values"]


def _write_shards(plan, missing, rows, processor, encode, batch_size, num_workers, progress) -> None:
    """Encodes in batches that do not cross shards, so that a shard's bytes do not depend on which shards exist."""
    batches = [
        plan.rows(shard)[start : start + batch_size]
        for shard in missing
        for start in range(0, len(plan.rows(shard)), batch_size)
    ]
    generator = torch.Generator()  # else the loader would advance the global RNG of a later training
    images = _ImageBatches(rows, processor)
    loader: DataLoader = DataLoader(
        images, batch_size=None, sampler=batches, num_workers=num_workers, generator=generator
    )
    sound = next((shard for shard in range(len(plan)) if shard not in missing), None)
    header = (sound is not None and read_header(plan.path(sound))) or {}
    shape: tuple[int, ...] | None = (header["tokens"], header["width"]) if header else None
    whole = torch.empty(0)
    done = plan.num_rows - sum(map(len, batches))
    with tqdm(total=plan.num_rows, initial=done, desc="features", unit=" rows", disable=not progress) as bar:
        for numbers, pixels in zip(batches, loader, strict=True):
            if isinstance(pixels, ValueError):
                raise pixels
            with torch.no_grad():
                features = encode(pixels).to("cpu", torch.bfloat16)
            shape = _check(plan.folder, features, numbers, shape)
            shard = numbers.start // plan.rows_per_shard
            first, stop = plan.rows(shard).start, plan.rows(shard).stop
            if numbers.start == first:
                whole = torch.empty((stop - first, *shape), dtype=torch.bfloat16)
            whole[numbers.start - first : numbers.stop - first] = features
            if numbers.stop == stop:
                save_shard(plan, shard, whole)
            bar.update(len(numbers))


def _check(folder: Path, features: torch.Tensor, numbers: range, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape `(tokens, width)` of the features of some rows; raises if they are bad."""
    if features.ndim != 3 or len(features) != len(numbers) or (shape and features.shape[1:] != shape):
        wanted = f"({len(numbers)}, {', '.join(map(str, shape or ('tokens', 'width')))})"
        raise FeatureCacheError(f"{folder}: encode returned the shape {tuple(features.shape)}, expected {wanted}.")
    finite = features.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        row = numbers[int(finite.int().argmin())]
        raise FeatureCacheError(
            f"{folder}: row {row} has features that are not finite; compute in float32 or remove it."
        )
    return tuple(features.shape[1:])


__all__ = ["CachedFeatures", "FeatureCacheError", "cache_features", "feature_key"]
