"""Rows a second of every kind of source, read by several checkouts of this repository in turn.

Each checkout reads the same files in processes of its own, one at a time (A B A B ...). A pass includes opening the
source and decoding every image. The cache of `datasets` is empty before each process.

    python benchmarks/sources.py --checkouts ../before .
"""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COLUMNS = {"tar": {"image": "png", "caption": "txt"}}
QUESTIONS = {"image": "image", "question": "caption", "answer": "answer"}


def write_sources(folder: Path, count: int, side: int) -> None:
    """Writes `count` image-caption rows in every format."""
    import datasets
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    rows = []
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(images / f"{number}.png")
        caption = f"a caption of some twelve words or so about image {number}, as they are"
        rows.append({"image": f"images/{number}.png", "caption": caption, "id": f"{number:07}", "answer": "red"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    for path, renamed in ((folder / "rows.csv", {}), (images / "metadata.csv", {"image": "file_name"})):
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([renamed.get(name, name) for name in rows[0]])
            writer.writerows(
                [Path(row["image"]).name if renamed else row["image"], *list(row.values())[1:]] for row in rows
            )
    stored = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows]
    features = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.Value("string") for name in ("caption", "id", "answer")}}
    )
    dataset = datasets.Dataset.from_list(stored, features=features)
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for number, row in enumerate(stored):
            for name, data in (("png", row["image"]["bytes"]), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def sources(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and source of every kind, streamed and not, and of questions."""
    from hf_vlm.data import DataSource, question_source

    paths = {path: folder / path for path in ("rows.csv", "rows.jsonl", "rows.json", "rows.parquet", "rows.tar")}
    for name, path in {**paths, "save_to_disk": folder / "saved", "image folder": folder / "images"}.items():
        columns = COLUMNS.get(path.suffix.lstrip("."))
        for streaming in (False, True):
            yield (
                f"{name}{', stream' if streaming else ''}",
                DataSource(str(path), columns=columns, streaming=streaming),
            )
    yield "questions, rows.jsonl", question_source({"path": str(folder / "rows.jsonl"), "columns": QUESTIONS})


def measure(folder: Path, count: int, clock: Callable[[], float]) -> dict[str, float]:
    """Rows a second of each source, in this process."""
    from hf_vlm.data import load_source

    found = {}
    for name, source in sources(folder):
        start = clock()
        read = sum(row["image"].width > 0 for row in load_source(source))
        found[name] = count / (clock() - start)
        assert read == count, (name, read)
    return found


def run(checkout: Path, folder: Path, count: int, cpu: bool) -> dict[str, float]:
    """`measure` in a process that imports the package of a checkout."""
    with tempfile.TemporaryDirectory() as cache:
        env = {
            "PYTHONPATH": str(checkout.resolve()),
            "HF_DATASETS_CACHE": cache,
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(folder), "--rows", str(count)]
        command += ["--cpu"] if cpu else []
        done = subprocess.run(
            command, cwd=cache, env={**os.environ, **env}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Writes the sources, measures each checkout in turn, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--side", type=int, default=32, help="Side of an image in pixels.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="Count seconds of the processor: for a busy machine.")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        clock = time.process_time if args.cpu else time.perf_counter
        print(json.dumps(measure(args.measure, args.rows, clock)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder), args.rows, args.side)
        rounds = [
            [run(path, Path(folder), args.rows, args.cpu) for path in args.checkouts] for _ in range(args.repeats)
        ]
    unit = "processor second" if args.cpu else "second"
    print(f"Rows a {unit}, median of {args.repeats} rounds; {args.rows} rows, images of {args.side} x {args.side}.")
    print(f"{'source':24}" + "".join(f"{str(path)[-16:]:>18}" for path in args.checkouts) + f"{'ratio':>8}")
    for name in rounds[0][0]:
        medians = [statistics.median(each[i][name] for each in rounds) for i in range(len(args.checkouts))]
        ratio = statistics.median(each[-1][name] / each[0][name] for each in rounds)
        print(f"{name:24}" + "".join(f"{median:18,.0f}" for median in medians) + f"{ratio:8.2f}")


if __name__ == "__main__":
    main()
