"""Vectors with their captions, thumbnails and metadata in a LanceDB table, in a folder or an object store.

- A write is one commit: a process killed at any moment leaves the table as it was before the write or after it.
- Rows are unique by id; writing an id again replaces its row.
- Up to `APPROXIMATE_FROM` rows a search compares the query with every row. Beyond, it goes through an HNSW graph over
  vectors of 8 bits a number and ranks what that finds anew by the exact vectors. Rows written since the graph was built
  are compared one by one, so they are found at once.
"""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .filters import check_name, literal
from .rows import COLUMNS, Row, arrow_type, to_arrow

TABLE = "items"
RECORD = b"hf_vlm"
KEY = {"lance-schema:unenforced-primary-key": "true"}  # or two processes that write one id at a time would both add it
APPROXIMATE_FROM = 20_000
# The graph takes in new rows when they are more than this part of all: until then they cost less than that work.
UNINDEXED_SHARE = 0.1
MANY_FRAGMENTS = 32
CANDIDATES = 100  # that the graph's search keeps, where nobody says otherwise
REFINE = 2  # times k candidates are compared by their exact vectors
PARTITION_ROWS = 2_000_000  # a graph of more would take too much memory to build
OLD_VERSIONS = timedelta(hours=1)  # for readers that still have an old one open
FRESHNESS = timedelta(seconds=5)  # after which a reader sees what other processes wrote


class VectorTable:
    """A table of vectors; make one with `create` or `open`."""

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
            record: Kept in the table from its first commit on.
            storage_options: Of the object store, as LanceDB names them; by default from the environment.
            replace: Whether to replace an existing table.

        Raises:
            ValueError: if there is one already.
        """
        there = exists(uri, storage_options)
        if there and not replace:
            raise ValueError(f"{uri}: there is an index already; add to it, or replace it.")
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
            ValueError: if there is none.
        """
        found = _open_table(uri, storage_options)
        if found is None:
            raise ValueError(f"{uri}: there is no index here; build one first.")
        table = cls(found, str(uri))
        if RECORD not in (table.schema.metadata or {}):
            raise ValueError(f"{uri}: a LanceDB table that is no index of hf_vlm; name another folder.")
        return table

    @property
    def schema(self) -> pa.Schema:
        """The columns with their types."""
        return self.table.schema

    @property
    def record(self) -> bytes:
        """What `create` was given to keep."""
        return self.schema.metadata[RECORD]

    @property
    def dim(self) -> int:
        """Size of the vectors."""
        return self.schema.field("vector").type.list_size

    def __len__(self) -> int:
        return self.table.count_rows()

    def known(self, ids: Sequence[str]) -> set[str]:
        """Which of these ids the table has."""
        if not ids:
            return set()
        rows = self.table.search().where(id_in(ids)).select(["id"]).limit(len(ids)).to_arrow()
        return set(rows["id"].to_pylist())

    def write(self, rows: Sequence[Row], vectors: np.ndarray) -> tuple[int, int]:
        """Writes rows in one commit; those whose id is there replace the old ones.

        Args:
            rows: With ids unique among them.
            vectors: `(rows, dim)`, of length 1.

        Returns:
            How many rows were new and how many were replaced.

        Raises:
            ValueError: if the vectors are of another size, not finite or not of length 1, an id comes twice, or a
                metadata value does not fit its column.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.shape != (len(rows), self.dim):
            raise ValueError(f"{len(rows)} rows need vectors of shape {(len(rows), self.dim)}, not {vectors.shape}.")
        lengths = np.linalg.norm(vectors, axis=1)
        if bad := [row.id for row, length in zip(rows, lengths, strict=True) if not abs(length - 1) < 1e-3]:
            raise ValueError(f"{bad[0]}: its vector is not of length 1; does the model give numbers that are finite?")
        if len({row.id for row in rows}) < len(rows):
            raise ValueError("An id comes twice among the rows of one write; give each row an id of its own.")
        self._add_columns(rows)
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        result = merge.execute(to_arrow(rows, vectors, self.schema))
        return result.num_inserted_rows, result.num_updated_rows

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
        """Deletes the rows that a condition holds for; returns how many."""
        return self.table.delete(where).num_deleted_rows

    def search(
        self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False, candidates: int = CANDIDATES
    ) -> list[dict[str, Any]]:
        """The nearest rows by cosine, best first.

        Args:
            vector: `(dim,)`.
            k: How many.
            where: A condition in SQL; it is applied before the nearest are chosen.
            exact: Compares every row even where there is a graph.
            candidates: That the graph's search keeps, more finds more; no effect where there is no graph.

        Returns:
            Rows without their vectors, with `score`, the cosine.

        Raises:
            ValueError: if the condition is wrong.
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
            raise ValueError(f"The filter {where!r} does not work: {str(error).splitlines()[0]}") from error
        for row in rows:
            row["score"] = 1 - row.pop("_distance")
        return rows

    def tidy(self, approximate_from: int = APPROXIMATE_FROM) -> None:
        """Merges small files, and builds the graph or takes new rows into it, where that pays.

        Args:
            approximate_from: Rows from which on there is a graph.
        """
        stats = self.table.stats()
        rows, approximate = stats["num_rows"], self.is_approximate
        scattered = stats["fragment_stats"]["num_small_fragments"] > MANY_FRAGMENTS
        if scattered or (approximate and self.unindexed() > UNINDEXED_SHARE * rows):
            self.table.optimize(cleanup_older_than=OLD_VERSIONS)  # which takes new rows into the graph, too
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
        """Whether there is a graph."""
        return self._graph() is not None

    def unindexed(self) -> int:
        """How many rows the graph does not hold yet; all, if there is none."""
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
    """Whether there is a table."""
    return _open_table(uri, storage_options) is not None


def _open_table(uri: str | Path, storage_options: dict[str, str] | None) -> Any:
    if "://" not in str(uri) and not Path(uri).expanduser().is_dir():
        return None  # connecting would make the folder
    try:
        return connect(uri, storage_options).open_table(TABLE)
    except (ValueError, FileNotFoundError) as error:
        if "was not found" in str(error):  # true as well of what a process left that was killed before its first commit
            return None
        raise


def id_in(ids: Sequence[str]) -> str:
    """The condition that an id is one of these."""
    return f"id IN ({', '.join(literal(each) for each in ids)})"


__all__ = ["APPROXIMATE_FROM", "VectorTable", "exists", "id_in"]
