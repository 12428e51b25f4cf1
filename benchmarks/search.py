"""Search among many embeddings: the index's graph against exhaustive search, in one run on one machine.

    python benchmarks/search.py
    python benchmarks/search.py --rows 20000 --output benchmarks/results/search.json

The vectors are synthetic and seeded. Like image embeddings, they lie in a cone (a common mean) around 2,000 topics of
different weight. Around their topic they vary mostly along a few directions (variance 1 / rank). Queries come from the
same distribution and are not in the index. Uniform random vectors would be unrealistically hard: in 512 dimensions all
of them are about equally far from a query. Exact search is measured too: one matrix product by numpy and by
PyTorch with the vectors in memory, and the index without its graph.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Spread, environment, positive, table, write_json

from hf_vlm.search.store import Row, VectorTable

TOPICS = 2000
GOAL_RECALL, GOAL_MILLISECONDS = 0.95, 10.0
CANDIDATES = (50, 100, 200)
DEFAULT_CANDIDATES = 100
WRITE_ROWS = 10_000
PACKAGES = ("hf-vlm", "lancedb", "pyarrow", "numpy")

Search = Callable[[np.ndarray], list[str]]


def make_vectors(rows: int, queries: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `(rows, dim)` and queries `(queries, dim)` of length 1; see the top of this file."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    topics = rng.standard_normal((TOPICS, dim), dtype=np.float32) * spectrum
    weights = rng.dirichlet(np.ones(TOPICS))
    mean = np.full(dim, dim**-0.5, dtype=np.float32)
    around = rng.standard_normal((rows + queries, dim), dtype=np.float32) * spectrum
    vectors = mean + (topics[rng.choice(TOPICS, rows + queries, p=weights)] + around) @ basis
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:rows], vectors[rows:]


def fill(uri: str, vectors: np.ndarray) -> tuple[VectorTable, float]:
    """A table of the vectors without a graph, and the seconds that writing it took."""
    start = time.perf_counter()
    index = VectorTable.create(uri, vectors.shape[1], "{}")
    for first in range(0, len(vectors), WRITE_ROWS):
        part = vectors[first : first + WRITE_ROWS]
        rows = [Row(str(first + i), ("image", "text")[i % 2], f"caption {first + i}") for i in range(len(part))]
        index.write(rows, part)
    return index, time.perf_counter() - start


def measure(search: Search, queries: np.ndarray, truth: list[set[str]]) -> dict[str, Any]:
    """Milliseconds per query, one query at a time after a warm-up, and recall at k."""
    for query in queries[:5]:
        search(query)
    times, found = [], 0
    for query, expected in zip(queries, truth, strict=True):
        start = time.perf_counter()
        ids = search(query)
        times.append(1e3 * (time.perf_counter() - start))
        found += len(expected & set(ids))
    return {"recall": found / sum(map(len, truth)), "milliseconds": vars(Spread.of(times))}


def exact_ids(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[set[str]]:
    """The true nearest neighbours of each query, in float64."""
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    return [set(map(str, row)) for row in np.argpartition(-scores, k, axis=1)[:, :k]]


def contenders(index: VectorTable, vectors: np.ndarray, k: int) -> dict[str, Search]:
    """The exact searches."""
    tensor = torch.from_numpy(vectors)

    def by_numpy(query: np.ndarray) -> list[str]:
        scores = vectors @ query
        best = np.argpartition(-scores, k)[:k]
        return [str(row) for row in best[np.argsort(-scores[best])]]

    def by_torch(query: np.ndarray) -> list[str]:
        return [str(row) for row in (tensor @ torch.from_numpy(query)).topk(k).indices.tolist()]

    def by_index(query: np.ndarray) -> list[str]:
        return [row["id"] for row in index.search(query, k, exact=True)]

    return {"numpy, in memory": by_numpy, "torch, in memory": by_torch, "index, every row": by_index}


def approximate(index: VectorTable, k: int, candidates: int, where: str | None = None) -> Search:
    """The search through the graph."""
    return lambda query: [row["id"] for row in index.search(query, k, where, candidates=candidates)]


def run(args: argparse.Namespace, uri: str) -> dict[str, Any]:
    """Writes, builds and measures."""
    vectors, queries = make_vectors(args.rows, args.queries, args.dim, args.seed)
    truth = exact_ids(vectors, queries, args.k)
    index, write_seconds = fill(uri, vectors)
    flat_bytes = index.num_bytes()
    results = {name: measure(search, queries, truth) for name, search in contenders(index, vectors, args.k).items()}
    start = time.perf_counter()
    index.tidy(approximate_from=1)
    build_seconds = time.perf_counter() - start
    for number in CANDIDATES:
        results[f"graph, {number} candidates"] = measure(approximate(index, args.k, number), queries, truth)
    of_kind = exact_ids(vectors[::2], queries, args.k)
    of_kind = [{str(2 * int(row)) for row in ids} for ids in of_kind]
    filtered = approximate(index, args.k, DEFAULT_CANDIDATES, "kind = 'image'")
    results["graph, one kind of two"] = measure(filtered, queries, of_kind)
    return {
        "write_seconds": write_seconds,
        "build_seconds": build_seconds,
        "vector_bytes": vectors.nbytes,
        "table_bytes": flat_bytes,
        "table_and_graph_bytes": index.num_bytes(),
        "results": results,
    }


def print_report(report: dict[str, Any], k: int) -> None:
    """Prints the table, the costs, and whether the goals were met."""
    rows = [
        [name, f"{result['recall']:.4f}", str(Spread(**result["milliseconds"]))]
        for name, result in report["results"].items()
    ]
    print(f"\n{table(['search', f'recall@{k}', 'milliseconds a query'], rows)}\n")
    print("Milliseconds: median (range). The index returns rows with captions and metadata, the others only numbers.")
    print(f"Written in {report['write_seconds']:.1f} s, graph built in {report['build_seconds']:.1f} s.")
    sizes = [report[name] / 2**20 for name in ("vector_bytes", "table_bytes", "table_and_graph_bytes")]
    print("Vectors {:.0f} MiB; on the disk {:.0f} MiB, with the graph {:.0f} MiB.".format(*sizes))
    result = report["results"][f"graph, {DEFAULT_CANDIDATES} candidates"]
    median = result["milliseconds"]["median"]
    reached = result["recall"] >= GOAL_RECALL and median <= GOAL_MILLISECONDS
    goals = f"recall@{k} of at least {GOAL_RECALL}, median of at most {GOAL_MILLISECONDS:g} ms"
    print(f"Goals ({goals}): {'reached' if reached else 'missed'}.")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=100_000, help="number of vectors (default: 100000)")
    parser.add_argument("--dim", type=positive, default=512, help="dimension of a vector (default: 512)")
    parser.add_argument("--queries", type=positive, default=200, help="queries (default: 200)")
    parser.add_argument("--k", type=positive, default=10, help="neighbours per query (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the vectors (default: 0)")
    parser.add_argument("--threads", type=positive, help="torch threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Runs the comparison."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report: dict[str, Any] = {"settings": settings, "environment": environment("cpu", PACKAGES)}
    report["environment"]["cores"] = os.cpu_count()
    for part in report.values():
        print(*(f"{name}={value}" for name, value in part.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        measured = run(args, folder)
    print_report(measured, args.k)
    if args.output:
        write_json(args.output, report | measured)


if __name__ == "__main__":
    main(sys.argv[1:])
