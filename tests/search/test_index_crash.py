"""Processes killed while they add to an index: it opens, with every row that was acknowledged, and none twice."""

import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest

from hf_vlm.search.store import VectorTable, exists
from scripts.index_add import run, vector_of

KILLS = 20


def kill_one(uri: Path, notes: Path, first: int, seconds: float) -> None:
    """Starts a writer and kills it after a number of seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_vlm.search.store"])
    ready = context.Event()
    process = context.Process(target=run, args=(str(uri), str(notes), first, ready))
    process.start()
    assert ready.wait(60)
    time.sleep(seconds)
    assert process.is_alive()
    process.kill()
    process.join()


def noted(notes: Path) -> dict[str, int]:
    """The last acknowledged version of each row; a last line that was cut is none."""
    if not notes.exists():
        return {}
    lines = notes.read_text().rpartition("\n")[0].splitlines()
    return {row_id: int(version) for row_id, version in (line.split() for line in lines)}


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    uri, notes = tmp_path / "index", tmp_path / "notes"
    moments = random.Random(0)
    graphs = 0
    for number in range(KILLS):
        kill_one(uri, notes, 1000 * number, moments.uniform(0.0, 0.8))
        if not exists(uri):
            assert not noted(notes)
            continue
        table = VectorTable.open(uri)
        rows = (
            table.table.search().select(["id", "version", "vector"]).limit(len(table)).to_list() if noted(notes) else []
        )
        found = {row["id"]: row for row in rows}
        assert len(found) == len(rows)
        for row_id, version in noted(notes).items():
            assert found[row_id]["version"] >= version  # a write that was not acknowledged may be there
            expected = vector_of(row_id, found[row_id]["version"])
            np.testing.assert_allclose(found[row_id]["vector"], expected, atol=1e-6)
        # And it can be searched and written.
        if rows:
            assert table.search(vector_of(rows[0]["id"], rows[0]["version"]), 1)[0]["id"] == rows[0]["id"]
            graphs += table.is_approximate
    assert len(noted(notes)) > 10 * KILLS
    assert graphs > KILLS // 2
