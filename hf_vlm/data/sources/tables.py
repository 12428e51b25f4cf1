"""Reads tables of text (JSON, JSON lines, CSV) as they are written: no column is given a type.

- `datasets` guesses a type for a column of such files: `007` becomes 7, a date a timestamp, 9007199254740993 a float.
  Here every cell of CSV is a text, and every cell of JSON keeps its own type. Numbers keep their digits ([`Number`]).
- A row that cannot be read (bad JSON, more cells than the header, not UTF-8) keeps its place, as a row with the one
  column `UNREADABLE`: a bad row like any other, which raises or is skipped.
- `read_table` reads a file row after row. [`WrittenRows`] keeps the rows of files, `stream_tables` streams them.
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from .cells import UNREADABLE, Number, brief, is_utf8
from .errors import SourceError

TABLES = (".json", ".jsonl", ".csv")
PLACE = "_place"
"""The column of a streamed row that names its file and line."""

_FILE_NAME = "file_name"
_CHUNK = 1 << 20
_BLOCK = 10_000
_PEEKED = 100
_SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """A row of a file: the line that it ends on ("line 3"), its cells, and its JSON text (None in CSV)."""

    place: str
    cells: Any
    text: str | None


def read_table(file: str) -> Iterator[Row]:
    """The rows of a JSON, JSON lines or CSV file, in order.

    Args:
        file: A path or a URL of fsspec; may end in a suffix of a compression, as `.jsonl.gz`.

    Raises:
        SourceError: if the file cannot be read from a place on: a list of JSON or a text in quotes without an end.
        SourceError: if the file is damaged, or the header of a CSV file cannot be used.
    """
    path = PurePosixPath(file)
    suffix = path.suffix if path.suffix in TABLES else PurePosixPath(path.stem).suffix
    try:
        with fsspec.open(file, "rb", compression="infer") as binary:
            text = io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="" if suffix == ".csv" else "\n")
            if suffix == ".csv":
                yield from _csv_rows(text, file)
                return
            start = text.read(_CHUNK)
            listed = suffix == ".json" and start.lstrip().startswith("[")
            yield from _json_items(text, start, file) if listed else _json_lines(text, start)
    except (EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{file}: cannot be read ({error}); correct the path, or write the file again.") from error


def _json_lines(text: io.TextIOWrapper, start: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(text, start), 1):
        if line.strip():
            yield _row(f"line {number}", _decode(line), line.strip())


def _lines(text: io.TextIOWrapper, start: str) -> Iterator[str]:
    """The lines of a text of which `start` was read; they end in a line feed only: a text may hold U+2028."""
    lines = start.split("\n")
    rest = lines.pop()
    yield from lines
    if start:
        yield rest + text.readline()
    yield from text


def _json_items(text: io.TextIOWrapper, buffer: str, file: str) -> Iterator[Row]:
    """The rows of a JSON list; what was read is dropped, so that a long list needs little memory."""
    number, at = 0, buffer.index("[") + 1
    while True:
        at = _SPACE.match(buffer, at).end()
        more = text.read(max(_CHUNK, len(buffer) - at)) if len(buffer) - at < _CHUNK else ""
        if more:
            buffer, at = buffer[at:] + more, 0
            continue
        if number and buffer[at : at + 1] == ",":
            at += 1
        elif buffer[at : at + 1] == "]":
            if buffer[at + 1 :].strip() or text.read(_CHUNK).strip():
                raise _lost(file, f"item {number + 1}", "JSON", "there is text after the list")
            return
        elif number:
            reason = "a comma or ] is missing" if buffer[at:] else "the list has no end"
            raise _lost(file, f"item {number + 1}", "JSON", reason)
        number += 1
        while True:
            at = _SPACE.match(buffer, at).end()
            try:
                cells, end = _DECODER.raw_decode(buffer, at)
                break
            except json.JSONDecodeError as error:
                if more := text.read(max(_CHUNK, len(buffer) - at)):
                    buffer, at = buffer[at:] + more, 0
                    continue
                raise _lost(file, f"item {number}", "JSON", error.msg) from None
            except ValueError as error:
                cells, end = _bad_json(f"{error}"), json.JSONDecoder().raw_decode(buffer, at)[1]
                break
            except RecursionError:
                raise _lost(file, f"item {number}", "JSON", "nested too deeply") from None
        yield _row(f"item {number}", cells, buffer[at:end])
        at = end


def _row(place: str, cells: Any, text: str) -> Row:
    if not is_utf8(text):
        cells = {UNREADABLE: _NOT_UTF8}
    elif "\0" in text:
        cells = {UNREADABLE: _ZEROS}
    if isinstance(cells, dict) and UNREADABLE in cells:
        text = json.dumps(cells)
    return Row(place, cells, text)


def _lost(file: str, place: str, kind: str, reason: str) -> SourceError:
    """The error for a file that is damaged from a place on: not one bad row, since all that follow are lost."""
    return SourceError(
        f"{file}, {place}: is not valid {kind} ({reason}), so the rest of the file cannot be read; correct the file."
    )


def _bad_json(reason: str) -> dict[str, str]:
    return {UNREADABLE: f"is not valid JSON ({reason}); correct the file."}


def _decode(text: str) -> Any:
    """The row of a JSON text, or the row that says why it cannot be read."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return _bad_json(f"{error.msg} at character {error.pos + 1}")
    except ValueError as error:
        return _bad_json(f"{error}")
    except RecursionError:
        return _bad_json("nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is written twice")
    return cells


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number)
_NOT_UTF8 = "is not UTF-8 text; save the file as UTF-8."
_ZEROS = "holds zero bytes, as a damaged file does; write the file again."


def _csv_rows(text: io.TextIOWrapper, file: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # longer cells than 131,072 characters are refused by default
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _lost(file, f"line {reader.line_num}", "CSV", f"{error}") from None
        if not cells:
            continue
        if header is None:
            header = _header(cells, file)
            continue
        row: dict[str, Any] = dict(zip(header, cells, strict=False))
        if len(cells) != len(header):
            counts = f"{len(cells)}, not {len(header)}"
            row = {UNREADABLE: f"has more or fewer cells than the header ({counts}); correct the line."}
        elif not is_utf8("".join(cells)):
            row = {UNREADABLE: _NOT_UTF8}
        elif any("\0" in cell for cell in cells):
            row = {UNREADABLE: _ZEROS}
        yield Row(f"line {reader.line_num}", row, None)


def _header(names: list[str], file: str) -> list[str]:
    if not is_utf8("".join(names)):
        raise SourceError(f"{file}, line 1: {_NOT_UTF8}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SourceError(f"{file}, line 1: two columns are called {twice[0]!r}; rename one of them.")
    return names


class WrittenRows:
    """Unchanged rows of JSON and CSV files, by row number, kept as JSON texts in Arrow, which is compact.

    Args:
        table: The rows as JSON in `text`, and in `folder` where the images are that a row of an image folder names.
        names: The names of the columns.
    """

    def __init__(self, table: pa.Table, names: Iterable[str]):
        self._table = table
        self.column_names = list(names)

    @classmethod
    def read(cls, files: Iterable[str], image_folder: Path | None = None) -> "WrittenRows":
        """Reads files that end in .json, .jsonl or .csv.

        Args:
            files: Their paths or URLs.
            image_folder: The image folder whose metadata they are; `image` is then below it.
        """
        blocks = [_SCHEMA.empty_table()]
        names: dict[str, None] = {}
        for file in files:
            rows = read_table(file)
            folder = _below(file, image_folder)
            while block := list(islice(rows, _BLOCK)):
                texts = pa.array([_json_text(row, file) for row in block], pa.large_string())
                blocks.append(pa.table([texts, pa.array([folder] * len(block), pa.string())], _SCHEMA))
                for row in block:
                    if isinstance(row.cells, dict) and UNREADABLE not in row.cells:
                        names.update(dict.fromkeys(row.cells))
        return cls(pa.concat_tables(blocks), names if image_folder is None else _located(names, None))

    @classmethod
    def joined(cls, parts: Iterable["WrittenRows"]) -> "WrittenRows":
        """The rows of all parts, in order."""
        parts = list(parts)
        names = dict.fromkeys(name for part in parts for name in part.column_names)
        return cls(pa.concat_tables([part._table for part in parts]), names)

    def select(self, start: int, stop: int) -> "WrittenRows":
        """The rows from `start` to before `stop`."""
        return WrittenRows(self._table.slice(start, stop - start), self.column_names)

    def unreadable(self) -> str | None:
        """What is wrong with the first row that cannot be read; None if all can."""
        bad = pc.index(pc.starts_with(self._table["text"], f'{{"{UNREADABLE}"'), True).as_py()
        return None if bad < 0 else str(self[bad][UNREADABLE])

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Any:
        row = _DECODER.decode(self._table["text"][index].as_py())
        folder = self._table["folder"][index].as_py()
        return row if folder is None else _located(row, folder)


_SCHEMA = pa.schema({"text": pa.large_string(), "folder": pa.string()})


def _json_text(row: Row, file: str) -> str:
    if isinstance(row.cells, dict) and UNREADABLE in row.cells:
        return json.dumps({UNREADABLE: f"{file}, {row.place}: {row.cells[UNREADABLE]}"})
    return json.dumps(row.cells, ensure_ascii=False) if row.text is None else row.text


def _below(file: str, image_folder: Path | None) -> str | None:
    return None if image_folder is None else str(Path(file).parent.relative_to(image_folder))


def _located(cells: Any, folder: str | None) -> Any:
    """The cells of an image folder's metadata with `image` below the image folder in place of `file_name`."""
    if not isinstance(cells, dict) or _FILE_NAME not in cells:
        return cells
    name = cells[_FILE_NAME]
    image = f"{folder}/{name}" if isinstance(name, str) and folder not in (None, ".") else name
    return {"image": image, **{name: cell for name, cell in cells.items() if name != _FILE_NAME}}


def stream_tables(files: list[str], image_folder: Path | None = None) -> datasets.IterableDataset:
    """The rows of JSON and CSV files as a stream, a shard a file. Each row says its file and line in `PLACE`."""
    kwargs = {"files": files, "image_folder": image_folder}
    return datasets.IterableDataset.from_generator(_placed_rows, gen_kwargs=kwargs)


def _placed_rows(files: list[str], image_folder: Path | None) -> Iterator[dict[str, Any]]:
    for file in files:
        folder = _below(file, image_folder)
        for place, cells, _ in read_table(file):
            if not isinstance(cells, dict):
                cells = {UNREADABLE: f"is {brief(cells)}; write an object."}
            yield {**(cells if folder is None else _located(cells, folder)), PLACE: f"{file}, {place}"}


def first_columns(stream: datasets.IterableDataset) -> list[str]:
    """The columns of the first rows of a stream: all could be known only by reading every row."""
    names: dict[str, None] = {}
    for row in stream.take(_PEEKED):
        names.update(dict.fromkeys(row))
    return [name for name in names if name not in (UNREADABLE, PLACE)]


__all__ = [
    "PLACE",
    "TABLES",
    "Row",
    "WrittenRows",
    "first_columns",
    "read_table",
    "stream_tables",
]
