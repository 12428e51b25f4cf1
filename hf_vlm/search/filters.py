"""Filters on metadata: equality from values, quoted here, or a condition in SQL that the caller answers for."""

import re
from collections.abc import Mapping, Sequence

import pyarrow as pa

Value = str | bool | int | float | None
Where = Mapping[str, Value | Sequence[Value]] | str

NAME = re.compile(r"[^\W\d]\w*")


def literal(value: Value) -> str:
    """A value as SQL writes it.

    Raises:
        ValueError: for a value of another type.
    """
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    raise ValueError(f"A filter compares with text, numbers, true, false or nothing, not with {value!r}.")


def condition(column: str, value: Value | Sequence[Value], schema: pa.Schema) -> str:
    """`column` equals `value`, is one of them (a list), or is empty (None), as SQL.

    Raises:
        ValueError: if there is no such column or the value is of a type that no column has.
    """
    if column not in schema.names:
        raise ValueError(f"There is no column {column!r} to filter on; there are {', '.join(filterable(schema))}.")
    name = f"`{column}`"
    if value is None:
        return f"{name} IS NULL"
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if is_list and None in values:
        raise ValueError(f"The values for column {column!r} hold None; ask for {{{column!r}: None}} alone.")
    literals = ", ".join(literal(each) for each in values)
    if pa.types.is_list(schema.field(column).type):
        return f"array_has_any({name}, [{literals}])" if values else "FALSE"
    if is_list:
        return f"{name} IN ({literals})" if values else "FALSE"
    return f"{name} = {literals}"


def to_sql(where: Where | None, schema: pa.Schema, kind: str | None = None) -> str | None:
    """A filter as SQL.

    Args:
        where: `{"style": "noto", "year": [2020, 2021]}`: all must hold, a list means one of these, a column of lists
            must hold the value, None means empty; values are quoted, so they may come from anybody. Or a condition in
            SQL, which is passed on as it is: never build it from what others wrote.
        schema: Of the table.
        kind: "image", "text" or None for both.

    Returns:
        The condition, or None if everything is wanted.
    """
    if kind not in (None, "image", "text"):
        raise ValueError(f"There is no kind {kind!r}; ask for 'image', 'text' or None for both.")
    parts = [] if kind is None else [f"kind = {literal(kind)}"]
    if isinstance(where, str):
        parts.append(f"({where})")
    else:
        parts += [condition(column, value, schema) for column, value in (where or {}).items()]
    return " AND ".join(parts) or None


def filterable(schema: pa.Schema) -> list[str]:
    """The columns that a filter may name."""
    return [field.name for field in schema if field.name not in ("vector", "thumbnail")]


def check_name(name: str, taken: Sequence[str]) -> None:
    """Refuses the name of a metadata column that would clash or that SQL could not name.

    Raises:
        ValueError: if so.
    """
    if not NAME.fullmatch(name) or name in taken or name.startswith("_"):
        raise ValueError(f"A metadata column cannot be called {name!r}: use letters, digits and _, not {list(taken)}.")


__all__ = ["Where", "check_name", "condition", "filterable", "literal", "to_sql"]
