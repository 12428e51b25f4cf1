"""Reads arrow files: one that was cut between two batches of rows lacks the mark of its end, and is refused."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key
from datasets.packaged_modules.arrow.arrow import Arrow

from ...terminal import printable
from .errors import SourceError
from .parquet import DAMAGED, named_files

_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def arrow_builder(files: Mapping[str, list[str]]) -> datasets.DatasetBuilder:
    """The builder of local arrow files, by split.

    Raises:
        SourceError: if a file is damaged or was cut.
    """
    for paths in files.values():
        for path in paths:
            check_arrow(path)
    return ArrowFiles(dataset_name="arrow", hash="hf_vlm", data_files=named_files(files))


def check_arrow(path: str | Path) -> None:
    """Checks that the batches of an arrow file reach to the mark of its end; their rows are not read.

    Raises:
        SourceError: if the file is damaged or was cut.
    """
    try:
        with pa.memory_map(str(path)) as file:
            stream = _open(file)
            if not isinstance(stream, pa.RecordBatchStreamReader):
                return  # the other format ends with a table of its batches, without which it does not open
            for _ in stream:
                pass
            end, size = file.tell(), file.size()
            file.seek(size - len(_STREAM_END))
            is_whole = end == size and file.read() == _STREAM_END
    except DAMAGED as error:
        raise _damaged(path, error) from error
    if not is_whole:
        raise SourceError(f"{path}: the arrow file was cut or damaged after {end} bytes; write it again.")


class ArrowFiles(Arrow):
    """The builder of `datasets`; an error names the file. `_generate_tables` replaces a private method."""

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        for number, path in enumerate(files):
            try:
                with Path(path).open("rb") as file:
                    opened = _open(file)
                    is_stream = isinstance(opened, pa.RecordBatchStreamReader)
                    batches = opened if is_stream else map(opened.get_batch, range(opened.num_record_batches))
                    for part, batch in enumerate(batches):
                        batch.validate(full=True)
                        yield Key(number, part), self._cast_table(pa.Table.from_batches([batch]))
            except DAMAGED as error:
                raise _damaged(path, error) from error


def _open(file: Any) -> Any:
    try:
        return pa.ipc.open_stream(file)
    except (OSError, pa.ArrowInvalid):
        return pa.ipc.open_file(file)


def _damaged(path: str | Path, error: BaseException) -> SourceError:
    return SourceError(f"{path}: is no arrow file, or damaged ({printable(error)}); write it again.")


__all__ = ["ArrowFiles", "arrow_builder", "check_arrow"]
