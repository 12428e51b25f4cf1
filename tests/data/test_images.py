"""`load_image`: every odd kind of image loads in its own mode, every broken one is refused in one line."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from hf_vlm.data.sources.images import ImageError, load_image

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
    "a long name": (lambda folder: "a" * 5000, "cannot be read"),
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
    assert load_image(encoded(Image.new("1", (LIMIT // 10, 10)), "PNG")).width == LIMIT // 10
    bomb = encoded(Image.new("1", (int(LIMIT * pixels) // 10, 10)), "PNG")
    with pytest.raises(ImageError, match="pixels"):
        load_image(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(bomb).height == 10


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
