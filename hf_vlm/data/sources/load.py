"""`load_source`: opens a source as rows of decoded images with captions, or with questions and answers.

`hf_vlm.data.sources.open` reads the formats; `hf_vlm.data.sources.mixing.mix` opens several sources as one.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import get_worker_info

from .archives import KEY, URL
from .cells import is_utf8, read_image, read_pair
from .open import DataSource, find_columns, open_rows, undecoded, with_text_ids
from .questions import QuestionRows, QuestionSource
from .rows import WRONG, Check, OnError, Origin, RowReader, SkipReport, StreamReader, report_for, stored_path
from .tables import PLACE, WrittenRows

_BLOCK = 10_000
_ORIGINS = (KEY, URL, PLACE)  # columns that say where a row comes from
# The values of image-caption rows, undecoded; `WRONG` says what is wrong with a bad row.
_VALUES = datasets.Features(
    {
        "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "caption": datasets.List(datasets.Value("string")),
        "id": datasets.Value("string"),
        WRONG: datasets.Value("string"),
    }
)
# All streams have these columns, whatever their format, so that they can be mixed.
_STREAM = datasets.Features(
    {
        **_VALUES,
        "_origin": datasets.Value("int32"),
        "_place": datasets.Value("string"),
        "_has_id": datasets.Value("bool"),
    }
)


@overload
def load_source(
    source: QuestionSource,
    on_error: OnError = "raise",
    report: SkipReport | None = None,
    max_skipped: float | None = None,
    check: Check | None = None,
) -> QuestionRows: ...


@overload
def load_source(
    source: DataSource,
    on_error: OnError = "raise",
    report: SkipReport | None = None,
    max_skipped: float | None = None,
    check: Check | None = None,
) -> datasets.Dataset | datasets.IterableDataset: ...


def load_source(
    source: DataSource,
    on_error: OnError = "raise",
    report: SkipReport | None = None,
    max_skipped: float | None = None,
    check: Check | None = None,
) -> datasets.Dataset | datasets.IterableDataset | QuestionRows:
    """Opens a source. Images are decoded when their row is accessed.

    Args:
        source: The source.
        on_error: "raise", or "skip": a row with a bad image or caption is skipped and counted. A stream drops the row.
            A map-style source returns the next good row instead, so do not measure quality on data with bad rows.
        report: Counts the skipped rows; a new one by default.
        max_skipped: Share of the rows that may be skipped, by default half; a report that is given has its own.
        check: Called with each decoded row of captions and its place; a `RowError` makes the row a bad one.

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
    report = report_for(on_error, report, max_skipped)
    return _load(source, report, check, skip=report is not None)


def load_unchecked(source: DataSource) -> datasets.Dataset | datasets.IterableDataset | QuestionRows:
    """Opens a source as `load_source`; a line of a text file that cannot be read raises when its row is accessed."""
    return _load(source, None, None, skip=True)


def _load(source: DataSource, report: SkipReport | None, check: Check | None, skip: bool) -> Any:
    if isinstance(source, QuestionSource):
        opened = open_rows(source, skip=skip)
        return QuestionRows(
            opened.rows, f"{source.path}, split {source.split}", opened.origin, find_columns(source, opened), report
        )
    if source.streaming:
        stream, origin = open_stream(source)
        return read_stream(stream, [origin], report, check)
    opened = open_rows(source, skip=skip)
    columns = find_columns(source, opened)
    if isinstance(opened.rows, WrittenRows):
        rows = _written_pairs(opened.rows, columns)
    else:
        rows = with_text_ids(opened.rows, source, columns).select_columns(list(columns.values()))
        rows = undecoded(rows.rename_columns({name: role for role, name in columns.items() if role != name}))
    reader = RowReader(rows, opened.origin, report, columns, check)
    return rows.add_column(RowReader.POSITION, np.arange(len(rows))).with_transform(reader)


def load_texts(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows that `load_source` opened, without their images: none is read or decoded. A bad caption raises."""
    reader = rows.format["format_kwargs"]["transform"]
    return rows.remove_columns("image").with_transform(reader.texts)


def _written_pairs(rows: WrittenRows, columns: dict[str, str]) -> datasets.Dataset:
    """The values of all rows; those of a bad row are missing, and `WRONG` says why."""
    features = datasets.Features({role: kind for role, kind in _VALUES.items() if role in (*columns, WRONG)})
    schema = features.arrow_schema
    blocks = [schema.empty_table()]
    for start in range(0, len(rows), _BLOCK):
        values = [_values(rows[index], columns) for index in range(start, min(start + _BLOCK, len(rows)))]
        blocks.append(pa.Table.from_pylist(values, schema))
    return datasets.Dataset(pa.concat_tables(blocks), datasets.DatasetInfo(features=features))


def _values(row: Any, columns: dict[str, str]) -> dict[str, Any]:
    """The values of a row as `_VALUES`, with its image undecoded."""
    values: dict[str, Any] = dict.fromkeys(_VALUES)
    try:
        values |= read_pair(row, columns)
        values["image"] = read_image(values["image"], columns["image"])
    except ValueError as error:
        path = stored_path(row.get(columns["image"])) if isinstance(row, Mapping) else None
        named = isinstance(path, str) and is_utf8(path)
        values |= {"image": {"path": path} if named else None, WRONG: str(error)}
    return values


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
    if opened.features is None:
        columns.setdefault("id", "id")  # which the first rows may lack
    rows = undecoded(with_text_ids(opened.rows, source, columns))
    if opened.features is not None:  # what no role names is not decoded
        used = {*columns.values(), *_ORIGINS}
        rows = rows.select_columns([name for name in opened.names if name in used])
    to_row = partial(_stream_row, columns=columns, label=origin.label, number=number)
    return rows.map(to_row, with_indices=True, features=_STREAM).select_columns(list(_STREAM)), origin


def _stream_row(row: dict[str, Any], index: int, columns: dict[str, str], label: str, number: int) -> dict[str, Any]:
    values = _values(row, columns)
    if PLACE in row:
        path = stored_path(values["image"])
        place = row[PLACE] + (f" ({path})" if path else "")
    else:
        place = _stream_place(row.get(URL, label), index, values["image"])
    return {**values, "_origin": number, "_place": place, "_has_id": columns.get("id") in row}


def _stream_place(label: str, index: int, image: Any) -> str:
    """The name of a row: its position in its worker (rows of a stream have no global number), and its image."""
    worker, path = get_worker_info(), stored_path(image)
    return f"{label}, row {index}" + (f" of worker {worker.id}" if worker else "") + (f" ({path})" if path else "")


def read_stream(
    stream: datasets.IterableDataset, origins: list[Origin], report: SkipReport | None, check: Check | None = None
) -> datasets.IterableDataset:
    """Decodes the rows of streams that `open_stream` opened."""
    reader = StreamReader(origins, report, check)
    return stream.map(reader, batched=True, batch_size=1, remove_columns=list(_STREAM))


__all__ = ["load_source", "load_texts", "load_unchecked", "open_stream", "read_stream"]
