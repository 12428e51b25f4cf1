"""Turns the cell of a role into a value: the one place that decides what an id, a caption, a question or an answer is.

- A text is taken as it is written. Nothing is stripped, lowercased or given another type.
- An integer is taken as its digits. Other numbers, booleans and dates can be written in several ways: they are refused.
- Bytes are UTF-8 text, or refused. So is a text that cannot be written as UTF-8 (half of a surrogate pair).
- No value is a missing id, which falls back to the caption; a missing caption, question or answer is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ...terminal import quoted

Value = TypeVar("Value")
UNREADABLE = "_unreadable"
"""The only column of a row that its file's reader could not read; its cell says why."""

_HALF = "which has half of a surrogate pair"
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Number:
    """A number of a JSON file as it is written: no digit is lost, and `1e3` differs from `1000`."""

    text: str

    def __repr__(self) -> str:
        return self.text


def brief(cell: Any) -> str:
    """A cell in an error: its type, and the beginning of its value."""
    if cell is None:
        return "no value"
    if isinstance(cell, str):
        return f"the text {quoted(cell)}" if cell.strip() else "an empty text"
    return f"the {'number' if isinstance(cell, Number) else type(cell).__name__} {quoted(cell)}"


def read_text(cell: Any) -> str:
    """The text of a cell that holds one.

    Raises:
        ValueError: if it holds none, or one that is empty; says what it holds.
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError:
            raise ValueError("holds bytes that are not UTF-8 text") from None
    if not isinstance(cell, str) or not cell.strip():
        raise ValueError(f"holds {brief(cell)}")
    if not is_utf8(cell):
        raise ValueError(f"holds {brief(cell)}, {_HALF}")
    return str(cell)


def is_utf8(text: str) -> bool:
    """Whether a text can be written: it has no half of a surrogate pair."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_word(cell: Any) -> str:
    """The text of a cell that holds a text or an integer.

    Raises:
        ValueError: as `read_text`.
    """
    if isinstance(cell, Number) and _INTEGER.fullmatch(cell.text):
        return cell.text
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if cell is None or isinstance(cell, str | bytes):
        return read_text(cell)
    raise ValueError(f"holds {brief(cell)}, which can be written in several ways")


def read_id(cell: Any) -> str | None:
    """The id in a cell: a text, or the digits of an integer. None if there is none, or an empty one.

    Raises:
        ValueError: if it holds another value; says which.
    """
    if cell is None or (isinstance(cell, str | bytes) and not cell.strip()):
        return None
    return read_word(cell)


def read_captions(cell: Any) -> list[str]:
    """The captions in a cell: a text, or a list of texts.

    Raises:
        ValueError: if there is none, or one is empty or not a text; says what it holds.
    """
    said = cell if isinstance(cell, list | tuple) else [cell]
    if not said:
        raise ValueError("holds an empty list")
    return [read_text(text) for text in said]


def read_answers(cell: Any) -> list[str]:
    """The answers in a cell, one per person asked.

    Args:
        cell: A text, an integer, a dict with `answer`, or a list of these.

    Raises:
        ValueError: if there is no answer, or one is empty or of another type; says what is wrong.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("answer")
    said = cell if isinstance(cell, list | tuple) else [cell]
    if not said:
        raise ValueError("holds no answer")
    return [_read_answer(answer) for answer in said]


def _read_answer(answer: Any) -> str:
    if isinstance(answer, Mapping):
        answer = answer.get("answer")
    if answer is None:
        raise ValueError("holds no answer")
    if isinstance(answer, str) and not answer.strip():
        raise ValueError("holds an empty answer")
    return read_word(answer)


def read_image(cell: Any, column: str) -> dict[str, Any] | None:
    """An image cell as stored: `bytes` and `path`, of which one may be None; None for no value.

    Raises:
        ValueError: if it holds something else; says what.
    """
    if isinstance(cell, ValueError):
        raise ValueError(f"column {column!r} {cell}")
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    data = cell.get("bytes") if isinstance(cell, Mapping) else None
    if isinstance(path, bytes):
        path, data = None, path
    if not isinstance(path, str | None) or not isinstance(data, bytes | None):
        raise ValueError(f"column {column!r} holds {brief(cell)}; give it a path or the bytes of an image.")
    if path is not None and not is_utf8(path):
        raise ValueError(f"column {column!r} holds {brief(path)}, {_HALF}; rename the file.")
    return None if cell is None else {"bytes": data, "path": path}


def read_pair(row: Any, columns: Mapping[str, str], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The values of an image-caption row.

    Args:
        row: Column to cell, as its file's reader gives it.
        columns: Role to column, of image, caption and optionally id.
        names: Role to the name of the column in an error. Default: `columns`.

    Returns:
        `image` as stored, `caption` (a list of texts) and, if `columns` names it, `id` (a text or None).

    Raises:
        ValueError: if a cell has no usable value; says which column and what to do.
    """
    check_row(row, columns)
    values: dict[str, Any] = {"image": row.get(columns["image"])}
    for role, (read, wanted) in _READERS.items():
        if role in columns:
            values[role] = read_cell(row.get(columns[role]), read, (names or columns)[role], wanted)
    return values


def read_cell(cell: Any, read: Callable[[Any], Value], name: str, wanted: str) -> Value:
    """The value of a cell.

    Args:
        cell: A cell of the column `name`; a `ValueError` if its file's reader could not read it.
        read: Turns it into a value.
        name: The column in an error.
        wanted: What an error asks for.

    Raises:
        ValueError: if it has no usable value; says which column and what to do.
    """
    if isinstance(cell, ValueError):
        raise ValueError(f"column {name!r} {cell}")
    try:
        return read(cell)
    except ValueError as error:
        raise ValueError(f"column {name!r} {error}; give it {wanted}, or remove the row.") from None


_READERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "caption": (read_captions, "a text or a list of texts"),
    "id": (read_id, "a text or an integer"),
}


def check_row(row: Any, columns: Mapping[str, str]) -> None:
    """Raises a ValueError, which says what to do, if a row is no object or could not be read."""
    if not isinstance(row, Mapping):
        raise ValueError(f"is {brief(row)}; write an object with the columns {', '.join(columns.values())}.")
    if UNREADABLE in row:
        raise ValueError(str(row[UNREADABLE]))


__all__ = [
    "UNREADABLE",
    "Number",
    "brief",
    "check_row",
    "is_utf8",
    "read_answers",
    "read_captions",
    "read_cell",
    "read_id",
    "read_image",
    "read_pair",
    "read_text",
    "read_word",
]
