"""The image-text rows of a source in stored order, each once, with the bytes of the image's file.

For programs that write data back: the bytes of an image are copied, not decoded and encoded again. Rows are read as a
stream, so nothing is prepared first and an interrupted run resumes at any row.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .images import ImageError
from .load import open_stream
from .open import DataSource
from .rows import WRONG, OnError, Origin, RowError, SkipReport, image_of, read_example, report_for


@dataclass(frozen=True)
class StoredRow:
    """One row of a source.

    Args:
        image: The decoded image.
        file: The bytes of the image's file.
        captions: At least one caption.
        id: The row's id as text, if the source has ids.
        row: The row's number in the source; bad rows count.
    """

    image: Image.Image
    file: bytes
    captions: list[str]
    id: str | None
    row: int


def stored_blocks(
    source: DataSource, block_size: int, start: int = 0, on_error: OnError = "raise", report: SkipReport | None = None
) -> Iterator[list[StoredRow]]:
    """The rows of a source in blocks.

    Args:
        source: What to read; always as a stream, in the order of its files.
        block_size: Rows per block; skipped rows count, so that blocks start at the same rows in every run.
        start: Number of the first block, from 0.
        on_error: `"raise"`, or `"skip"`: bad rows are skipped and counted.
        report: Counts the skipped rows; a new one by default.

    Raises:
        SourceError, ImageError, CaptionError: as `load_source`.
    """
    report = report_for(on_error, report)
    stream, origin = open_stream(replace(source, streaming=True))
    tally = None if report is None else report.source(origin.label)
    block: list[StoredRow] = []
    first = start * block_size
    for row, stored in enumerate(stream.skip(first), start=first):
        try:
            block.append(_read(stored, origin, row))
        except (ImageError, RowError) as error:
            if tally is None:
                raise type(error)(f"{error} Or filter with on_error='skip'.") from error
            tally.bad(error)
        else:
            if tally is not None:
                tally.good()
        if (row + 1) % block_size == 0:
            yield block
            block = []
    if block:
        yield block


def _read(stored: dict, origin: Origin, row: int) -> StoredRow:
    place = stored["_place"]
    example = read_example({name: stored[name] for name in ("image", "caption", "id", WRONG)}, origin, place)
    file = image_of(stored["image"], origin, place)
    if isinstance(file, str | Path):
        file = Path(file).read_bytes()
    elif isinstance(file, Image.Image):
        buffer = io.BytesIO()
        file.save(buffer, format="PNG")
        file = buffer.getvalue()
    captions = [example["caption"]] if isinstance(example["caption"], str) else example["caption"]
    return StoredRow(example["image"], file, captions, example["id"], row)


__all__ = ["StoredRow", "stored_blocks"]
