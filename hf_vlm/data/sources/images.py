"""Decodes one image from a path, bytes, a `datasets.Image` value or a PIL image; errors name the image and the cause.

Colours are not converted: greyscale, palette, CMYK, 16-bit and transparent images keep their stored mode. The image
processor converts them.
"""

import io
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from ...terminal import InputError

# Errors of Pillow's decoders on damaged files, found by flipping bytes in files of eighteen formats.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")

Image.preinit()  # registers the common formats first; formats are tried in this order
Image.init()
# Decoding EPS would make Ghostscript run a PostScript program from the data.
_FORMATS = tuple(name for name in Image.ID if name != "EPS")


class ImageError(InputError):
    """An image cannot be read; one line that says which image, what is wrong and what to do."""


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
        where = where or str(source.get("path") or "")
        source = source.get("path") if source.get("bytes") is None else source.get("bytes")
    if isinstance(source, str | os.PathLike):
        where = where or os.fspath(source)
        source = _read(source, where)
    where = where or "image"
    if source is None:
        raise ImageError(f"{where}: no image (the value is None); add one or remove the row.")
    if isinstance(source, bytes | bytearray | memoryview):
        source = _open(bytes(source), where)
    if not isinstance(source, Image.Image):
        raise ImageError(f"{where}: {type(source).__name__} is not an image; give a path, bytes or a PIL image.")
    return _decode(source, where)


def _read(path: str | os.PathLike, where: str) -> bytes:
    if "://" in os.fspath(path):
        raise ImageError(f"{where}: a URL, which is not downloaded; download the file and give its path.")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{where}: no such file; correct the path or remove the row.") from None
    except IsADirectoryError:
        raise ImageError(f"{where}: a folder, not an image; give a file in it.") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{where}: cannot be read ({_one_line(error)}); correct the path or permissions.") from error


def _open(data: bytes, where: str) -> Image.Image:
    if not data:
        raise ImageError(f"{where}: the file is empty (zero bytes); replace it or remove the row.")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"{where}: not an image, or in a format that Pillow cannot read; replace it.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{where}: {_one_line(error)} Resize it.") from None
    except _DAMAGED as error:
        raise ImageError(f"{where}: the file is damaged ({_one_line(error)}); replace it or remove the row.") from error


def _decode(image: Image.Image, where: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        size = f"{image.width} x {image.height} pixels"
        raise ImageError(f"{where}: {size} are too many (PIL.Image.MAX_IMAGE_PIXELS = {limit}); resize it.")
    try:
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, *_DAMAGED) as error:
        raise ImageError(
            f"{where}: the file is truncated or damaged ({_one_line(error)}); replace it or remove the row."
        ) from error
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGED:
        orientation = None  # the pixels are intact: unreadable metadata is no reason to lose the image
    if orientation not in _TRANSPOSE:
        return image
    upright = image.transpose(_TRANSPOSE[orientation])
    for key in _METADATA:
        upright.info.pop(key, None)  # otherwise a second load_image would rotate it again
    return upright


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


__all__ = ["ImageError", "load_image"]
