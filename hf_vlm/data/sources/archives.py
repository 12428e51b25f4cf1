"""Reads tar archives of samples (webdataset): files with the same name up to its first dot are the cells of one row.

- An archive is compared with what it says of itself: the checksum of every header, the size of every member, and the
  blocks that mark its end. A cut or damaged archive is refused with its name; it never reads as a shorter one.
- A column is the rest of the file names: `7.jpg` and `7.txt` are the cells `jpg` and `txt` of one row. No type is
  guessed from the first rows, and a file that no role names is not parsed.
- A cell is a text, the value of a JSON file, or `bytes` (images, and files that are not UTF-8). A cell that cannot be
  read is the `ValueError` that says why: only rows that use it are bad.
- Nothing is extracted to disk. Links, devices and names that lead out of the archive are refused.
"""

import json
import logging
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, NamedTuple

import datasets
import fsspec
import pyarrow as pa
from PIL import Image

from ...terminal import printable, quoted
from .rows import SourceError

logger = logging.getLogger(__name__)

KEY, URL = "__key__", "__url__"
"""The columns of a sample's name and of its archive."""

PEEKED = 32  # the files of so many samples name the columns, where no role names one
_BLOCK = 512
_WRITTEN_AT_ONCE = 100  # samples, which hold images
_IMAGES = {*(name.lstrip(".") for name in Image.registered_extensions()), "image", "img"}
_COMPRESSED = {"gz", "bz2", "xz", "zst", "lz4", "zip"}
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
# Errors of `tarfile` on damaged archives, found by changing bytes of headers.
_DAMAGED = (tarfile.TarError, OSError, ValueError, OverflowError, IndexError, KeyError, RecursionError, MemoryError)


class Archive(NamedTuple):
    """A tar archive: path or URL, size, and time of change; `datasets` reads a changed archive again."""

    path: str
    size: int | None = None
    changed: int | None = None


@dataclass
class Member:
    """The type of a column of an archive, as `datasets` stores it and decodes it.

    Args:
        kind: "image", "json" or "other".
    """

    kind: str = "other"
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "member"
    _type: str = field(default="hf_vlm.Member", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return pa.struct({"data": pa.large_binary(), "problem": pa.string()})

    def encode_example(self, value: dict[str, Any]) -> dict[str, Any]:
        """A cell as it is stored: what `read_samples` yields."""
        return value

    def decode_example(self, value: dict[str, Any], token_per_repo_id: Any = None) -> Any:
        """The value of a stored cell; a `ValueError` if it cannot be read."""
        if value["problem"] is not None:
            return ValueError(value["problem"])
        data = value["data"]
        if self.kind == "image" or data is None:
            return data
        try:
            return json.loads(data) if self.kind == "json" else data.decode()
        except UnicodeDecodeError:
            return data
        except (ValueError, RecursionError) as error:
            return ValueError(f"holds a file that is not valid JSON ({printable(error)}); correct the file.")


with warnings.catch_warnings(action="ignore"):  # says that registering is experimental
    datasets.features.features.register_feature(Member, "hf_vlm.Member")


def open_archives(
    files: Sequence[str], streaming: bool, wanted: Iterable[str] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """The samples of archives as rows.

    Args:
        files: Paths or URLs, in order; a stream shares them between ranks and workers.
        streaming: Whether to read row after row; otherwise all rows are copied to the cache of `datasets` first.
        wanted: Columns that a role names: found also if the first samples lack them.

    Raises:
        SourceError: if an archive is cut, damaged, or holds something else than files. A stream is checked at its
            ends when it is opened, and wholly when it is read.
    """
    archives = [_archive(file) for file in files]
    features = datasets.Features(
        {
            **{name: Member(_kind(name)) for name in _columns(archives, wanted)},
            KEY: datasets.Value("string"),
            URL: datasets.Value("string"),
        }
    )
    options: dict[str, Any] = {"archives": archives, "columns": tuple(features)}
    if streaming:
        return datasets.IterableDataset.from_generator(read_rows, features, gen_kwargs=options)
    try:
        return datasets.Dataset.from_generator(
            read_rows, features, gen_kwargs=options, writer_batch_size=_WRITTEN_AT_ONCE
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, SourceError):
            raise error.__cause__ from None
        raise


def read_rows(archives: Sequence[Archive], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The samples of archives as rows of exactly the given columns; an absent file is None."""
    for archive in archives:
        for sample in read_samples(archive.path):
            yield {name: sample.get(name) for name in columns}


def read_samples(path: str) -> Iterator[dict[str, Any]]:
    """The samples of an archive: column -> `{"data": bytes, "problem": None}`, and the columns `KEY` and `URL`.

    Args:
        path: A path or a URL of fsspec.

    Raises:
        SourceError: if the archive is cut or damaged, or holds a link, a device or a name that leads out of it.
    """
    with fsspec.open(path, "rb") as file:
        sample: dict[str, Any] = {}
        for member, key, column in _members(file, path):
            if sample.get(KEY) != key:
                if sample:
                    yield sample
                sample = {KEY: key, URL: path}
            cell: dict[str, Any] = {"data": _body(file, member, path), "problem": None}
            if column.rsplit(".", 1)[-1] in _COMPRESSED:
                cell = {"data": None, "problem": f"holds a compressed file ({column}); store the file itself."}
            if column in sample and sample[column] != cell:
                problem = f"holds a file that its archive holds twice ({key}.{column}); remove one of them."
                cell = {"data": None, "problem": problem}
            sample[column] = cell
        if sample:
            yield sample


def _archive(file: str) -> Archive:
    """An archive; a local one is checked at its end, which costs nothing."""
    if "://" in file:
        return Archive(file)
    state = os.stat(file)
    with open(file, "rb") as archive:
        archive.seek(max(0, state.st_size - _BLOCK))
        end = archive.read()
    if any(end) or len(end) < _BLOCK or state.st_size % _BLOCK:
        with open(file, "rb") as archive:  # names what is wrong, if the archive has members at all
            for _ in _members(archive, file):
                pass
        raise _cut(file, state.st_size)
    return Archive(file, state.st_size, state.st_mtime_ns)


def _columns(archives: Sequence[Archive], wanted: Iterable[str]) -> list[str]:
    """The columns of the first samples, and the wanted ones, if the first archive that holds samples has them."""
    found: dict[str, None] = {}
    missing = set(wanted) - {KEY, URL}
    for archive in archives:
        keys = set()
        with fsspec.open(archive.path, "rb") as file:
            for _, key, column in _members(file, archive.path):
                keys.add(key)
                if len(keys) > PEEKED and not missing:
                    break
                if len(keys) <= PEEKED or column in missing:
                    found.setdefault(column)
                missing.discard(column)
        if found:
            return list(found)
    raise SourceError(f"{archives[0].path}: has no rows: no file of the archive is part of a sample (7.jpg and 7.txt).")


def _kind(column: str) -> str:
    extension = column.rsplit(".", 1)[-1].lower()
    return "image" if extension in _IMAGES else "json" if extension in ("json", "jsn") else "other"


def _members(file: BinaryIO, path: str) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """The files of an archive that belong to samples: member, name of the sample, column."""
    try:
        archive = tarfile.TarFile(fileobj=file)
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or an archive of a million files would fill the memory
            if place := _place(member, path):
                yield member, *place
        end = archive.offset
        file.seek(end)
        rest = file.read(_BLOCK)
        if len(rest) < _BLOCK:
            raise _cut(path, end + len(rest))
        if any(rest):
            raise SourceError(f"{path}: the header at byte {end} is damaged; write or download the archive again.")
        while rest := file.read(1 << 20):
            if any(rest):
                raise SourceError(
                    f"{path}: there is data after the end of the archive at byte {end}; were archives joined with "
                    "cat? Name each as a file of its own."
                )
    except SourceError:
        raise
    except _DAMAGED as error:
        if isinstance(error, tarfile.ReadError) and "unexpected end" in str(error):
            raise _cut(path) from None
        raise SourceError(
            f"{path}: is not a tar archive, or damaged ({printable(error)}); unpack a compressed one (gunzip)."
        ) from error


def _place(member: tarfile.TarInfo, path: str) -> tuple[str, str] | None:
    """The sample and column of a member; None for folders, hidden files and files without a dot in their name."""
    parts = member.name.split("/")
    if member.size < 0:
        raise SourceError(f"{path}: the size of {quoted(member.name)} is negative; write the archive again.")
    if member.name.startswith("/") or ".." in parts:
        raise SourceError(f"{path}: the name {quoted(member.name)} leads out of the archive; rename the file.")
    if member.isdir() or parts[-1].startswith((".", "__")):
        return None
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no plain file"
        raise SourceError(f"{path}: {quoted(member.name)} is {kind}; store the file itself.")
    if (match := _NAME.fullmatch(member.name)) is None:
        return None
    key, column = (part.encode(errors="surrogateescape").decode(errors="backslashreplace") for part in match.groups())
    return key, column


def _body(file: BinaryIO, member: tarfile.TarInfo, path: str) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise _cut(path, member.offset_data + len(data))
    return data


def _cut(path: str, size: int | None = None) -> SourceError:
    after = "" if size is None else f" after {size} bytes"
    return SourceError(f"{path}: the archive was cut{after}: its end is missing; write or download it again.")


__all__ = ["KEY", "PEEKED", "URL", "Archive", "Member", "open_archives", "read_rows", "read_samples"]
