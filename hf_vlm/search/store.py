"""Vectors with their captions, thumbnails and metadata in a LanceDB table, in a folder or an object store.

- A write is one commit: a process killed at any moment leaves the table as before the write or as after it.
- Rows are unique by id; writing an id again replaces its row.
- Up to `APPROXIMATE_FROM` rows, a search compares the query with every row. Beyond that it uses an HNSW graph over
  8-bit vectors and re-ranks the candidates by the exact vectors. Rows written since the graph was built are compared
  one by one, so they are found at once.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from .filters import check_name, literal

TABLE = "items"
COLUMNS = ("id", "kind", "text", "path", "thumbnail", "vector")
RECORD = b"hf_vlm"
KEY = {
    "lance-schema:unenforced-primary-key": "true"
}  # without it, two processes that write the same id at once would both add it
APPROXIMATE_FROM = 20_000
# New rows join the graph when they exceed this share of all rows; until then, comparing them one by one is cheaper.
UNINDEXED_SHARE = 0.1
MANY_FRAGMENTS = 32
RETRIES = 20  # of a write that another process's write preceded; half a minute at most
CANDIDATES = 100  # default number of candidates that the graph search keeps
REFINE = 2  # k times this number of candidates are re-ranked by their exact vectors
PARTITION_ROWS = 2_000_000  # building a larger graph would need too much memory
OLD_VERSIONS = timedelta(hours=1)  # kept for readers that still have an old version open
FRESHNESS = timedelta(seconds=5)  # after this time a reader sees the writes of other processes

T = TypeVar("T")


@dataclass
class Row:
    """A row of the table without its vector.

    Args:
        id: Unique id.
        kind: "image" or "text".
        text: The text, or the caption of an image.
        path: Path of an image that is in a file.
        thumbnail: A small image as the bytes of a file.
        metadata: Further columns: text, numbers, booleans, lists of text.
    """

    id: str
    kind: str
    text: str = ""
    path: str | None = None
    thumbnail: bytes | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def arrow_type(name: str, values: Sequence[Any]) -> pa.DataType | None:
    """The Arrow type of a metadata column; None if all its values are empty.

    Raises:
        ValueError: if the values have several types, or a type that cannot be filtered on.
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
    """Rows as an Arrow table with a given schema.

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


class VectorTable:
    """A table of vectors; `create` or `open` one."""

    def __init__(self, table: Any, uri: str):
        self.table = table
        self.uri = uri

    @classmethod
    def create(
        cls,
        uri: str | Path,
        dim: int,
        record: str,
        storage_options: dict[str, str] | None = None,
        replace: bool = False,
    ) -> "VectorTable":
        """A new, empty table.

        Args:
            uri: A folder, or a URI such as `s3://bucket/index`.
            dim: Size of the vectors.
            record: A text that is stored in the table from its first commit on.
            storage_options: Options of the object store, as LanceDB names them; by default from the environment.
            replace: Whether to replace an existing table.

        Raises:
            ValueError: if a table exists and `replace` is False.
        """
        there = exists(uri, storage_options)
        if there and not replace:
            raise ValueError(f"{uri}: an index already exists; add to it or replace it.")
        types = (pa.string(), pa.string(), pa.string(), pa.string(), pa.binary(), pa.list_(pa.float32(), dim))
        fields = [
            pa.field(name, kind, nullable=name in ("path", "thumbnail"), metadata=KEY if name == "id" else None)
            for name, kind in zip(COLUMNS, types, strict=True)
        ]
        schema = pa.schema(fields, metadata={RECORD: record})
        mode = "overwrite" if there else "create"
        return cls(connect(uri, storage_options).create_table(TABLE, schema=schema, mode=mode), str(uri))

    @classmethod
    def open(cls, uri: str | Path, storage_options: dict[str, str] | None = None) -> "VectorTable":
        """An existing table.

        Raises:
            ValueError: if there is no table, or it is not an index.
        """
        found = _open_table(uri, storage_options)
        if found is None:
            raise ValueError(f"{uri}: no index here; build one first.")
        table = cls(found, str(uri))
        if RECORD not in (table.schema.metadata or {}):
            raise ValueError(f"{uri}: a LanceDB table, but not an index of hf_vlm; name another folder.")
        return table

    @property
    def schema(self) -> pa.Schema:
        """The columns with their types."""
        return self.table.schema

    @property
    def record(self) -> bytes:
        """The `record` passed to `create`."""
        return self.schema.metadata[RECORD]

    @property
    def dim(self) -> int:
        """Size of the vectors."""
        return self.schema.field("vector").type.list_size

    def __len__(self) -> int:
        return self.table.count_rows()

    def known(self, ids: Sequence[str]) -> set[str]:
        """The subset of these ids that the table has."""
        if not ids:
            return set()
        rows = self.table.search().where(id_in(ids)).select(["id"]).limit(len(ids)).to_arrow()
        return set(rows["id"].to_pylist())

    def write(self, rows: Sequence[Row], vectors: np.ndarray) -> tuple[int, int]:
        """Writes rows in one commit. A row whose id exists replaces the old one.

        Args:
            rows: Rows with distinct ids.
            vectors: Vectors `(rows, dim)` of length 1.

        Returns:
            The numbers of new and of replaced rows.

        Raises:
            ValueError: if vectors have a wrong shape, are not finite or not of length 1, an id appears twice, or a
                metadata value does not fit its column.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.shape != (len(rows), self.dim):
            raise ValueError(f"{len(rows)} rows need vectors of shape {(len(rows), self.dim)}, not {vectors.shape}.")
        lengths = np.linalg.norm(vectors, axis=1)
        if bad := [row.id for row, length in zip(rows, lengths, strict=True) if not abs(length - 1) < 1e-3]:
            raise ValueError(f"{bad[0]}: the vector does not have length 1; check that the model's outputs are finite.")
        if len({row.id for row in rows}) < len(rows):
            raise ValueError("An id appears twice among the rows of one write; give each row its own id.")

        def merge() -> tuple[int, int]:
            self._add_columns(rows)
            merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            result = merge.execute(to_arrow(rows, vectors, self.schema))
            return result.num_inserted_rows, result.num_updated_rows

        return self._retry(merge)

    def _retry(self, write: Callable[[], T]) -> T:
        """Writes, again from the newest version whenever another process has written meanwhile."""
        for attempt in range(RETRIES):
            try:
                return write()
            except (RuntimeError, OSError, ValueError) as error:
                if not is_conflict(error) or attempt == RETRIES - 1:
                    raise
                time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))  # so that writers take turns
                self.table.checkout_latest()
        raise AssertionError("unreachable")

    def _add_columns(self, rows: Sequence[Row]) -> None:
        values: dict[str, list] = {}
        old = set(self.schema.names) - set(COLUMNS)
        for row in rows:
            for name in row.metadata.keys() - old:
                values.setdefault(name, []).append(row.metadata[name])
        fields = []
        for name, column in sorted(values.items()):
            check_name(name, COLUMNS)
            if (kind := arrow_type(name, column)) is not None:
                fields.append(pa.field(name, kind))
        if fields:
            self.table.add_columns(pa.schema(fields))

    def delete(self, where: str) -> int:
        """Deletes the rows that match a condition; returns their number."""
        return self._retry(lambda: self.table.delete(where).num_deleted_rows)

    def search(
        self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False, candidates: int = CANDIDATES
    ) -> list[dict[str, Any]]:
        """The nearest rows by cosine, best first.

        Args:
            vector: Query `(dim,)`.
            k: Number of rows.
            where: A condition in SQL, applied before the search.
            exact: Compare with every row, also if there is a graph.
            candidates: Candidates kept by the approximate search; higher is more accurate and slower.

        Returns:
            Rows without their vectors, with the cosine as `score`.

        Raises:
            ValueError: if the condition is invalid.
        """
        names = [name for name in self.schema.names if name != "vector"]
        query = self.table.search(np.asarray(vector, dtype=np.float32), vector_column_name="vector")
        query = query.distance_type("cosine").limit(k).select([*names, "_distance"])
        query = query.bypass_vector_index() if exact else query.ef(max(candidates, REFINE * k)).refine_factor(REFINE)
        if where is not None:
            query = query.where(where, prefilter=True)
        try:
            rows = query.to_list()
        except (ValueError, RuntimeError) as error:
            if where is None:
                raise
            raise ValueError(f"The filter {where!r} is invalid: {str(error).splitlines()[0]}") from error
        for row in rows:
            row["score"] = 1 - row.pop("_distance")
        return rows

    def tidy(self, approximate_from: int = APPROXIMATE_FROM) -> None:
        """Merges small files, and builds the graph or adds new rows to it, when that pays off.

        Left to the next writer if another process writes meanwhile: searches find all rows without it.

        Args:
            approximate_from: Number of rows from which on a graph is built.
        """
        try:
            self._tidy(approximate_from)
        except (RuntimeError, OSError, ValueError) as error:
            if not is_conflict(error):
                raise
            self.table.checkout_latest()

    def _tidy(self, approximate_from: int) -> None:
        stats = self.table.stats()
        rows, approximate = stats["num_rows"], self.is_approximate
        scattered = stats["fragment_stats"]["num_small_fragments"] > MANY_FRAGMENTS
        if scattered or (approximate and self.unindexed() > UNINDEXED_SHARE * rows):
            self.table.optimize(cleanup_older_than=OLD_VERSIONS)  # adds new rows to the graph, too
        if rows >= approximate_from and not approximate:
            self._build_graph(rows)

    def _build_graph(self, num_rows: int) -> None:
        from lancedb.index import Bitmap, BTree, HnswSq

        partitions = max(1, num_rows // PARTITION_ROWS)
        self.table.create_index("id", config=BTree())
        self.table.create_index("kind", config=Bitmap())
        graph = HnswSq(distance_type="cosine", num_partitions=partitions, m=16, ef_construction=100)
        self.table.create_index("vector", config=graph)

    @property
    def is_approximate(self) -> bool:
        """Whether the table has a graph."""
        return self._graph() is not None

    def unindexed(self) -> int:
        """Number of rows that are not in the graph; all rows if there is no graph."""
        name = self._graph()
        return len(self) if name is None else self.table.index_stats(name).num_unindexed_rows

    def _graph(self) -> str | None:
        return next((index.name for index in self.table.list_indices() if index.columns == ["vector"]), None)

    def num_bytes(self) -> int:
        """Size of the table's files."""
        return self.table.stats()["total_bytes"]


def connect(uri: str | Path, storage_options: dict[str, str] | None = None) -> Any:
    """A LanceDB connection.

    Raises:
        ModuleNotFoundError: if LanceDB is not installed.
    """
    try:
        import lancedb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('The index needs LanceDB: pip install "hf-vlm[search]"') from error
    return lancedb.connect(str(uri), read_consistency_interval=FRESHNESS, storage_options=storage_options)


def exists(uri: str | Path, storage_options: dict[str, str] | None = None) -> bool:
    """Whether a table exists."""
    return _open_table(uri, storage_options) is not None


def _open_table(uri: str | Path, storage_options: dict[str, str] | None) -> Any:
    if "://" not in str(uri) and not Path(uri).expanduser().is_dir():
        return None  # connecting would create the folder
    try:
        return connect(uri, storage_options).open_table(TABLE)
    except (ValueError, FileNotFoundError) as error:
        if "was not found" in str(error):  # also after a process was killed before its first commit
            return None
        raise


def is_conflict(error: Exception) -> bool:
    """Whether a write failed because another process wrote to the table at the same time."""
    text = str(error).lower()
    return "commit conflict" in text or "concurrent" in text


def id_in(ids: Sequence[str]) -> str:
    """SQL for: the id is one of these."""
    return f"id IN ({', '.join(literal(each) for each in ids)})"


__all__ = ["APPROXIMATE_FROM", "CANDIDATES", "COLUMNS", "Row", "VectorTable", "exists", "id_in"]
