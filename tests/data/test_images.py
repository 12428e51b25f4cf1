"""`load_image`: every odd kind of image loads in its own mode, every broken one is refused in one line."""

import io
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from hf_vlm.data.sources.images import ImageError, load_image
from hf_vlm.models.images import IMAGE_FORMATS

LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def frames(count: int = 3) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (80 * i, 10, 10)) for i in range(count)]


ODD = {
    "one pixel": ("PNG", noise(size=(1, 1)), {}),
    "CMYK": ("JPEG", noise("CMYK"), {}),
    "16 bit": ("PNG", Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000), {}),
    "RGBA": ("PNG", noise("RGBA"), {}),
    "palette": ("PNG", noise().quantize(8), {}),
    "palette with transparency": ("PNG", noise().quantize(8), {"transparency": 0}),
    "grey": ("PNG", noise("L"), {}),
    "grey with transparency": ("PNG", noise("RGBA").convert("LA"), {}),
    "black and white": ("PNG", noise("1"), {}),
    "float": ("TIFF", noise("F"), {}),
    "very wide": ("PNG", noise(size=(30_000, 2)), {}),
    "bmp": ("BMP", noise(), {}),
    "tiff": ("TIFF", noise(), {"compression": "tiff_lzw"}),
    "webp": ("WEBP", noise("RGBA"), {"lossless": True, "exact": True}),
}
MODES = {"16 bit": "I;16", "palette with transparency": "P"}


@pytest.mark.parametrize("name", ODD)
def test_every_kind_loads_as_stored(name: str) -> None:
    kind, image, options = ODD[name]
    loaded = load_image(encoded(image, kind, **options))
    assert loaded.mode == MODES.get(name, image.mode)
    assert loaded.size == image.size
    if kind != "JPEG":
        assert np.array_equal(np.asarray(loaded), np.asarray(image))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    first, *rest = frames()
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encoded(first, kind, save_all=True, append_images=rest, **options))
    assert np.array_equal(np.asarray(loaded.convert("RGB")), np.asarray(first))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int, kind: str) -> None:
    upright = noise(size=(3, 2))
    stored = {  # how a camera held so stores the upright scene: the inverse of what a viewer does
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    loaded = load_image(encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(np.asarray(loaded), np.asarray(upright))
    assert np.array_equal(np.asarray(load_image(loaded)), np.asarray(upright))


def test_unreadable_metadata_does_not_lose_the_image() -> None:
    data = encoded(noise(), "WEBP", exif=b"Exif\0\0nonsense that is no TIFF header")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(data)).getexif()
    assert load_image(data).size == (7, 5)


def test_every_kind_of_source(tmp_path: Path) -> None:
    image = noise()
    data = encoded(image, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    sources = [image, path, str(path), data, bytearray(data), {"bytes": data, "path": "gone.png"}]
    for source in [*sources, {"bytes": None, "path": str(path)}, {"path": str(path)}]:
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(image))
    path.unlink()
    assert load_image(Image.open(io.BytesIO(data))).getpixel((0, 0)) == image.getpixel((0, 0))


def test_the_file_is_closed(tmp_path: Path) -> None:
    first, *rest = frames()
    path = tmp_path / "a.gif"
    path.write_bytes(encoded(first, "GIF", save_all=True, append_images=rest))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    loaded = [load_image(path) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert len(loaded) == 20


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BROKEN = {
    "truncated png": (lambda folder: written(folder / "a.png", encoded(noise(size=(9, 9)), "PNG")[:-90]), "truncated"),
    "truncated jpeg": (lambda folder: encoded(noise(size=(90, 90)), "JPEG")[:900], "truncated"),
    "empty file": (lambda folder: written(folder / "a.png", b""), "zero bytes"),
    "empty bytes": (lambda folder: b"", "zero bytes"),
    "a text": (lambda folder: written(folder / "a.png", b"hello, world\n" * 9), "not an image"),
    "a web page": (lambda folder: b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    "missing file": (lambda folder: folder / "none.png", "no such file"),
    "a folder": (lambda folder: folder, "a folder"),
    "a URL": (lambda folder: "https://example.org/a.png", "a URL"),
    "no image": (lambda folder: None, "no image"),
    "an empty cell": (lambda folder: {"bytes": None, "path": None}, "no image"),
    "a number": (lambda folder: 5, "int is not an image"),
    "a program for a printer": (lambda folder: encoded(noise(), "EPS"), "not an image"),
    "a null byte": (lambda folder: "a\0b.png", "cannot be read"),
    "a long name": (lambda folder: "a" * 500, "cannot be read"),
    "an image in base64": (lambda folder: "iVBORw0KGgo" * 9999, "a text of 109,989 characters, not a path"),
    "a data URI": (lambda folder: "data:image/png;base64,iVBO", "not a path"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused(name: str, tmp_path: Path) -> None:
    build, reason = BROKEN[name]
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(build(tmp_path), where="photos.csv, row 3")
    assert str(caught.value).startswith("photos.csv, row 3: ")
    assert "\n" not in str(caught.value)


def test_the_path_is_the_place_by_default(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [1.5, 3])
def test_too_many_pixels(pixels: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT)
    assert load_image(encoded(Image.new("1", (LIMIT // 100, 100)), "PNG")).width == LIMIT // 100
    bomb = encoded(Image.new("1", (int(LIMIT * pixels) // 100, 100)), "PNG")
    with pytest.raises(ImageError, match="pixels"):
        load_image(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(bomb).height == 100


def test_thirty_thousand_pixels_wide_is_below_the_default_limit() -> None:
    assert load_image(encoded(Image.new("L", (30_000, 100)), "JPEG")).size == (30_000, 100)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_damage_gives_an_image_or_an_image_error(kind: str) -> None:
    rng = random.Random(0)
    whole = encoded(noise(size=(40, 30)), kind)
    refusals = []
    for _ in range(150):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(min(4, len(damaged))):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        try:
            load_image(bytes(damaged))
        except ImageError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert not any("\n" in refusal for refusal in refusals)


# --- nothing is let in


def iptc(inside: bytes) -> bytes:
    """An IPTC file around another one, which Pillow's reader opens as whatever it is."""

    def field(major: int, minor: int, data: bytes) -> bytes:
        return bytes([0x1C, major, minor]) + struct.pack(">H", len(data)) + data

    head = field(3, 60, bytes([1, 0])) + field(3, 20, bytes([7])) + field(3, 30, bytes([5])) + field(3, 120, bytes([5]))
    assert len(inside) < 32768
    return head + field(8, 10, inside)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list:
    """The calls of Ghostscript, which is not started."""
    called: list = []

    def call(*args, **options):
        called.append(args)
        return Image.new("RGB", (7, 5)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", call)
    return called


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_image_starts_a_program(wrapped: bool, programs: list, tmp_path: Path) -> None:
    data = encoded(noise("L"), "EPS")
    if wrapped:
        data = iptc(data)
    Image.open(io.BytesIO(data)).load()
    assert len(programs) == 1  # what Pillow by itself does
    written(tmp_path / "a.png", data)
    for source in (data, {"bytes": data}, tmp_path / "a.png"):
        with pytest.raises(ImageError, match="in a format that is not read; convert it to one of PNG, JPEG"):
            load_image(source)
    with pytest.raises(ImageError, match=r"image: images of the format (EPS|IPTC) are not read"):
        load_image(Image.open(io.BytesIO(data)))
    assert len(programs) == 1


OPENED: list[tuple] = []
WATCHES: list[bool] = []


def _watch(event: str, args: tuple) -> None:
    if WATCHES and event in ("open", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect"):
        OPENED.append((event, args[0]))


@pytest.fixture
def opened() -> Iterator[list]:
    """What is opened and started during a test; a hook cannot be taken away, so it only listens meanwhile."""
    if not hasattr(sys, "_hf_vlm_watch"):
        sys._hf_vlm_watch = True
        sys.addaudithook(_watch)
    OPENED.clear()
    WATCHES.append(True)
    yield OPENED
    WATCHES.clear()


SAVED = {"MPO": {"save_all": True, "append_images": [noise()]}, "AVIF": {"quality": 100}}
WRITABLE = [name for name in IMAGE_FORMATS if name in Image.SAVE]


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_allowed_format_is_read_without_opening_anything(kind: str, opened: list) -> None:
    data = encoded(noise(size=(16, 16)), kind, **SAVED.get(kind, {}))
    opened.clear()
    loaded = load_image(data)
    assert opened == []
    assert loaded.size == (16, 16)
    assert Image.open(io.BytesIO(data)).format == kind


def test_the_other_formats_of_pillow_are_refused() -> None:
    assert set(IMAGE_FORMATS) - set(Image.OPEN) == {"MPO"}  # which the reader of JPEG opens
    assert {"EPS", "IPTC", "FPX", "MIC", "WMF", "GRIB", "HDF5", "BUFR", "FITS"}.isdisjoint(IMAGE_FORMATS)
    refused = [
        name for name in ("IM", "MSP", "PALM", "PDF", "BUFR", "GRIB", "HDF5", "SPIDER", "XBM") if name in Image.SAVE
    ]
    for name in refused:
        try:
            data = encoded(noise("1"), name)
        except (OSError, KeyError):
            continue
        with pytest.raises(ImageError, match="not an image, or in a format that is not read"):
            load_image(data)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes; its pixels are missing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 89_000_000), (89_000_000, 1), (65_536, 2)])
def test_a_long_side_is_refused_before_the_pixels_are_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"row 3: {size[0]} x {size[1]} pixels; a side has 1 to 65535"):
        load_image(png_header(*size), "row 3")
    with pytest.raises(ImageError, match="truncated"):  # the longest that is decoded
        load_image(png_header(65_535, 2), "row 3")


@pytest.mark.parametrize(
    "text", ["iVBORw0KGgo" * 30_000, "a/" * 3000, "b" * 300, "data:image/png;base64," + "A" * 9999]
)
def test_an_error_about_a_long_text_is_short(text: str) -> None:
    for source in (text, {"path": text}, {"bytes": None, "path": text}):
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert len(str(caught.value)) < 400
