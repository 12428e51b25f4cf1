"""Several writers of one index at the same time: no error once rows are written, and no row lost."""

import threading
from pathlib import Path

import numpy as np
import pytest

from hf_vlm.search.store import Row, VectorTable
from scripts.index_add import DIM, vector_of

CONFLICT = (
    "lance error: Retryable commit conflict for version 2: This Merge transaction was preempted by concurrent "
    "transaction Merge at version 2. Please retry."
)


def write(table: VectorTable, writer: int, version: int) -> None:
    """Writes six rows, two of them of the version before, with a column of the writer's own."""
    ids = [f"{writer}-{4 * version + i}" for i in range(6)]
    rows = [Row(each, "text", each, metadata={"version": version, f"of_{writer}": version}) for each in ids]
    table.write(rows, np.stack([vector_of(each, version) for each in ids]))


def test_three_writers_at_once(tmp_path: Path) -> None:
    """Each opens the table, adds a column, writes ten times and tidies up."""
    VectorTable.create(tmp_path / "index", DIM, "{}")
    errors: list[Exception] = []

    def work(writer: int) -> None:
        try:
            table = VectorTable.open(tmp_path / "index")
            for version in range(10):
                write(table, writer, version)
                table.tidy(60)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    table = VectorTable.open(tmp_path / "index")
    assert len(table) == 3 * (4 * 10 + 2)
    assert {"version", "of_0", "of_1", "of_2"} <= set(table.schema.names)
    assert table.search(vector_of("1-41", 9), 1, exact=True)[0]["id"] == "1-41"


def test_tidying_up_is_left_to_the_next_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = VectorTable.create(tmp_path / "index", DIM, "{}")
    write(table, 0, 0)

    def preempted(*args, **kwargs):
        raise RuntimeError(CONFLICT)

    monkeypatch.setattr(table, "_build_graph", preempted)
    table.tidy(1)
    assert not table.is_approximate
    monkeypatch.undo()
    table.tidy(1)
    assert table.is_approximate


def test_a_write_that_never_succeeds_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, tries = VectorTable.create(tmp_path / "index", DIM, "{}"), []
    monkeypatch.setattr("hf_vlm.search.store.time.sleep", lambda seconds: None)

    def preempted(rows):
        tries.append(rows)
        raise RuntimeError(CONFLICT)

    monkeypatch.setattr(table, "_add_columns", preempted)
    with pytest.raises(RuntimeError, match="commit conflict"):
        write(table, 0, 0)
    assert len(tries) == 20

    def broken(rows):
        tries.append(rows)
        raise RuntimeError("lance error: not enough memory")

    monkeypatch.setattr(table, "_add_columns", broken)
    with pytest.raises(RuntimeError, match="not enough memory"):
        write(table, 0, 0)
    assert len(tries) == 21
