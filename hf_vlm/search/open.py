"""The commands of `hf-vlm index`: opening an index and sources, filters, and result sheets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..data.builtin.table import BuiltinOptions, find_builtin
from ..data.sources.images import load_image
from ..data.sources.open import DataSource, is_local, open_rows
from ..data.sources.rows import OnError
from . import AddReport, DatasetItems, EmbeddingIndex, Item, Match, Result, write_sheet
from .filters import condition
from .identity import load_model
from .items import is_dataset, read_items
from .store import exists

KINDS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}


def open_index(uri: str, model: str = "") -> EmbeddingIndex:
    """An existing index, with the model at `model` or, if that is empty, the one it was built with."""
    if not model:
        return EmbeddingIndex.open(uri)
    EmbeddingIndex.open(uri)  # a missing index is reported before a large model is loaded
    return EmbeddingIndex.open(uri, *load_model(model))


def build(
    uri: str, model: str, sources: Sequence[Sequence[Item] | DatasetItems], on_error: OnError, remake: bool
) -> AddReport:
    """Builds an index, or resumes an interrupted build.

    Raises:
        ValueError: if a new index is needed and no model is named.
    """
    if remake or not exists(uri):
        if not model:
            raise ValueError("A new index needs a model: --model FOLDER_OR_HUB_ID.")
        index = EmbeddingIndex.create(uri, *load_model(model), replace=remake)
    else:
        index = open_index(uri, model)
    return add(index, sources, on_error, keep=True)


def add(
    index: EmbeddingIndex, sources: Sequence[Sequence[Item] | DatasetItems], on_error: OnError, keep: bool
) -> AddReport:
    """Adds every source; returns the summed report."""
    total = AddReport()
    for source in sources:
        report = index.add(source, keep=keep, on_error=on_error)
        total = AddReport(
            total.added + report.added,
            total.replaced + report.replaced,
            total.kept + report.kept,
            total.errors + report.errors,
        )
    return total


def open_sources(names: Sequence[str], kind: str, split: str, columns: str) -> list[Sequence[Item] | DatasetItems]:
    """The items of each source: a folder, a file, a saved dataset, `emoji`, or a dataset on the Hub.

    Raises:
        ValueError: if a source cannot be opened.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind {kind} is unknown; use {', '.join(KINDS)}.")
    mapping = dict(item.split("=", 1) for item in columns.split(",")) if columns else None
    return [open_source(name, KINDS[kind], split, mapping) for name in names]


def open_source(
    name: str, kinds: Sequence[str], split: str, columns: dict[str, str] | None
) -> Sequence[Item] | DatasetItems:
    """The items of one source; see `open_sources`."""
    path = Path(name).expanduser()
    if (builtin := find_builtin(name)) is not None:
        if builtin.table is None:
            raise ValueError(f"The built-in dataset {name} cannot be indexed; name another source.")
        return DatasetItems(builtin.table(BuiltinOptions(split)), columns or dict(builtin.columns), kinds, label=name)
    if is_local(name) and "*" not in path.name and not is_dataset(path, columns):
        return read_items(path)
    opened = open_rows(DataSource(name, split=split))
    return DatasetItems(opened.rows, columns, kinds, label=name, origin=opened.origin)


def read_filter(items: Sequence[str], sql: str, schema: pa.Schema) -> dict[str, Any] | str:
    """The filter of a command: `NAME=VALUE` texts, whose values are cast to their column's type, or SQL.

    Raises:
        ValueError: if both are given, a text has no `=` or no such column, or a value does not fit its column.
    """
    if items and sql:
        raise ValueError("--where and --sql are both given: use one of them.")
    where: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--where {item}: write NAME=VALUE, or a condition in SQL after --sql.")
        condition(name, None, schema)  # raises ValueError for an unknown column
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_list(kind) else kind
        try:
            where[name] = pa.scalar(value).cast(kind).as_py()
        except pa.ArrowInvalid as error:
            raise ValueError(f"--where {item}: column {name} holds {kind}; give such a value.") from error
    return sql or where


def write_results(path: Path, uri: str, query: str, image: Path | None, matches: Sequence[Match]) -> Path:
    """Writes the result sheet of one search."""
    shown = None if image is None else load_image(image)
    result = Result(query, [match.hit() for match in matches], shown)
    return write_sheet(path, "Search results", f"{len(matches)} matches in {uri}", [result])


def query_label(text: str | None, image: Path | None, minus: str | None, minus_image: Path | None) -> str:
    """The query in words."""
    wanted = [part for part in (text, None if image is None else f"like {image.name}") if part]
    unwanted = [part for part in (minus, None if minus_image is None else f"like {minus_image.name}") if part]
    return " − ".join([" + ".join(wanted), *unwanted])


__all__ = ["add", "build", "open_index", "open_sources", "query_label", "read_filter", "write_results"]
