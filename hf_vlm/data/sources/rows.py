"""Decodes a stored row into an example: image decoded, caption checked; a bad row raises, or is skipped and counted.

- Images are decoded when a row is asked for, so opening a source reads no image.
- A file named by a row must lie in the folder of its source: data cannot make us read other files ([`image_of`]).
- A bad row of a map-style source is replaced by the next good row of that source, so that length, order and resumed
  runs do not change. A bad row of a stream is dropped.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import datasets
import fsspec
from huggingface_hub.constants import HF_HUB_CACHE

from ...paths import is_inside, resolve_inside
from ...terminal import printable, quoted
from .cells import read_pair
from .errors import CaptionError, RowError, SourceError
from .images import ImageError, load_image
from .skipped import SkipReport, SourceTally

OnError = Literal["raise", "skip"]
Example = TypeVar("Example")

WRONG = "_wrong"
"""The column that says what is wrong with a row whose cells are no values."""
# This many consecutive bad rows mean a missing folder.
HOPELESS = 1000
Check = Callable[[Any, str], object]
"""Called with a decoded row and its place; raises a `RowError` that begins with the place if it cannot be used."""
OR_SKIP = "Or load the source with on_error='skip'."


@dataclass(frozen=True)
class Origin:
    """The origin of rows, and which files they may name.

    Args:
        label: What to call the source in an error.
        root: The folder that paths in rows are relative to and must stay in; None: rows must contain their images.
        built: Whether `datasets` made the paths itself from an image folder, possibly on the Hub or in an archive.
    """

    label: str
    root: Path | None
    built: bool = False


def stored_path(image: Any) -> str | None:
    """The path in an image cell: the file to read, or the name that was stored with the bytes."""
    if isinstance(image, Mapping):
        return image.get("path")
    return image if isinstance(image, str) else None


def read_example(
    row: dict[str, Any],
    origin: Origin,
    place: str,
    columns: dict[str, str] | None = None,
    check: Check | None = None,
) -> dict[str, Any]:
    """Decodes a row.

    Args:
        row: `image` (bytes, a path, or a dict of both), `caption` (a text or a list of texts) and optionally `id`; or
            `WRONG`, what is wrong with a row that has no values.
        origin: Where the row comes from.
        place: What to call the row in an error.
        columns: Role to the column that an error names. Default: the role.
        check: Called with the decoded row.

    Returns:
        `image` decoded, `caption` (one text, or a list of several) and, if the row has this column, `id`: a text, or
        None where it is empty.

    Raises:
        ImageError: if the image cannot be read.
        CaptionError: if there is no caption, or the id is neither a text nor an integer.
        SourceError: if the row names a file outside the folder of its source.
    """
    values = _read_values(row, place, columns)
    example = {**values, "image": load_image(image_of(row["image"], origin, place), where=place)}
    if check is not None:
        check(example, place)
    return example


def _read_values(row: dict[str, Any], place: str, columns: dict[str, str] | None) -> dict[str, Any]:
    if row.get(WRONG) is not None:
        raise CaptionError(f"{place}: {row[WRONG]}")
    roles: dict[str, str] = {role: role for role in ("image", "caption", "id") if role in row}
    if WRONG in row:  # its cells were read when the source was opened
        values: dict[str, Any] = {role: row[role] for role in roles}
    else:
        try:
            values = read_pair(row, roles, columns)
        except ValueError as error:
            raise CaptionError(f"{place}: {error}") from None
    captions = values["caption"]
    values["caption"] = captions[0] if len(captions) == 1 else captions
    return values


def image_of(image: Any, origin: Origin, place: str) -> Any:
    """What `load_image` may decode of an image cell: the one rule about the files that a row may name.

    A file lies in the folder of its source after links are resolved, or among the files that `datasets` listed or
    downloaded itself. A URL in a cell is never fetched.

    Args:
        image: Bytes, a path, or a dict of both; anything else is passed on.
        origin: Where the row comes from.
        place: What to call the row in an error.

    Raises:
        ImageError: if the cell holds a URL, a name that no file can have, or bytes or a path of another type.
        SourceError: if the path leads out of the folder of the source.
    """
    if isinstance(image, ValueError):  # a cell that could not be read
        raise ImageError(f"{place}: the image {image}")
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        if not isinstance(image["bytes"], bytes):
            raise ImageError(f"{place}: the bytes of the image are {quoted(image['bytes'])}; store the file's bytes.")
        return image["bytes"]
    path = stored_path(image)
    if path is None:
        return None if isinstance(image, Mapping) else image
    if not isinstance(path, str):
        raise ImageError(f"{place}: the path of the image is {quoted(path)}; give it a text.")
    if "://" in path:
        if origin.built and _is_listed(path, origin):
            return _fetch(path, place)
        raise ImageError(f"{place}: a URL, which is not downloaded; download the file and give its path.")
    folders = [origin.root] if origin.root is not None else _downloads() if origin.built else []
    if not folders:
        raise SourceError(f"{place}: the row names a file, but this source has no folder; store the image in the row.")
    folders = _downloads() if origin.root is None else [origin.root]
    if not _can_exist(path):
        raise ImageError(f"{place}: no file can have this name; correct the path or remove the row.")
    named = os.path.join(folders[0], path)
    file = next((file for folder in folders if (file := resolve_inside(named, folder)) is not None), None)
    if file is None:
        raise SourceError(f"{place}: the path leads out of {folders[0]}; move the image into the folder.")
    return Path(file)


def _can_exist(path: str) -> bool:
    """Whether the system takes a text as the name of a file: no null character, no lone surrogate."""
    try:
        return "\0" not in path and bool(os.fsencode(path))
    except UnicodeEncodeError:
        return False


def _is_listed(url: str, origin: Origin) -> bool:
    """Whether a URL that `datasets` made for an image folder is of that folder: on the Hub, or in an archive there."""
    member, _, archive = url.rpartition("::")
    if member and not member.startswith("zip://"):
        return False
    if origin.root is not None:
        return bool(member) and "://" not in archive and is_inside(archive, origin.root)
    return archive.startswith(f"hf://datasets/{origin.label}@")


def _downloads() -> list[Path]:
    """The folders that `datasets` downloads the files of the Hub to."""
    folders = (HF_HUB_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.HF_DATASETS_CACHE)
    return [Path(folder) for folder in folders]


def _fetch(url: str, place: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{place}: cannot be fetched ({' '.join(str(error).split())}); check the address.") from error


def check_on_error(on_error: str) -> None:
    """Raises a SourceError if `on_error` is neither "raise" nor "skip"."""
    if on_error not in ("raise", "skip"):
        raise SourceError(f"on_error={quoted(on_error)} is unknown; write 'raise' or 'skip'.")


def report_for(on_error: OnError, report: SkipReport | None, max_skipped: float | None = None) -> SkipReport | None:
    """The report that counts bad rows, or None if they raise.

    Args:
        on_error: "raise" or "skip".
        report: The report to use; a new one by default.
        max_skipped: Share of the rows that a new report lets skip.
    """
    check_on_error(on_error)
    if on_error == "raise":
        return None
    return report or (SkipReport() if max_skipped is None else SkipReport(max_skipped=max_skipped))


def next_good(read: Callable[[int], Example], index: int, count: int, label: str, tally: SourceTally | None) -> Example:
    """The example of a row; or, if bad rows are skipped, of the next good row (cyclically).

    Args:
        read: Returns the example of a row number. A ValueError other than SourceError means a bad row.
        index: The row's number.
        count: The number of rows.
        label: What to call the source in an error.
        tally: Counts the rows read and skipped; None: a bad row raises.
    """
    if tally is None:
        try:
            return read(index)
        except (ImageError, RowError) as error:
            raise or_skip(error) from error
    for step in range(min(count, HOPELESS)):
        number = (index + step) % count
        try:
            example = read(number)
        except SourceError:
            raise
        except ValueError as error:
            tally.bad(error, number)
        else:
            tally.good(number)
            return example
    raise hopeless(label)


def or_skip(error: ImageError | RowError) -> ImageError | RowError:
    """The error with what to do if the row is not needed."""
    return type(error)(f"{error} {OR_SKIP}")


class RowReader:
    """The transform of a map-style source: rows in, examples out.

    Args:
        rows: All rows of the source, undecoded; they replace bad rows.
        origin: Where they come from.
        report: Counts the skipped rows; None: a bad row raises.
        columns: Role to the column that an error names.
        check: Called with each decoded row.
    """

    POSITION = "_row"

    def __init__(
        self,
        rows: datasets.Dataset,
        origin: Origin,
        report: SkipReport | None,
        columns: dict[str, str] | None = None,
        check: Check | None = None,
    ):
        self.rows = rows
        self.origin = origin
        self.tally = None if report is None else report.source(origin.label, len(rows))
        self.columns = columns
        self.check = check

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        columns = {name: column for name, column in batch.items() if name != self.POSITION}
        positions = batch[self.POSITION]
        examples = [
            self.read({name: column[i] for name, column in columns.items()}, position)
            for i, position in enumerate(positions)
        ]
        return {name: [example[name] for example in examples] for name in columns if name != WRONG}

    def texts(self, batch: dict[str, list]) -> dict[str, list]:
        """The transform of rows without their column `image`: captions and ids as with it, no image decoded."""
        rows = [dict(zip(batch, cells, strict=True)) | {"image": None} for cells in zip(*batch.values(), strict=True)]
        try:
            values = [_read_values(row, self.origin.label, self.columns) for row in rows]
        except CaptionError:
            for position in batch[self.POSITION]:
                self.read(self.rows[position], position)  # raises the same, and names the row and its image
            raise
        names = [name for name in batch if name not in (self.POSITION, WRONG)]
        return {name: [each[name] for each in values] for name in names}

    def read(self, row: dict[str, Any], position: int) -> dict[str, Any]:
        """The example at a position; if the row is bad and skipped, the next good one (cyclically)."""

        def example(index: int) -> dict[str, Any]:
            stored = row if index == position else self.rows[index]
            place = place_of(self.origin.label, index, stored["image"])
            return read_example(stored, self.origin, place, self.columns, self.check)

        return next_good(example, position, len(self.rows), self.origin.label, self.tally)


class StreamReader:
    """The last step of a stream: maps a batch of one row to a batch of one example, or to an empty batch.

    Args:
        origins: The sources of the stream; `_origin` in a row is a position in them.
        report: Counts the skipped rows; None: a bad row raises.
        check: Called with each decoded row.
    """

    def __init__(self, origins: list[Origin], report: SkipReport | None, check: Check | None = None):
        self.origins = origins
        self.check = check
        self.tallies = None if report is None else [report.source(origin.label) for origin in origins]
        self.bad = 0  # consecutive bad rows

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        row = {name: column[0] for name, column in batch.items()}
        origin = self.origins[row["_origin"]]
        has_id = row.pop("_has_id")
        try:
            example = read_example(row, origin, row["_place"], check=self.check)
        except (ImageError, RowError) as error:
            if self.tallies is None:
                raise or_skip(error) from error
            self.tallies[row["_origin"]].bad(error)
            self.bad += 1
            if self.bad == HOPELESS:
                raise hopeless(origin.label) from error
            return {"image": [], "caption": []}
        self.bad = 0
        if self.tallies is not None:
            self.tallies[row["_origin"]].good()
        return {name: [value] for name, value in example.items() if name != "id" or has_id}


def place_of(label: str, index: int, image: Any) -> str:
    """The name of a row in errors: its source, its number from 0, and the path of its image."""
    path = stored_path(image)
    return f"{label}, row {index}" + (f" ({printable(path, 200)})" if path else "")


def hopeless(label: str) -> SourceError:
    """The error for a source with too many consecutive bad rows."""
    return SourceError(f"{label}: up to {HOPELESS} consecutive rows could not be read; check the image folder.")


class Rows(Protocol):
    """Anything with a length that is indexed by row number: a list, a `datasets.Dataset`, a mixture."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


__all__ = [
    "HOPELESS",
    "OR_SKIP",
    "WRONG",
    "CaptionError",
    "Check",
    "OnError",
    "Origin",
    "RowError",
    "RowReader",
    "SkipReport",
    "SourceError",
    "StreamReader",
    "check_on_error",
    "hopeless",
    "image_of",
    "next_good",
    "or_skip",
    "place_of",
    "read_example",
    "report_for",
    "stored_path",
]
