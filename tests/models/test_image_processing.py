"""The image processor: every kind of image has the right content and size, with the same values as PIL."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlm import VlmImageProcessor

GREEN = (0, 200, 0)


def pixels_of(image: Image.Image, **options) -> np.ndarray:
    """The processed image back in 0..255, of shape (height, width, 3)."""
    processor = VlmImageProcessor(size={"height": 32, "width": 32}, **options)
    normalised = processor(image, return_tensors="pt")["pixel_values"][0]
    assert normalised.dtype == torch.float32
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((normalised * std + mean) * 255).permute(1, 2, 0).numpy()


def transparent(mode: str) -> Image.Image:
    """Green in the left half, nothing (over black) in the right half."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*GREEN, 255), (0, 0, 32, 64))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "PA", "RGBa"])
def test_transparency_shows_white(mode):
    pixels = pixels_of(transparent("RGBA" if mode == "PA" else mode))
    assert np.abs(pixels[:, :12] - GREEN).max() < 1
    assert np.abs(pixels[:, 20:] - 255).max() < 1


def test_palette_with_transparency_shows_white():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30, *GREEN])
    image.paste(1, (0, 0, 32, 64))
    image.info["transparency"] = 0
    pixels = pixels_of(image)
    assert np.abs(pixels[:, :12] - GREEN).max() < 1
    assert np.abs(pixels[:, 20:] - 255).max() < 1


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 128, (128, 128, 128)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),  # 128 x 257
        ("I", 51400, (200, 200, 200)),  # 16-bit values in 32 bits
        ("I", 200, (200, 200, 200)),
        ("CMYK", (255, 0, 255, 0), (0, 255, 0)),
        ("LA", (90, 255), (90, 90, 90)),
        ("RGB", GREEN, GREEN),
    ],
)
def test_colour_modes(mode, value, expected):
    assert np.abs(pixels_of(Image.new(mode, (50, 40), value)) - expected).max() < 1


def test_one_pixel_and_a_ribbon():
    assert np.abs(pixels_of(Image.new("RGB", (1, 1), GREEN)) - GREEN).max() < 1
    for mode in ("crop", "squash", "pad"):
        wide = Image.new("RGB", (30_000, 3), GREEN)
        middle = pixels_of(wide, resize_mode=mode)[16, 16]
        # Padded to a square, such a thin ribbon is one row of the resized image: little more than the mean colour.
        expected, tolerance = ((122.77, 116.75, 104.09), 10) if mode == "pad" else (GREEN, 1)
        assert np.abs(middle - expected).max() < tolerance


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), GREEN), Image.new("RGB", (20, 20), (255, 0, 0))]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "two.gif") as animation:
        assert np.abs(pixels_of(animation) - GREEN).max() < 1


def test_modes_place_the_picture():
    """A left red and a right blue third: cropped they vanish, squashed they stay, padded there are bars above."""
    image = Image.new("RGB", (96, 32), GREEN)
    image.paste((255, 0, 0), (0, 0, 32, 32))
    image.paste((0, 0, 255), (64, 0, 96, 32))
    cropped, squashed, padded = (pixels_of(image, resize_mode=mode) for mode in ("crop", "squash", "pad"))
    assert np.abs(cropped - GREEN).max() < 1
    assert np.abs(squashed[16, 2] - (255, 0, 0)).max() < 2
    assert np.abs(squashed[16, 29] - (0, 0, 255)).max() < 2
    assert np.abs(padded[2, 16] - (122.77, 116.75, 104.09)).max() < 1
    assert np.abs(padded[16, 2] - (255, 0, 0)).max() < 2


def test_arrays_and_batches():
    array = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    processor = VlmImageProcessor(size={"height": 32, "width": 32})
    batch = processor([Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1)], return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    for other in batch["pixel_values"][1:]:
        torch.testing.assert_close(batch["pixel_values"][0], other)


def test_saved_and_loaded(tmp_path):
    processor = VlmImageProcessor(size={"height": 48, "width": 32}, resize_mode="pad", image_mean=[0.5, 0.4, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = VlmImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 32)
    torch.testing.assert_close(loaded(image, return_tensors="pt")["pixel_values"], pixels)
