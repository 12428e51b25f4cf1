"""Reads parquet files whose columns differ: what one file has more or less than another is no obstacle.

- `datasets` gives all files the types of the first: a further column ends the run, a number may become a text. Here
  a column that a file lacks has no values there, and a column that no role names may have any type.
- A column that a role names and that has two types is refused when the source is opened, with the names of both files.
- A file without rows is left out; a damaged one is refused with its name.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.table import table_cast

from .rows import SourceError

_BATCH = 1000
# What pyarrow raises for damaged files; a size that was changed asks for more memory than there is.
DAMAGED = (pa.ArrowException, OSError, ValueError, MemoryError)
_NOTHING = datasets.Value("null")


def parquet_builder(files: Mapping[str, list[str]], wanted: Collection[str]) -> datasets.DatasetBuilder:
    """The builder of local parquet files.

    Args:
        files: Split to paths.
        wanted: Columns that roles name; each must have one type in all files.

    Raises:
        SourceError: if a file is damaged, a wanted column has several types, or there are no rows.
    """
    features: dict[str, Any] = {}
    seen: dict[str, str] = {}
    kept: dict[str, list[str]] = {}
    for split, paths in files.items():
        for path in paths:
            schema = _schema(path)
            if schema is None:
                continue
            kept.setdefault(split, []).append(path)
            for name, kind in datasets.Features.from_arrow_schema(schema).items():
                other = features.setdefault(name, kind)
                if other == _NOTHING:
                    features[name], seen[name] = kind, path
                elif kind not in (other, _NOTHING):
                    if name in wanted:
                        raise SourceError(
                            f"{path}: the column {name!r} holds {_type(kind)}, but {_type(other)} in {seen[name]}; "
                            "write all files with one type."
                        )
                    features[name] = None
                seen.setdefault(name, path)
    if not kept:
        raise SourceError(f"{next(iter(files.values()))[0]}: has no rows; write the file again.")
    known = {name: kind for name, kind in features.items() if kind is not None}
    return ParquetFiles(
        dataset_name="parquet", hash="hf_vlm", data_files=named_files(kept), features=datasets.Features(known)
    )


def named_files(files: Mapping[str, list[str]]) -> DataFilesDict:
    """Files as `datasets` takes them: by their names, which are no patterns, and anew when a file has changed."""

    def state(path: str) -> tuple[str, str]:
        found = os.stat(path)
        return f"{found.st_mtime_ns}", f"{found.st_size}"

    return DataFilesDict({split: DataFilesList(paths, [*map(state, paths)]) for split, paths in files.items()})


def _schema(path: str) -> pa.Schema | None:
    """The schema of a file; None if it has no rows."""
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow if file.metadata.num_rows else None
    except DAMAGED as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> SourceError:
    return SourceError(f"{path}: is no parquet file, or damaged ({error}); write or download it again.")


def _type(kind: Any) -> str:
    return kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__


class ParquetFiles(Parquet):
    """The builder of `datasets` with columns that some files may lack.

    `_generate_tables` and `_cast_table` replace private methods of `datasets`.
    """

    def _generate_tables(self, files: list[str], row_groups_list: list[Any]) -> Iterator[tuple[Key, pa.Table]]:
        for number, (path, groups) in enumerate(zip(files, row_groups_list, strict=True)):
            try:
                with pq.ParquetFile(path) as file:
                    names = [name for name in file.schema_arrow.names if name in self.info.features]
                    batches = file.iter_batches(_BATCH, None if groups is None else list(groups), names)
                    for part, batch in enumerate(batches):
                        batch.validate(full=True)  # a text that is not UTF-8 would end the run later, without a name
                        yield Key(number, part), self._cast_table(pa.Table.from_batches([batch]))
            except DAMAGED as error:
                raise _damaged(path, error) from error

    def _cast_table(self, pa_table: pa.Table) -> pa.Table:
        schema = self.info.features.arrow_schema
        columns = [
            pa_table[field.name] if field.name in pa_table.column_names else pa.nulls(len(pa_table), field.type)
            for field in schema
        ]
        return table_cast(pa.table(columns, names=schema.names), schema)


__all__ = ["DAMAGED", "ParquetFiles", "named_files", "parquet_builder"]
