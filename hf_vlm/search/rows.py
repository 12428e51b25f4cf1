"""A row of an index, and rows as an Arrow table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

COLUMNS = ("id", "kind", "text", "path", "thumbnail", "vector")


@dataclass
class Row:
    """A picture or a text, but for its vector.

    Args:
        id: Unique in the table.
        kind: "image" or "text".
        text: The text, or the caption of a picture.
        path: Where the picture is, if it is in a file.
        thumbnail: A small picture as the bytes of a file.
        metadata: Further columns: text, numbers, true or false, lists of text.
    """

    id: str
    kind: str
    text: str = ""
    path: str | None = None
    thumbnail: bytes | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def arrow_type(name: str, values: Sequence[Any]) -> pa.DataType | None:
    """The type of a metadata column, or None if it is empty.

    Raises:
        ValueError: if its values do not agree or are of no type that can be filtered on.
    """
    try:
        kind = pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"Metadata column {name!r}: {str(error).splitlines()[0]}; give it values of one type."
        ) from None
    if pa.types.is_null(kind):
        return None
    element = kind.value_type if pa.types.is_list(kind) else kind
    allowed = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal)
    if not any(check(element) for check in allowed):
        raise ValueError(f"Metadata column {name!r} holds {kind}; give it text, numbers, dates or lists of text.")
    return kind


def to_arrow(rows: Sequence[Row], vectors: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Rows as a table of a schema.

    Raises:
        ValueError: if a metadata value does not fit its column.
    """
    columns: dict[str, Any] = {name: [vars(row)[name] for row in rows] for name in COLUMNS if name != "vector"}
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    for name in schema.names:
        if name not in COLUMNS:
            columns[name] = [row.metadata.get(name) for row in rows]
    arrays = []
    for each in schema:
        try:
            arrays.append(columns[each.name] if each.name == "vector" else pa.array(columns[each.name], each.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(f"Column {each.name!r} holds {each.type}: {str(error).splitlines()[0]}") from None
    return pa.Table.from_arrays(arrays, schema=schema)


__all__ = ["COLUMNS", "Row", "arrow_type", "to_arrow"]
