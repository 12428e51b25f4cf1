"""Decodes one image from a path, bytes, a `datasets.Image` value or a PIL image; errors name the image and the cause.

Formats, size and orientation are checked by the rules of `hf_vlm.models.images`. Colours are not converted: greyscale,
palette, CMYK, 16-bit and transparent images keep their stored mode. The image processor converts them.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...models import images as rules
from ...models.images import decode_image
from ...terminal import printable
from .errors import RowError

LONGEST_PATH = 4096


class ImageError(RowError, rules.ImageError):
    """An image cannot be read; one line that says which image, what is wrong and what to do."""

    reason = "unreadable image"


def load_image(
    source: Image.Image | str | os.PathLike | bytes | Mapping[str, bytes | str | None] | None, where: str = ""
) -> Image.Image:
    """Decodes an image fully: the first frame of an animation, rotated according to its EXIF orientation.

    Args:
        source: An image, a path, the bytes of a file, or a `datasets.Image` value: a dict with `bytes` or, if `bytes`
            is None, `path`.
        where: Name of the image in an error, such as "photos.csv, row 3 (a.png)". Default: its path.

    Returns:
        The decoded image in its stored colour mode.

    Raises:
        ImageError: if there is no image or no such file, or if the file is empty, damaged, not an image, or has more
            pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, Mapping):
        where = where or printable(source.get("path") or "", 200)
        source = source.get("path") if source.get("bytes") is None else source.get("bytes")
    if isinstance(source, str | os.PathLike):
        where = where or printable(os.fspath(source), 200)
        source = _read(os.fspath(source), where)
    where = where or "image"
    if source is None:
        raise ImageError(f"{where}: no image (the value is None); add one or remove the row.")
    if isinstance(source, bytes | bytearray | memoryview):
        source = bytes(source)
    elif not isinstance(source, Image.Image):
        raise ImageError(f"{where}: {type(source).__name__} is not an image; give a path, bytes or a PIL image.")
    try:
        return decode_image(source, where)
    except rules.ImageError as error:
        raise ImageError(str(error)) from error


def _read(path: str, where: str) -> bytes:
    if len(path) > LONGEST_PATH or path.startswith("data:"):
        raise ImageError(f"{where}: a text of {len(path):,} characters, not a path; store the image as bytes.")
    if "://" in path:
        raise ImageError(f"{where}: a URL, which is not downloaded; download the file and give its path.")
    try:
        if stat.S_ISFIFO(mode := os.stat(path).st_mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
            raise ImageError(f"{where}: a pipe or device, not a file; remove it.")  # reading it could wait for ever
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{where}: no such file; correct the path or remove the row.") from None
    except IsADirectoryError:
        raise ImageError(f"{where}: a folder, not an image; give a file in it.") from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        reason = printable(getattr(error, "strerror", None) or error, 80)
        raise ImageError(f"{where}: cannot be read ({reason}); correct the path or permissions.") from error


class LazyImages(Sequence[Image.Image]):
    """The images of rows, decoded when they are accessed, and not kept.

    Args:
        rows: Rows with an `image` in any form that [`load_image`] takes, decoded or not.
        count: Number of rows to use, from the first; None: all.
    """

    def __init__(self, rows: Any, count: int | None = None):
        self.rows = rows
        self._length = len(rows) if count is None else count

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(self._length)[index]]
        number = range(self._length)[index]
        return load_image(self.rows[number]["image"], where=f"row {number}")


__all__ = ["ImageError", "LazyImages", "load_image"]
