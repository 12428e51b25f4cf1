"""`load_source`: opens a source as rows of decoded images with captions, or with questions and answers.

`hf_vlm.data.sources.open` reads the formats; `hf_vlm.data.sources.mixing.mix` opens several sources as one.
"""

from functools import partial
from typing import Any, overload

import datasets
import numpy as np
from torch.utils.data import get_worker_info

from .open import DataSource, find_columns, open_rows, undecoded
from .questions import QuestionRows, QuestionSource
from .rows import OnError, Origin, RowReader, SkipReport, StreamReader, report_for, stored_path

# All streams have these columns, whatever their format, so that they can be mixed.
_STREAM = datasets.Features(
    {
        "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "caption": datasets.List(datasets.Value("string")),
        "id": datasets.Value("string"),
        "_origin": datasets.Value("int32"),
        "_place": datasets.Value("string"),
        "_has_id": datasets.Value("bool"),
    }
)


@overload
def load_source(
    source: QuestionSource, on_error: OnError = "raise", report: SkipReport | None = None
) -> QuestionRows: ...


@overload
def load_source(
    source: DataSource, on_error: OnError = "raise", report: SkipReport | None = None
) -> datasets.Dataset | datasets.IterableDataset: ...


def load_source(
    source: DataSource, on_error: OnError = "raise", report: SkipReport | None = None
) -> datasets.Dataset | datasets.IterableDataset | QuestionRows:
    """Opens a source. Images are decoded when their row is accessed.

    Args:
        source: The source.
        on_error: "raise", or "skip": a row with a bad image or caption is skipped and counted. A stream drops the row.
            A map-style source returns the next good row instead, so do not measure quality on data with bad rows.
        report: Counts the skipped rows; a new one by default.

    Returns:
        Rows of `image` (decoded), `caption` (a text or a list of texts) and, if the source has this column, `id`. A
        `QuestionSource` is opened as `QuestionRows`. The files of a stream keep their order in the first epoch, except
        in a mixture (`mix`). `set_epoch` shuffles them in later epochs. There is no shuffle buffer, so `state_dict`
        resumes exactly.

    Raises:
        SourceError: if the source cannot be opened or lacks a column, or a row names a file outside its folder.
        ImageError: on access, with "raise", if an image cannot be read.
        CaptionError: on access, with "raise", if a row has no caption.
    """
    report = report_for(on_error, report)
    if isinstance(source, QuestionSource):
        opened = open_rows(source, as_written=True)
        return QuestionRows(
            opened.rows, f"{source.path}, split {source.split}", opened.origin, find_columns(source, opened), report
        )
    if source.streaming:
        stream, origin = open_stream(source)
        return read_stream(stream, [origin], report)
    opened = open_rows(source)
    return read_rows(opened.rows, opened.origin, find_columns(source, opened), report)


def read_rows(
    rows: datasets.Dataset, origin: Origin, columns: dict[str, str], report: SkipReport | None
) -> datasets.Dataset:
    """Renames the columns of a map-style source to their roles, and decodes its rows on access."""
    rows = rows.select_columns(list(columns.values()))
    rows = rows.rename_columns({name: role for role, name in columns.items() if role != name})
    rows = undecoded(rows)
    kind = rows.features["caption"]
    if isinstance(kind, datasets.ClassLabel):  # class numbers become class names
        names = [kind.int2str(number) for number in rows["caption"]]
        rows = rows.remove_columns("caption").add_column("caption", names)
    reader = RowReader(rows, origin, report)
    return rows.add_column(RowReader.POSITION, np.arange(len(rows))).with_transform(reader)


def open_stream(
    source: DataSource, number: int = 0, seed: int | None = None
) -> tuple[datasets.IterableDataset, Origin]:
    """A stream of undecoded rows, each with its place for error messages.

    Args:
        source: The source.
        number: The source's position in a mixture.
        seed: Shuffles the files of the source; None keeps their order.
    """
    opened = open_rows(source, seed)
    origin, columns = opened.origin, find_columns(source, opened)
    to_row = partial(_stream_row, columns=columns, label=origin.label, number=number)
    rows = undecoded(opened.rows).map(to_row, with_indices=True, features=_STREAM)
    return rows.select_columns(list(_STREAM)), origin


def _stream_row(row: dict[str, Any], index: int, columns: dict[str, str], label: str, number: int) -> dict[str, Any]:
    image, caption = row.get(columns["image"]), row.get(columns["caption"])
    if isinstance(image, str):
        image = {"bytes": None, "path": image}
    elif isinstance(image, bytes):
        image = {"bytes": image, "path": row.get("__key__")}
    row_id = row.get(columns["id"]) if "id" in columns else None
    return {
        "image": image,
        "caption": [caption] if isinstance(caption, str) else caption,
        "id": None if row_id is None else str(row_id),
        "_origin": number,
        "_place": _stream_place(row.get("__url__", label), index, image),
        "_has_id": "id" in columns,
    }


def _stream_place(label: str, index: int, image: Any) -> str:
    """The name of a row's image, or the row's position in its worker: rows of a stream have no global number."""
    if path := stored_path(image):
        return f"{label} ({path})"
    worker = get_worker_info()
    return f"{label}, row {index}" + (f" of worker {worker.id}" if worker else "")


def read_stream(
    stream: datasets.IterableDataset, origins: list[Origin], report: SkipReport | None
) -> datasets.IterableDataset:
    """Decodes the rows of streams that `open_stream` opened."""
    reader = StreamReader(origins, report)
    return stream.map(reader, batched=True, batch_size=1, remove_columns=list(_STREAM))


__all__ = ["load_source", "open_stream", "read_rows", "read_stream"]
