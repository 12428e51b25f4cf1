"""From a stored row to an example: image decoded, caption checked; a bad row raises, or is left out and counted.

- Images are decoded when a row is asked for, so opening a source reads no image.
- A file named by a row must lie in the folder of its source: data cannot make us read other files.
- Left out, map-style: the next good row of the same source stands in, so that the length, the order and a resumed run
  stay what they were. Left out of a stream: the row is not there.
"""

import logging
import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import datasets
import fsspec

from .images import ImageError, load_image

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
Example = TypeVar("Example")

# So many bad rows in succession are no accident but a missing folder.
HOPELESS = 1000


class SourceError(ValueError):
    """A data source cannot be used as it is described; one line that says what to write instead."""


class CaptionError(ValueError):
    """A row has no usable caption; one line with its place."""


@dataclass(frozen=True)
class Origin:
    """Where rows come from, and which files they may name.

    Args:
        label: What to call the source in an error.
        root: The folder that paths in rows start from and must not leave; None: rows must carry their images.
        built: Whether `datasets` made the paths itself from an image folder, possibly on the Hub or in an archive.
    """

    label: str
    root: Path | None
    built: bool = False


class SkipReport:
    """Counts the rows that `on_error="skip"` left out, over all workers of this process.

    Worker processes have memory of their own, so every bad row is a line in a temporary file. The first is logged as a
    warning at once, the sum when `log` is called (at the end of an epoch, say) and when the report is dropped or the
    program ends.

    Args:
        shown: How many places the summary names.
    """

    def __init__(self, shown: int = 5):
        handle, path = tempfile.mkstemp(prefix="hf_vlm_skipped_")
        os.close(handle)
        self.path = Path(path)
        self.shown = shown
        self._at_exit = weakref.finalize(self, _close, self.path, shown, os.getpid())

    def __getstate__(self) -> dict:
        return {"path": self.path, "shown": self.shown}  # a copy in a worker writes to the file and does not remove it

    def __deepcopy__(self, memo: dict) -> "SkipReport":
        return self  # datasets copies its transforms: all copies count together

    def add(self, error: ValueError) -> None:
        """Counts a bad row; the error begins with its place."""
        if self.path.stat().st_size == 0:
            logger.warning("Left out: %s More like it are counted and summed up at the end.", str(error))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{error}\n")

    @property
    def errors(self) -> list[str]:
        """The errors of the rows left out, each row once however many passes met it."""
        return _lines(self.path)

    @property
    def count(self) -> int:
        """How many rows were left out."""
        return len(self.errors)

    def log(self) -> None:
        """Logs one warning with the count and the first places; nothing if no row was left out."""
        _log(self.path, self.shown)


def _lines(path: Path) -> list[str]:
    return sorted(set(path.read_text(encoding="utf-8").splitlines()))


def _log(path: Path, shown: int) -> None:
    if errors := _lines(path):
        more = f" and {len(errors) - shown} more" if len(errors) > shown else ""
        logger.warning("Left out %d bad rows: %s%s", len(errors), " | ".join(errors[:shown]), more)


def _close(path: Path, shown: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits this finalizer
        _log(path, shown)
        path.unlink()


def stored_path(image: Any) -> str | None:
    """The path in an image cell: of the file to read, or only the name under which bytes were stored."""
    if isinstance(image, dict):
        return image.get("path")
    return image if isinstance(image, str) else None


def read_example(row: dict[str, Any], origin: Origin, place: str) -> dict[str, Any]:
    """Decodes a row.

    Args:
        row: `image` (bytes, a path, or a dict of both), `caption` (a text or a list of texts) and optionally `id`.
        origin: Where the row comes from.
        place: What to call the row in an error.

    Returns:
        `image` decoded, `caption` (one text, or a list of several) and, if the row has one, `id`; an empty id is
        replaced by the caption, so that equal captions are positives of each other.

    Raises:
        ImageError: if the image cannot be read.
        CaptionError: if there is no caption.
        SourceError: if the row names a file that it must not name.
    """
    image = load_image(image_of(row["image"], origin, place), where=place)
    captions = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
    if not isinstance(captions, list) or not all(isinstance(text, str) and text.strip() for text in captions or [None]):
        raise CaptionError(f"{place}: the caption is {row['caption']!r}; give it a text or a list of texts.")
    example = {"image": image, "caption": captions[0] if len(captions) == 1 else captions}
    if "id" in row:
        example["id"] = captions[0] if row["id"] is None else row["id"]
    return example


def image_of(image: Any, origin: Origin, place: str) -> Any:
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    path = stored_path(image)
    if path is None:
        return None if isinstance(image, dict) else image
    if origin.built and "://" in path:
        return _fetch(path, place)
    if origin.root is None and origin.built:
        return path
    if origin.root is None:
        raise SourceError(f"{place}: the row names a file, which is not read from here; store the image in the row.")
    file = Path(os.path.realpath(origin.root / path)) if "\0" not in path else None
    if file is None or not file.is_relative_to(os.path.realpath(origin.root)):
        raise SourceError(f"{place}: the path leads out of {origin.root} and is not read; put the image in there.")
    return file


def _fetch(url: str, place: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{place}: cannot be fetched ({' '.join(str(error).split())}); is it still there?") from error


def report_for(on_error: OnError, report: SkipReport | None) -> SkipReport | None:
    """The report that counts bad rows, or None if they raise."""
    if on_error not in ("raise", "skip"):
        raise SourceError(f"on_error={on_error!r} is unknown; write 'raise' or 'skip'.")
    return (report or SkipReport()) if on_error == "skip" else None


def next_good(read: Callable[[int], Example], index: int, count: int, label: str, report: SkipReport | None) -> Example:
    """The example of a row; or, if bad rows are skipped, of the next good row (cyclically).

    Args:
        read: Makes the example of a row number; a ValueError that is no SourceError means a bad row.
        index: The row's number.
        count: The number of rows.
        label: What to call the source in an error.
        report: Counts the rows skipped; None: a bad row raises.
    """
    if report is None:
        try:
            return read(index)
        except (ImageError, CaptionError) as error:
            raise type(error)(f"{error} Or load the source with on_error='skip'.") from error
    for step in range(min(count, HOPELESS)):
        try:
            return read((index + step) % count)
        except SourceError:
            raise
        except ValueError as error:
            report.add(error)
    raise hopeless(label)


class RowReader:
    """The transform of a map-style source: rows in, examples out.

    Args:
        rows: All rows of the source, undecoded, from which a stand-in is taken.
        origin: Where they come from.
        report: Counts the rows left out; None: a bad row raises.
    """

    POSITION = "_row"

    def __init__(self, rows: datasets.Dataset, origin: Origin, report: SkipReport | None):
        self.rows = rows
        self.origin = origin
        self.report = report

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        columns = {name: column for name, column in batch.items() if name != self.POSITION}
        positions = batch[self.POSITION]
        examples = [
            self.read({name: column[i] for name, column in columns.items()}, position)
            for i, position in enumerate(positions)
        ]
        return {name: [example[name] for example in examples] for name in columns}

    def read(self, row: dict[str, Any], position: int) -> dict[str, Any]:
        """The example at a position of the source, or, where bad rows are left out, the next good one (cyclically)."""

        def example(index: int) -> dict[str, Any]:
            stored = row if index == position else self.rows[index]
            return read_example(stored, self.origin, place_of(self.origin.label, index, stored["image"]))

        return next_good(example, position, len(self.rows), self.origin.label, self.report)


class StreamReader:
    """The last step of a stream: a batch of one row in, a batch of one example or none out.

    Args:
        origins: The sources of the stream; `_origin` in a row is a position in them.
        report: Counts the rows left out; None: a bad row raises.
    """

    def __init__(self, origins: list[Origin], report: SkipReport | None):
        self.origins = origins
        self.report = report
        self.bad = 0  # in succession

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        row = {name: column[0] for name, column in batch.items()}
        origin = self.origins[row["_origin"]]
        has_id = row.pop("_has_id")
        try:
            example = read_example(row, origin, row["_place"])
        except (ImageError, CaptionError) as error:
            _leave_out(error, self.report)
            self.bad += 1
            if self.bad == HOPELESS:
                raise hopeless(origin.label) from error
            return {"image": [], "caption": []}
        self.bad = 0
        return {name: [value] for name, value in example.items() if name != "id" or has_id}


def place_of(label: str, index: int, image: Any) -> str:
    """What to call a row in an error: its source, its number counted from 0, and the path stored in it."""
    path = stored_path(image)
    return f"{label}, row {index}" + (f" ({path})" if path else "")


def _leave_out(error: ImageError | CaptionError, report: SkipReport | None) -> None:
    if report is None:
        raise type(error)(f"{error} Or load the source with on_error='skip'.") from error
    report.add(error)


def hopeless(label: str) -> SourceError:
    """The error for a source in which row after row is bad."""
    return SourceError(f"{label}: no good row among up to {HOPELESS} in succession; are the images in their place?")


class Rows(Protocol):
    """What is read by row number: a list, a `datasets.Dataset`, a mixture."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


__all__ = [
    "HOPELESS",
    "CaptionError",
    "OnError",
    "Origin",
    "RowReader",
    "SkipReport",
    "SourceError",
    "StreamReader",
    "hopeless",
    "image_of",
    "next_good",
    "place_of",
    "read_example",
    "report_for",
    "stored_path",
]
