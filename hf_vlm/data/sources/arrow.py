"""Reads arrow files whole: a file that was cut between two batches of rows lacks the mark of its end, and is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets.builder import Key
from datasets.packaged_modules.arrow.arrow import Arrow

from .rows import SourceError

_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")  # of a stream and of a file


def check_arrow(path: str | Path) -> None:
    """Checks that an arrow file has the mark of its end, without which it reads as a shorter one.

    Raises:
        SourceError: if the end is missing.
    """
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        if not file.read().endswith(_ENDS):
            raise SourceError(f"{path}: the arrow file was cut after {size} bytes: its end is missing; write it again.")


class ArrowFiles(Arrow):
    """The builder of `datasets`; an error names the file. `_generate_tables` replaces a private method."""

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        for number, path in enumerate(files):
            try:
                check_arrow(path)
                with Path(path).open("rb") as file:
                    for part, batch in enumerate(_batches(file)):
                        batch.validate(full=True)
                        yield Key(number, part), self._cast_table(pa.Table.from_batches([batch]))
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                raise SourceError(f"{path}: is no arrow file, or damaged ({reason}); write it again.") from error


def _batches(file: Any) -> Iterator[pa.RecordBatch]:
    try:
        stream = pa.ipc.open_stream(file)
    except (OSError, pa.ArrowInvalid):
        whole = pa.ipc.open_file(file)
        return (whole.get_batch(number) for number in range(whole.num_record_batches))
    return iter(stream)


__all__ = ["ArrowFiles", "check_arrow"]
