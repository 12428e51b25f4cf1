"""The files of a feature cache: shards in bfloat16 (safetensors) and `cache.json`.

A file gets its final name when it is completely on disk. The header of a shard states its cache, its rows and their
checksum.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...terminal import InputError
from .key import compared

FORMAT = 1
INDEX = "cache.json"
OTHER = "choose another folder or delete this one."
_TENSOR = "features"
_ENTRIES = {"format", "key", "num_rows", "rows_per_shard", "tokens", "width", "sha256"}


class FeatureCacheError(InputError):
    """A cache cannot be read or written; one line that says what to do."""


@dataclass(frozen=True)
class Plan:
    """The split of a cache's rows into shards, and the expected header of each shard."""

    folder: Path
    key: dict[str, Any]
    num_rows: int
    rows_per_shard: int

    def __len__(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    def rows(self, shard: int) -> range:
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def about(self, shard: int) -> dict[str, Any]:
        """The part of a shard's header that is known before its features are computed."""
        return {
            "format": FORMAT,
            "key": compared(self.key),  # the model's name does not change the bytes
            "num_rows": self.num_rows,
            "rows_per_shard": self.rows_per_shard,
            "first_row": self.rows(shard).start,
            "rows": len(self.rows(shard)),
        }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates the folder and locks it against other processes; a read-only folder needs no lock."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                stack.enter_context(FileLock(folder / "cache.lock"))
        except OSError as error:
            raise FeatureCacheError(f"{folder} cannot be written: {error}; choose another folder.") from error
        yield


def read_index(folder: Path) -> dict[str, Any] | None:
    """The contents of `cache.json`; None if the file is missing or unreadable."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(index, dict) or not index.keys() >= _ENTRIES:
        return None
    if index["format"] != FORMAT:
        raise FeatureCacheError(f"{folder} was written by another version of hf_vlm; {OTHER}")
    return index


def any_shard(folder: Path) -> dict[str, Any] | None:
    """The header of the first readable shard, which describes an incomplete cache."""
    return next(filter(None, map(read_header, sorted(folder.glob("features-*.safetensors")))), None)


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a shard, with `tokens` and `width`; None if it is unreadable."""
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("about", ""))
            stored = file.get_slice(_TENSOR)
            rows, tokens, width = stored.get_shape()
            return {**about, "dtype": stored.get_dtype(), "rows": rows, "tokens": tokens, "width": width}
    except (OSError, SafetensorError, ValueError, TypeError):
        return None


def defect(plan: Plan, shard: int, known: dict[str, Any], deep: bool) -> str | None:
    """What is wrong with a shard, in words; `known` holds expected header entries beyond those of the plan."""
    path = plan.path(shard)
    if not path.exists():
        return "is missing"
    header = read_header(path)
    if header is None:
        return "is damaged: it cannot be read"
    expected = {**plan.about(shard), "dtype": "BF16", **known}
    if wrong := [name for name, value in expected.items() if header.get(name) != value]:
        return f"is damaged or of another cache: its {wrong[0]} is wrong"
    if deep:
        shape = (header["rows"], header["tokens"], header["width"])
        if hashlib.sha256(map_features(path, shape).data).hexdigest() != header["sha256"]:
            return "is damaged: its checksum is wrong"
    return None


def map_features(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """The bfloat16 features of a shard as integers of 16 bits; they are the last bytes of the file."""
    offset = path.stat().st_size - 2 * int(np.prod(shape))
    return np.memmap(path, dtype=np.uint16, mode="r", offset=offset, shape=shape)


def save_shard(plan: Plan, shard: int, features: torch.Tensor) -> None:
    """Writes the features `(rows, tokens, width)` of one shard."""
    features = features.contiguous()
    checksum = hashlib.sha256(features.view(torch.uint8).numpy().data).hexdigest()
    # One entry, because safetensors writes several in any order and the bytes of a shard must be reproducible.
    about = {"about": json.dumps({**plan.about(shard), "sha256": checksum}, sort_keys=True)}
    _write(plan.path(shard), lambda path: save_file({_TENSOR: features}, path, about))


def write_index(plan: Plan) -> None:
    """Writes `cache.json`, which makes a cache complete, from the headers of its shards."""
    headers = [read_header(plan.path(shard)) or {} for shard in range(len(plan))]
    index = {
        "format": FORMAT,
        "key": plan.key,
        "num_rows": plan.num_rows,
        "rows_per_shard": plan.rows_per_shard,
        "tokens": headers[0]["tokens"],
        "width": headers[0]["width"],
        "sha256": [header["sha256"] for header in headers],
    }
    text = json.dumps(index, indent=2, sort_keys=True)
    _write(plan.folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name, syncs it to disk and renames it."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        try:
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise FeatureCacheError(f"{path} cannot be written: {error}; make room or choose another folder.") from error


__all__ = [
    "INDEX",
    "OTHER",
    "FeatureCacheError",
    "Plan",
    "any_shard",
    "defect",
    "locked",
    "map_features",
    "read_header",
    "read_index",
    "save_shard",
    "write_index",
]
