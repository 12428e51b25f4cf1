"""500 mutated tables and archives: every one is read or refused with a line; none hangs, none loses a row in silence.

A row proves itself: its caption holds its number and a checksum of its text, and its image the number as its colour. A
changed text arrives changed, since the formats keep no checksum of it; it then fails its own.
"""

import io
import json
import random
import signal
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vlm.data.sources.images import ImageError
from hf_vlm.data.sources.load import load_source
from hf_vlm.data.sources.open import DataSource
from hf_vlm.data.sources.skipped import SkipReport
from hf_vlm.terminal import InputError

COUNT = 12
MUTANTS = 84  # of each kind; six kinds make 504
SECONDS = 20  # for one reading; a mutant that takes longer hangs


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def caption(number: int) -> str:
    text = f"This is image number {number}."
    return f"{text} {zlib.crc32(text.encode()):08x}"


def number_of(text: str) -> int | None:
    """The number in a caption; None if the caption was changed."""
    words, _, digest = text.rpartition(" ")
    if f"{zlib.crc32(words.encode()):08x}" != digest:
        return None
    return int(words.split()[-1].rstrip("."))


def write_images(folder: Path) -> list[dict[str, str]]:
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(png(number))
    return [{"image": f"{number}.png", "caption": caption(number)} for number in range(COUNT)]


def write_tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(COUNT):
            for name, data in (("image", png(number)), ("caption", caption(number).encode())):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "a.tar"


def write_text(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def write_jsonl(folder: Path) -> Path:
    return write_text(folder, "a.jsonl", "".join(json.dumps(row) + "\n" for row in write_images(folder)))


def write_json(folder: Path) -> Path:
    return write_text(folder, "a.json", json.dumps(write_images(folder), indent=1))


def write_csv(folder: Path) -> Path:
    rows = [f'{row["image"]},"{row["caption"]}"' for row in write_images(folder)]
    return write_text(folder, "a.csv", "\n".join(["image,caption", *rows, ""]))


def table() -> pa.Table:
    return pa.table({"image": [png(n) for n in range(COUNT)], "caption": [caption(n) for n in range(COUNT)]})


def write_parquet(folder: Path) -> Path:
    pq.write_table(table(), folder / "a.parquet", use_dictionary=False, row_group_size=5)
    return folder / "a.parquet"


def write_arrow(folder: Path) -> Path:
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=5)
    return folder / "a.arrow"


WRITERS: dict[str, Callable[[Path], Path]] = {
    "tar": write_tar,
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
    "arrow": write_arrow,
}
LINES = ("jsonl", "csv")  # a file that is cut between two lines is a shorter file, and whole


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def blank(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 4, 64, 512, 4096)))
    return data[:start] + bytes(end - start) + data[end:]


def scramble(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 4, 64, 512)))
    return data[:start] + rng.randbytes(end - start) + data[end:]


def insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice((1, 3, 100, 512))) + data[start:]


def remove(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 3, 100, 512)) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start : start + rng.choice((1, 100, 512, 2048))] + data[start:]


MUTATIONS = (flip, cut, blank, scramble, insert, remove, repeat)
# These may join the beginning of one row of a text to the end of another, which is a row like any other.
SPLICES = (remove, repeat, insert)


class StuckError(BaseException):
    """A reading took too long; no handler of errors catches it."""


def stop(number: int, frame: FrameType | None) -> None:
    raise StuckError


def read(path: Path, stream: bool, on_error: str) -> tuple[str, list[tuple[int | None, int]], int]:
    """How a reading ended ("read" or the error's line), the numbers of captions and images, and the skipped rows."""
    report = SkipReport(max_skipped=1.0)
    signal.alarm(SECONDS)
    try:
        rows = load_source(DataSource(str(path), streaming=stream), on_error, report)
        found = [(number_of(row["caption"]), row["image"].getpixel((0, 0))[0]) for row in rows]
        return "read", found, report.count
    except (InputError, ImageError) as error:
        return str(error), [], report.count
    finally:
        signal.alarm(0)
        report.folder.joinpath("logged").write_text(str(report.count))  # says nothing at the end


def wrong_with(kind: str, mutation: Callable, stream: bool, result: tuple) -> str:
    """What is wrong with a reading; empty if nothing is."""
    ended, found, skipped = result
    if ended != "read":
        return "" if ended.isprintable() and len(ended) < 3000 and ("a." in ended) else f"says {ended!r}"
    is_text = kind in ("json", *LINES)
    if (is_text and mutation in SPLICES) or (kind in LINES and mutation is cut):
        return ""
    if not is_text and any(text not in (None, image) for text, image in found):
        return f"pairs captions with other images: {found}"
    if is_text and skipped:  # a line that lost its end is one bad row with the next
        return ""
    seen = len(found) + (skipped if stream else 0)
    return f"lost rows: {len(found)} read, {skipped} skipped" if seen < COUNT else ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_mutants(kind: str, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    previous = signal.signal(signal.SIGALRM, stop)
    original = WRITERS[kind](tmp_path)
    whole, rng, outcomes = original.read_bytes(), random.Random(f"mutants of {kind}"), Counter()
    wrong: list[str] = []
    try:
        for number in range(MUTANTS):
            mutation = MUTATIONS[number % len(MUTATIONS)]
            original.write_bytes(mutation(whole, rng))
            stream, on_error = bool(rng.getrandbits(1)), rng.choice(("raise", "skip"))
            try:
                result = read(original, stream, on_error)
                problem = wrong_with(kind, mutation, stream, result)
            except (Exception, StuckError) as error:
                result, problem = ("failed",), f"{type(error).__name__}: {error}"
            outcomes["read" if result[0] == "read" else "refused"] += 1
            if problem:
                kept = tmp_path.with_name(f"{kind}-{number}")
                kept.write_bytes(original.read_bytes())
                wrong.append(f"{mutation.__name__} {number} (stream={stream}, {on_error}): {problem[:400]}")
    finally:
        signal.signal(signal.SIGALRM, previous)
        datasets.enable_progress_bars()
    print(f"{kind}: {dict(outcomes)}")
    assert not wrong, f"{len(wrong)} of {MUTANTS}:\n" + "\n".join(wrong)
