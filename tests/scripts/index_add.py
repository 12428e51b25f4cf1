"""Adds to an index until it is killed, and notes what it was told is safe."""

import os
from multiprocessing.synchronize import Event

import numpy as np

from hf_vlm.search.store import Row, VectorTable, connect, exists

DIM, ROWS, GRAPH_FROM = 8, 6, 120


def vector_of(row_id: str, version: int) -> np.ndarray:
    """The vector of a version of a row, of length 1."""
    vector = np.random.default_rng([*row_id.encode(), version]).standard_normal(DIM)
    return vector / np.linalg.norm(vector)


def run(uri: str, notes: str, first: int, ready: Event) -> None:
    """Writes six rows at a time, two of them again, tidies up, and notes `id version` of each row."""
    connect(uri)  # which imports LanceDB, the slow part
    ready.set()
    table = VectorTable.open(uri) if exists(uri) else VectorTable.create(uri, DIM, "{}")
    file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for version in range(first, first + 1_000_000):
        ids = [str(4 * version + i) for i in range(ROWS)]
        rows = [Row(each, "text", each, metadata={"version": version}) for each in ids]
        table.write(rows, np.stack([vector_of(each, version) for each in ids]))
        os.write(file, "".join(f"{each} {version}\n" for each in ids).encode())
        table.tidy(GRAPH_FROM)
