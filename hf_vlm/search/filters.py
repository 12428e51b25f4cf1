"""Filters on metadata: values to compare with, which are quoted here, or a condition in SQL from a trusted caller."""

import re
from collections.abc import Mapping, Sequence

import pyarrow as pa

Value = str | bool | int | float | None
Where = Mapping[str, Value | Sequence[Value]] | str

NAME = re.compile(r"[^\W\d]\w*")


def literal(value: Value) -> str:
    """A value as an SQL literal.

    Raises:
        ValueError: if the value has an unsupported type.
    """
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    raise ValueError(f"A filter cannot compare with {value!r}; use text, a number, True, False or None.")


def condition(column: str, value: Value | Sequence[Value], schema: pa.Schema) -> str:
    """SQL for: `column` equals `value`, is one of the values (a list), or is empty (None).

    Raises:
        ValueError: if the table has no such column, or the value has an unsupported type.
    """
    if column not in schema.names:
        raise ValueError(f"There is no column {column!r} to filter on; use one of {', '.join(filterable(schema))}.")
    name = f"`{column}`"
    if value is None:
        return f"{name} IS NULL"
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if is_list and None in values:
        raise ValueError(f"The values for column {column!r} include None; filter for {{{column!r}: None}} alone.")
    literals = ", ".join(literal(each) for each in values)
    if pa.types.is_list(schema.field(column).type):
        return f"array_has_any({name}, [{literals}])" if values else "FALSE"
    if is_list:
        return f"{name} IN ({literals})" if values else "FALSE"
    return f"{name} = {literals}"


def to_sql(where: Where | None, schema: pa.Schema, kind: str | None = None) -> str | None:
    """A filter as SQL.

    Args:
        where: `{"style": "noto", "year": [2020, 2021]}`: all conditions must hold. A list means any of its values, a
            column of lists must contain the value, None means empty. Values are quoted, so untrusted values are safe.
            Or a condition in SQL, which is passed on unchanged: never build it from untrusted text.
        schema: Schema of the table.
        kind: "image", "text", or None for both.

    Returns:
        The condition, or None if all rows match.
    """
    if kind not in (None, "image", "text"):
        raise ValueError(f"kind={kind!r} is unknown; use 'image', 'text', or None for both.")
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
    """Checks the name of a metadata column.

    Raises:
        ValueError: if the name is taken or is not an SQL identifier.
    """
    if not NAME.fullmatch(name) or name in taken or name.startswith("_"):
        raise ValueError(
            f"A metadata column cannot be called {name!r}: use letters, digits and _, and none of {list(taken)}."
        )


__all__ = ["Where", "check_name", "condition", "filterable", "literal", "to_sql"]
