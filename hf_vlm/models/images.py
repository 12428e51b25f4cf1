"""Images from files, arrays and PIL: decoded, upright, and as 8-bit RGB. The rules of every reader and processor.

- Formats are an allow-list. Their readers open no other file and start no program, unlike those of EPS, IPTC, FPX, WMF.
- Size is checked before the pixels are decoded: at most `PIL.Image.MAX_IMAGE_PIXELS`, and `MAX_SIDE` pixels a side.
- An image is rotated according to its EXIF orientation, once.
- Values become 8 bits by one rule (`eight_bits`), transparency becomes white, and CMYK and palettes become RGB.

This file imports nothing of the package: it travels with checkpoints, and reading data needs no model.
"""

import io

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

# In the order in which they are tried; TGA has no signature and is last.
IMAGE_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "PCX", "SGI"),
    *("ICO", "TGA"),
)
MAX_SIDE = 65_535  # that of JPEG; a longer side is an attack, and resizing such an image exhausts the memory

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CHANNELS = (1, 3, 4)
METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")

Image.init()


class ImageError(ValueError):
    """An image cannot be read; one line that says which image, what is wrong and what to do."""


def shown(value: object, length: int = 80) -> str:
    """A value as Python writes it, for an error: on one line, cut at `length` characters with the number left out."""
    return shortened(repr(value), length)


def shortened(text: str, length: int = 80) -> str:
    """A text on one line, cut at `length` characters with the number left out."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}... ({len(text) - length:,} more characters)"


def decode_image(source: Image.Image | bytes, where: str = "image") -> Image.Image:
    """The first frame of an image, decoded, upright, in its stored colour mode.

    Args:
        source: The bytes of a file, or a PIL image, which may not be decoded yet.
        where: Name of the image in an error.

    Raises:
        ImageError: if the bytes are empty, damaged, or in none of `IMAGE_FORMATS`, or if the image is too large.
    """
    image = _opened(source, where) if isinstance(source, bytes) else source
    if isinstance(image, ImageFile.ImageFile) and image.format not in IMAGE_FORMATS and not _is_decoded(image):
        raise ImageError(f"{where}: images of the format {image.format} are not read; {_CONVERT}")
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        size = f"{width} x {height} pixels"
        raise ImageError(f"{where}: {size} are too many (PIL.Image.MAX_IMAGE_PIXELS = {limit}); resize it.")
    if max(width, height) > MAX_SIDE or not min(width, height):
        raise ImageError(f"{where}: {width} x {height} pixels; a side has 1 to {MAX_SIDE} pixels. Resize or remove it.")
    try:
        image.load()
    except Exception as error:  # whatever a decoder raises on damaged data, of which Pillow declares nothing
        raise ImageError(f"{where}: the file is truncated or damaged ({_reason(error)}); {_REPLACE}") from error
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says, which is then removed: a second call returns the image as it is."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels are intact: unreadable metadata is no reason to lose the image
        orientation = None
    if orientation not in TRANSPOSE:
        return image
    turned = image.transpose(TRANSPOSE[orientation])
    for key in METADATA:
        turned.info.pop(key, None)
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image from any PIL image: transparency composited on white, other values as `eight_bits` says."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Pixel values as `uint8`.

    The type decides where it is narrow: 8 bits stay, 16 bits are divided by 257, booleans are black and white. Among
    floats and wider integers the largest value decides: floats up to 1 are multiplied by 255, values up to 255 stay,
    values up to 65,535 are divided by 257, and larger ones are scaled so that the largest is 255. What is negative or
    not finite becomes 0.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = numbers.max(initial=0.0)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        scale = 1 / 257
    elif values.dtype.kind == "f" and largest <= 1:
        scale = 255.0
    elif largest <= 255:
        scale = 1.0
    else:
        scale = 1 / 257 if largest <= 65_535 else 255 / largest
    return (numbers * scale).round().clip(0, 255).astype(np.uint8)


def image_of_array(values: np.ndarray, channels_first: bool | None = None) -> Image.Image:
    """A PIL image from an array of pixels, by the rule of `eight_bits`.

    Args:
        values: Of shape `(height, width)`, `(height, width, channels)` or `(channels, height, width)` with 1, 3 or 4
            channels: grey, RGB, RGBA.
        channels_first: Which of the latter two; by default the one with 3 channels, or else with 1 or 4. If both
            have as many, channels are first, as in transformers.

    Raises:
        ImageError: for another shape or type, for no pixels, and for negative values, which a normalised image has.
    """
    shape = tuple(values.shape)
    if values.ndim == 3:
        if channels_first is None:
            channels_first = shape[0] == 3 or (shape[2] != 3 and shape[0] in CHANNELS)
        values = np.moveaxis(values, 0, 2) if channels_first else values
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[2] not in CHANNELS):
        raise ImageError(
            f"An array of shape {shape} is not an image: give (height, width), or 1, 3 or 4 channels, first or last."
        )
    if values.dtype.kind not in "buif" or values.min() < 0:
        found = f"from {values.min():.3g}" if values.dtype.kind in "if" else f"of type {values.dtype}"
        raise ImageError(
            f"An array with values {found} is not an image: give 0 to 1, 0 to 255 or 0 to 65535, before normalisation."
        )
    return Image.fromarray(np.ascontiguousarray(eight_bits(values[:, :, 0] if values.shape[2:] == (1,) else values)))


_CONVERT = f"convert it to one of {', '.join(IMAGE_FORMATS)}."
_REPLACE = "replace it or remove the row."


def _opened(data: bytes, where: str) -> Image.Image:
    if not data:
        raise ImageError(f"{where}: the file is empty (zero bytes); {_REPLACE}")
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise ImageError(f"{where}: not an image, or in a format that is not read; {_CONVERT}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{where}: {_reason(error)} Resize it.") from None
    except Exception as error:  # whatever a decoder raises on damaged data
        raise ImageError(f"{where}: the file is damaged ({_reason(error)}); {_REPLACE}") from error


def _is_decoded(image: ImageFile.ImageFile) -> bool:
    """Whether the pixels are in memory, so that no reader is called."""
    return not isinstance(image, ImageFile.StubImageFile) and not image.tile


def _reason(error: BaseException) -> str:
    return shortened(str(error)) or type(error).__name__


__all__ = [
    "IMAGE_FORMATS",
    "MAX_SIDE",
    "ImageError",
    "decode_image",
    "eight_bits",
    "image_of_array",
    "shortened",
    "shown",
    "to_rgb",
    "upright",
]
