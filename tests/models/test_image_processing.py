"""The image processor: every kind of image has the right content and size, with the same values as PIL."""

import base64

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm import VlmImageProcessor
from hf_vlm.data import load_image
from hf_vlm.models.images import ImageError

GREEN = (0, 200, 0)


def pixels_of(image, **options) -> np.ndarray:
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
        ("La", (90, 255), (90, 90, 90)),
        ("I;16B", 25700, (100, 100, 100)),
        ("I", 2**31 - 1, (255, 255, 255)),
        ("I", -5, (0, 0, 0)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 100.0, (100, 100, 100)),
        ("F", 25700.0, (100, 100, 100)),
        ("F", 1e9, (255, 255, 255)),
        ("F", -5.0, (0, 0, 0)),
        ("LAB", (128, 128, 128), (119, 119, 119)),
        ("HSV", (0, 0, 90), (90, 90, 90)),
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
    first = np.moveaxis(array, 2, 0)
    same = [Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1), first, array.astype(np.int64)]
    same += [array / 255, (array / 255).astype(np.float32), torch.from_numpy(first) / 255, array.astype(np.float64)]
    same += [array.astype(np.uint16) * 257, np.dstack([array, np.full((40, 40), 255, np.uint8)])]
    batch = processor(same, return_tensors="pt")
    assert batch["pixel_values"].shape == (len(same), 3, 32, 32)
    for other in batch["pixel_values"][1:]:
        torch.testing.assert_close(batch["pixel_values"][0], other)
    for batched in (np.stack([array, array]), torch.from_numpy(np.stack([first, first])), [[array], [first]]):
        torch.testing.assert_close(processor(batched, return_tensors="pt")["pixel_values"], batch["pixel_values"][:2])


PROCESSORS = [
    tiny.clip_processor,
    tiny.blip_processor,
    tiny_blip2.stage1_processor,
    tiny_blip2.stage2_processor,
    tiny_blip2.instruct_processor,
    tiny_llava.llava_processor,
]
GREY = np.full((40, 50), 100, np.uint8)
ARRAYS = {
    "height, width": (GREY, 100),
    "one channel last": (GREY[..., None], 100),
    "one channel first": (GREY[None], 100),
    "RGBA": (np.dstack([GREY] * 3 + [GREY * 0]), 255),
    "RGBA first": (np.stack([GREY] * 4), 194),  # 100 at an opacity of 100/255, on white
    "booleans": (GREY > 5, 255),
    "a white float image": (np.ones((40, 50, 3)), 255),
    "floats up to 255": (GREY.astype(np.float32), 100),
    "floats up to 65535": (GREY * 257.0, 100),
    "16 bits": (GREY.astype(np.uint16) * 257, 100),
    "wider integers": (GREY.astype(np.int64) * 257, 100),
    "not a number": (GREY * np.nan, 0),
    "a tensor": (torch.from_numpy(GREY), 100),
    "a tensor in bfloat16": (torch.full((3, 40, 50), 0.5, dtype=torch.bfloat16), 128),
    "a tensor with a gradient": (torch.full((3, 40, 50), 0.5, requires_grad=True), 128),
    "a row of RGB": (np.stack([np.dstack([GREY] * 3)[0]]), 100),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_every_array_has_its_values(name):
    array, expected = ARRAYS[name]
    assert np.abs(pixels_of(array) - expected).max() < 1
    assert np.abs(pixels_of([array]) - expected).max() < 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((6, 5, 7)), r"An array of shape \(6, 5, 7\) is not an image: give \(height, width\), or 1, 3 or 4"),
        (np.zeros((0, 5)), "of shape"),
        (np.zeros(5), "of shape"),
        (np.zeros((2, 2, 2, 2, 2)), "of shape"),
        (np.full((40, 50, 3), -1.8), "An array with values from -1.8 is not an image: give 0 to 1, 0 to 255"),
        (np.array([["a"]]), "with values of type"),
        (5, "int is not an image: give a PIL image, array, tensor, path or URL"),
        (None, "NoneType is not an image"),
        ("no/such.png", "no/such.png: no such file, and neither a URL nor base64; correct the path"),
        ("iVBORw0KGgo=" * 9999, r"\(119,908 more characters\): no such file"),
        ("AAAA" * 9999, r"\(39,916 more characters\) \(no file, read as base64\): not an image"),
    ],
)
def test_other_images_are_refused_in_a_short_line(value, message):
    for given in (value, [value]):
        with pytest.raises(ImageError, match=message) as caught:
            VlmImageProcessor()(given)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [[], [[], []]])
def test_no_images_are_refused(images):
    with pytest.raises(ImageError, match="There are no images: give at least one"):
        VlmImageProcessor()(images)


def test_files_and_base64_are_read_as_sources_read_them(tmp_path):
    """transformers drops transparency, and starts Ghostscript for an EPS file."""
    image = transparent("RGBA")
    image.save(tmp_path / "a.png")
    coded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", coded, f"data:image/png;base64,{coded}"):
        assert np.array_equal(pixels_of(source), pixels_of(image))
    image.convert("RGB").save(tmp_path / "b.eps")
    with pytest.raises(ImageError, match=r"b\.eps: not an image, or in a format that is not read"):
        VlmImageProcessor()(str(tmp_path / "b.eps"))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_processor_reads_every_kind_of_image(processor, tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    processor = processor()
    same = [GREY, GREY[..., None], torch.from_numpy(GREY)[None], Image.fromarray(GREY), str(tmp_path / "a.png")]
    expected = processor(images=Image.fromarray(GREY))["pixel_values"]
    for image in same:
        assert torch.equal(processor(images=image)["pixel_values"], expected)
    assert torch.equal(processor(images=same)["pixel_values"], expected.repeat(5, 1, 1, 1))
    assert torch.equal(processor(images=np.stack([GREY[..., None]] * 2))["pixel_values"], expected.repeat(2, 1, 1, 1))
    with pytest.raises(ImageError, match="set is not an image"):
        processor(images={5})
    if getattr(processor, "image_token", None):
        inputs = processor(images=same[:2], text=["<image>a cat", "<image>a dog"])
        assert torch.equal(inputs["pixel_values"], expected.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pil_image_is_turned_as_sources_turn_it(orientation, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(upright), np.asarray(image)) == (orientation == 1)
    with Image.open(tmp_path / "a.png") as raw:
        decoded = raw.convert("RGB")  # keeps the metadata
        for one in (raw, decoded, upright, ImageOps.exif_transpose(raw), str(tmp_path / "a.png")):
            assert np.array_equal(pixels_of(one).round(), np.asarray(upright))
    processed = VlmImageProcessor().process_image(decoded)
    assert np.array_equal(pixels_of(processed).round(), np.asarray(upright))


def test_saved_and_loaded(tmp_path):
    processor = VlmImageProcessor(size={"height": 48, "width": 32}, resize_mode="pad", image_mean=[0.5, 0.4, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = VlmImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 32)
    torch.testing.assert_close(loaded(image, return_tensors="pt")["pixel_values"], pixels)
