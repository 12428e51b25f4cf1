"""Ways in which files of a checkpoint are damaged, by a full disk, a power cut, a bad copy or a slip of the hand."""

from collections.abc import Callable
from pathlib import Path


def cut(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def zero(path: Path, share: float) -> None:
    """Zeroes the last part of a file, as a power cut leaves it."""
    content = path.read_bytes()
    start = int(len(content) * (1 - share))
    path.write_bytes(content[:start] + bytes(len(content) - start))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: cut(path, 0),
    "cut in half": lambda path: cut(path, path.stat().st_size // 2),
    "last byte cut": lambda path: cut(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 8),
    "zeroed at its end": lambda path: zero(path, 0.2),
    "all zeros": lambda path: zero(path, 1.0),
    "first byte flipped": lambda path: flip(path, 0),
    "middle byte flipped": lambda path: flip(path, path.stat().st_size // 2),
    "another file": lambda path: path.write_bytes(b"<html>Service unavailable</html>"),
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json")
