"""500 damaged, mislabelled and hostile image files by each command: none gets stuck, none ends with a traceback.

Every file is an image or an `ImageError` of one line. Commands skip what cannot be read, or end with one line that
names the file. No reader opens a file or starts a program.
"""

import io
import json
import random
import signal
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from cases import tiny, tiny_llava
from hf_vlm import VlmImageProcessor
from hf_vlm.cli.main import main
from hf_vlm.data import ConversationCollator, open_conversations
from hf_vlm.data.batches.pairs import PairDataset
from hf_vlm.data.sources.images import ImageError, load_image
from hf_vlm.data.sources.load import load_source
from hf_vlm.data.sources.open import DataSource
from hf_vlm.data.sources.rows import SkipReport
from hf_vlm.models.images import IMAGE_FORMATS
from scripts import tiny_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of Pillow about damaged metadata
]
COUNT, SEED = 500, 19
SECONDS = 5  # for one image; a sound one takes a hundredth of one
OTHERS = ("EPS", "IM", "MSP", "PDF", "XBM", "SPIDER")
MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "I", "F", "LAB", "YCbCr")


def picture(rng: random.Random, mode: str) -> Image.Image:
    size = rng.choice([(1, 1), (7, 5), (33, 20), (3, 90), (64, 64)])
    values = np.random.default_rng(rng.randrange(10**6)).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        scaled = values * np.array(rng.choice([1, 257]), {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        return Image.fromarray(scaled.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    return Image.fromarray(np.dstack([values, values.T.reshape(values.shape), 255 - values])).convert(mode)


def encoded(rng: random.Random) -> bytes:
    """An image file of any format and mode, some with EXIF, some with several frames."""
    while True:
        kind = rng.choice([*IMAGE_FORMATS, *IMAGE_FORMATS, *OTHERS])
        options: dict[str, Any] = {}
        if rng.random() < 0.3:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = rng.choice([0, 1, 3, 6, 8, 9, 65535])
            options["exif"] = exif
        image, buffer = picture(rng, rng.choice(MODES)), io.BytesIO()
        if kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO") and rng.random() < 0.3:
            options |= {
                "save_all": True,
                "append_images": [image.rotate(180)],
            }
        try:
            image.save(buffer, kind, **options)
        except Exception:
            continue  # a mode or size that the format does not support
        return buffer.getvalue()


def png(width: int, height: int, bits: int = 1) -> bytes:
    """The header of a PNG of any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def iptc(inside: bytes) -> bytes:
    def field(major: int, minor: int, data: bytes) -> bytes:
        return bytes([0x1C, major, minor]) + struct.pack(">H", len(data)) + data

    head = field(3, 60, bytes([1, 0])) + field(3, 20, bytes([7])) + field(3, 30, bytes([5])) + field(3, 120, bytes([5]))
    return head + field(8, 10, inside[:32000])


def hostile(rng: random.Random) -> bytes:
    """Files that no mutation of an image reaches."""
    eps = io.BytesIO()
    Image.new("RGB", (7, 5)).save(eps, "EPS")
    big = rng.choice(
        [(1, 89_000_000), (89_000_000, 1), (2**31 - 1, 2**31 - 1), (70_000, 70_000), (0, 5), (65_535, 1300)]
    )
    return rng.choice(
        [
            lambda: eps.getvalue(),
            lambda: iptc(eps.getvalue()),
            lambda: png(*big),
            lambda: png(*big, bits=16),
            lambda: b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", 9999, 22) + png(30_000, 30_000),  # ICO
            lambda: b"P6\n%d %d\n255\n" % big,
            lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(6) + b",",
            lambda: b"",
            lambda: b"\0" * rng.randrange(1, 3000),
            lambda: rng.randbytes(rng.randrange(1, 3000)),
            lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
            lambda: b"%PDF-1.4 " + rng.randbytes(99),
            lambda: b"PK\3\4" + rng.randbytes(99),
        ]
    )()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One of several damages."""
    kind, changed = rng.randrange(7), bytearray(data)
    if kind == 0:  # cut
        return data[: rng.randrange(len(data) + 1)]
    if kind == 1:  # bytes anywhere
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 2:  # bytes of the header, with the values that overflow
        for _ in range(rng.choice([1, 2, 4])):
            changed[rng.randrange(min(64, len(changed)))] = rng.choice([0, 1, 127, 128, 254, 255])
    elif kind == 3:  # a part twice, or missing
        start = rng.randrange(len(changed))
        end = min(len(changed), start + rng.randrange(1, 99))
        changed[start:end] = rng.choice([b"", bytes(changed[start:end]) * 2])
    elif kind == 4:  # something appended
        changed += rng.choice([rng.randbytes(99), data, b"\0" * 999])
    elif kind == 5:  # the beginning of one file, the end of another
        other = encoded(rng)
        changed = bytearray(data[: len(data) // 2] + other[len(other) // 2 :])
    elif kind == 6:  # a field of four bytes
        place = rng.randrange(max(1, len(changed) - 4))
        changed[place : place + 4] = struct.pack(
            rng.choice("<>") + "I", rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 70_000])
        )
    return bytes(changed)


def mutants() -> list[bytes]:
    rng = random.Random(SEED)
    made = []
    for number in range(COUNT):
        data = hostile(rng) if number % 8 == 0 else encoded(rng)
        made.append(data if number % 5 == 0 else mutated(rng, data or b"\0"))
    return made


class Stuck(BaseException):
    """A reader takes too long; no `except Exception` catches it."""


@contextmanager
def within(seconds: int, what: str) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Stuck(what)

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


OPENED: list[tuple] = []
WATCHED = ("open", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect")
LISTENS: list[bool] = []


@contextmanager
def nothing_opened() -> Iterator[None]:
    """Records what is opened or started; an audit hook cannot be taken away, so it listens meanwhile only."""
    if not OPENED and not hasattr(sys, "_mutants_watch"):
        sys._mutants_watch = True
        sys.addaudithook(lambda event, args: LISTENS and event in WATCHED and OPENED.append((event, args[0])))
    OPENED.clear()
    LISTENS.append(True)
    yield
    LISTENS.clear()
    assert OPENED == []


class Files:
    """The mutants as files in a folder, and what `load_image` says of each: None, or the error."""

    def __init__(self, folder: Path):
        self.folder = folder / "images"
        self.folder.mkdir()
        self.said: dict[str, str | None] = {}
        self.slowest = 0.0
        for number, data in enumerate(mutants()):
            name = f"{number:03}.png"
            (self.folder / name).write_bytes(data)
            started = time.monotonic()
            try:
                with within(SECONDS, name), nothing_opened():
                    load_image(data, name)
                self.said[name] = None
            except ImageError as error:
                self.said[name] = str(error)
            self.slowest = max(self.slowest, time.monotonic() - started)
        self.sound = [name for name, error in self.said.items() if error is None]
        self.bad = [name for name, error in self.said.items() if error is not None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("mutants"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip_model().save_pretrained(folder)
    tiny.clip_processor().save_pretrained(folder)
    return str(folder)


def table(files: Files, folder: Path, names: list[str]) -> Path:
    """A parquet file of some of the images, with captions."""
    rows = [{"image": {"bytes": (files.folder / name).read_bytes(), "path": name}} for name in names]
    for number, row in enumerate(rows):
        row["caption"] = tiny.CAPTIONS[number % len(tiny.CAPTIONS)]
        row["messages"] = [{"role": "user", "content": "<image>\na cat"}, {"role": "assistant", "content": "a dog"}]
    folder.mkdir(exist_ok=True)
    features = datasets.Features(
        {
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "caption": datasets.Value("string"),
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def command(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str]:
    """Exit code and output of `hf-vlm` in this process, which must not end with another exception."""
    monkeypatch.setattr(sys, "argv", ["hf-vlm", *map(str, args)])
    code = 0
    with within(90, " ".join(map(str, args[:2]))):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if line.startswith("Error")]
    assert len(errors) == (code != 0), err
    return code, out + err


def test_each_is_an_image_or_one_line(files: Files) -> None:
    assert len(files.said) == COUNT
    assert len(files.sound) > 100
    assert len(files.bad) > 150
    for name in files.bad:
        assert files.said[name].startswith(f"{name}: ")
        assert "\n" not in files.said[name]
        assert len(files.said[name]) < 400
    assert files.slowest < SECONDS


@pytest.mark.parametrize("mode", ["crop", "squash", "pad", "anyres"])
def test_each_image_has_pixels(mode: str, files: Files) -> None:
    processor = VlmImageProcessor(
        size={"height": 32, "width": 32}, resize_mode=mode, image_grid_pinpoints=tiny_llava.GRIDS
    )
    for name in files.sound:
        with within(SECONDS, name):
            loaded = processor(load_image(files.folder / name), return_tensors="pt")
            by_path = processor(str(files.folder / name), return_tensors="pt")
        assert loaded["pixel_values"].isfinite().all()
        assert torch.equal(by_path["pixel_values"], loaded["pixel_values"]), name


def test_index(files: Files, clip: str, tmp_path: Path, capfd, monkeypatch) -> None:
    pytest.importorskip("lancedb")
    index = tmp_path / "index"
    code, output = command(
        capfd, monkeypatch, "index", "build", index, "--model", clip, files.folder, "--on-error", "skip"
    )
    assert code == 0
    assert f"{len(files.sound)} added, 0 replaced, 0 there already, {len(files.bad)} left out" in output
    code, output = command(capfd, monkeypatch, "index", "build", tmp_path / "other", "--model", clip, files.folder)
    assert code == 1
    assert files.bad[0] in output
    for name in [*files.sound[::40], *files.bad[::40]]:
        code, output = command(capfd, monkeypatch, "index", "search", index, "--image", files.folder / name)
        assert code == (name in files.bad), output
    code, output = command(
        capfd, monkeypatch, "index", "search", index, "a cat", "--k", "300", "--sheet", tmp_path / "sheet.html"
    )
    assert code == 0
    assert (tmp_path / "sheet.html").read_text().count("data:image/png") == min(300, len(files.sound))


@pytest.mark.parametrize("name", ["evaluate", "cache-features"])
def test_commands_that_stop(name: str, files: Files, clip: str, tmp_path: Path, capfd, monkeypatch) -> None:
    """All images that load are used; one that does not ends the command with a line that names it."""

    def run(path: Path) -> tuple[int, str]:
        options = (
            ["--output", tmp_path / f"{path.parent.name}-features"] if name == "cache-features" else ["--limit", 0]
        )
        return command(capfd, monkeypatch, name, clip, "--data", path, "--split", "train", *options)

    code, output = run(table(files, tmp_path / "sound", files.sound))
    assert code == 0, output
    for number, bad in enumerate(files.bad[::25]):
        code, output = run(table(files, tmp_path / f"bad{number}", [*files.sound[:2], bad]))
        assert code == 1
        assert f"row 2 ({bad}): " in output


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_data_loader_of_a_recipe(workers: int, streaming: bool, files: Files, tmp_path: Path) -> None:
    path, report = table(files, tmp_path, list(files.said)), SkipReport(max_skipped=1.0)
    source = DataSource(str(path), streaming=streaming)
    rows = load_source(source, on_error="skip", report=report)
    with within(90, "loader"):
        if streaming:
            count = sum(1 for _ in rows)
            assert count == len(files.sound)
        else:
            pairs = PairDataset(rows)
            loader = DataLoader(pairs, 16, collate_fn=tiny_training.collator(augment=True), num_workers=workers)
            count = 0
            for batch in loader:
                assert batch["pixel_values"].isfinite().all()
                count += len(batch["pixel_values"])
            assert count == COUNT
    assert report.count == len(files.bad)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("anyres", [False, True])
def test_the_conversations_of_a_recipe(anyres: bool, workers: int, files: Files, tmp_path: Path) -> None:
    path, report = table(files, tmp_path, list(files.said)), SkipReport(max_skipped=1.0)
    rows = open_conversations({"path": str(path)}, on_error="skip", report=report)
    collator = ConversationCollator(tiny_llava.llava_processor(anyres), max_length=4096)
    with within(90, "loader"):
        batches = list(DataLoader(rows, 16, collate_fn=collator, num_workers=workers))
    assert sum(len(batch["input_ids"]) for batch in batches) == COUNT
    assert all(batch["pixel_values"].isfinite().all() for batch in batches)
    assert report.count == len(files.bad)
    folder = tmp_path / "json"
    folder.mkdir()
    talks = [{"image": name, "messages": row["messages"]} for name, row in zip(files.said, rows.rows, strict=True)]
    (folder / "a.json").write_text(json.dumps(talks))
    report = SkipReport(max_skipped=1.0)
    found = open_conversations(
        {"path": str(folder / "a.json"), "image_folder": str(files.folder)}, on_error="skip", report=report
    )
    assert len(list(found)) == COUNT
    assert report.count == len(files.bad)
