"""Augmentation of training images: determinism, shape and range, what each step changes and what it keeps."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hf_vlm.data.batches.augment import Augmentation

STILL = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
VARIATIONS = {  # each alone changes a drawing
    "flip": 1.0,
    "rotation": 30.0,
    "zoom": (0.5, 0.6),
    "stretch": 2.0,
    "shear": 0.5,
    "shift": 0.2,
    "wobble": 0.05,
    "background": 1.0,
    "hue": 0.3,
    "saturation": 0.9,
    "brightness": 0.5,
    "contrast": 0.5,
    "grey": 1.0,
    "shade": 0.5,
    "unline": 1.0,
    "ink": 1.0,
    "blur": 1.0,
    "noise": 0.2,
    "erase": 1.0,
}


def drawing(side: int = 48) -> Image.Image:
    """A red disc with a dark outline, off the middle of a transparent square."""
    image = Image.new("RGBA", (side, side))
    box = (side // 8, side // 4, side // 2, side // 4 + 3 * side // 8)
    ImageDraw.Draw(image).ellipse(box, fill=(220, 40, 30, 255), outline=(10, 10, 10, 255))
    return image


def photo(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def on_white(image: Image.Image, size: int) -> torch.Tensor:
    small = image.resize((size, size), Image.Resampling.BILINEAR)
    white = Image.new("RGBA", small.size, "white")
    white.alpha_composite(small)
    return torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("augment", [Augmentation(), Augmentation.blip(), Augmentation.photo(), Augmentation.drawing()])
def test_any_sizes_and_both_modes_give_a_batch_in_range(augment: Augmentation) -> None:
    images = [drawing(), photo(), photo(20, 200), photo(200, 20), drawing(7), Image.new("RGB", (1, 1))]
    pixels = augment(images, 32, [1, 2, 3])
    assert pixels.shape == (6, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1


@pytest.mark.parametrize("augment", [Augmentation(), Augmentation.blip(), Augmentation.photo(), Augmentation.drawing()])
def test_the_seed_alone_decides(augment: Augmentation) -> None:
    images = [drawing(), photo()]
    first = augment(images, 32, [5, 17])
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(augment(images, 32, [5, 17]), first)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    for other in ([17, 5], [5], [5, 17, 0, 1], [5, 2**63]):
        assert not torch.equal(augment(images, 32, other), first)


def test_pictures_of_a_batch_vary_apart() -> None:
    pixels = Augmentation.drawing()([drawing()] * 4, 32, [0])
    assert all(not torch.equal(pixels[0], other) for other in pixels[1:])


def test_the_pictures_given_stay_as_they_are() -> None:
    images = [drawing(), photo()]
    before = [image.tobytes() for image in images]
    Augmentation.drawing()(images, 32, [0])
    assert [image.tobytes() for image in images] == before


def test_without_variations_a_picture_is_only_resized_and_laid_on_white() -> None:
    torch.testing.assert_close(STILL([drawing()], 24, [0])[0], on_white(drawing(), 24), atol=0.02, rtol=0)


def test_every_field_is_covered_here() -> None:
    assert {field.name for field in fields(Augmentation)} == {*VARIATIONS, "crop_scale", "crop_ratio", "rand_augment"}


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_variation_changes_a_drawing(name: str) -> None:
    still = STILL([drawing()] * 4, 48, [3])
    varied = replace(STILL, **{name: VARIATIONS[name]})([drawing()] * 4, 48, [3])
    assert (varied - still).abs().max() > 0.1


def test_a_crop_has_the_share_and_ratio_asked_for() -> None:
    ramp = np.zeros((100, 100, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(100)[:, None]
    augment = replace(STILL, crop_scale=(0.25, 0.36), crop_ratio=(0.8, 1.25))
    pixels = augment([Image.fromarray(ramp)] * 64, 50, [0]) * 255
    width = (pixels[:, 0, 0, -1] - pixels[:, 0, 0, 0]) * 50 / 49
    height = (pixels[:, 1, -1, 0] - pixels[:, 1, 0, 0]) * 50 / 49
    share, ratio = width * height / 100**2, width / height
    assert share.min() > 0.22
    assert share.max() < 0.39
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35


def test_mirroring() -> None:
    mirrored = replace(STILL, flip=1.0)([drawing()], 48, [0])
    torch.testing.assert_close(mirrored, STILL([drawing()], 48, [0]).flip(-1), atol=1e-4, rtol=0)
    some = replace(STILL, flip=0.5)([drawing()] * 200, 16, [0])
    is_mirrored = (some - STILL([drawing()], 16, [0])).abs().amax(dim=(1, 2, 3)) > 0.1
    assert 70 < is_mirrored.sum() < 130


def test_zoom_keeps_the_middle_and_scales_the_area() -> None:
    disc = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(disc).ellipse((16, 16, 47, 47), fill=(0, 0, 0, 255))
    dark = 1 - replace(STILL, zoom=(0.5, 0.5))([disc], 64, [0])[0, 0]
    assert dark.sum() == pytest.approx(np.pi * 8**2, rel=0.1)
    assert (dark.sum(dim=0) * torch.arange(64)).sum() / dark.sum() == pytest.approx(31.5, abs=0.5)


def test_a_quarter_turn_turns_and_does_not_distort() -> None:
    bar = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(bar).rectangle((12, 28, 51, 35), fill=(0, 0, 0, 255))
    dark = 1 - replace(STILL, rotation=90.0)([bar] * 32, 64, [0])[:, 0]
    assert dark.sum(dim=(1, 2)) == pytest.approx(np.full(32, 40 * 8), rel=0.05)
    assert dark[:, 12:20, 28:36].mean(dim=(1, 2)).max() > 0.5  # some bars reach where only a turned bar can


def test_colour_leaves_shapes_and_the_white_ground_alone() -> None:
    augment = replace(STILL, hue=0.5, saturation=0.9, brightness=0.5, contrast=0.5)
    pixels = augment([drawing()] * 8, 48, [1])
    empty = torch.from_numpy(np.array(drawing()))[..., 3] == 0
    assert (pixels.permute(0, 2, 3, 1)[:, empty] > 0.99).all()
    disc = pixels[:, :, 20, 14]
    assert (disc.amax(dim=0) - disc.amin(dim=0)).min() > 0.1


def test_grey_keeps_the_luma() -> None:
    image = Image.new("RGB", (8, 8), (200, 40, 90))
    grey = replace(STILL, grey=1.0)([image], 8, [0])[0, :, 4, 4]
    expected = (0.299 * 200 + 0.587 * 40 + 0.114 * 90) / 255
    torch.testing.assert_close(grey, torch.full((3,), expected), atol=2e-3, rtol=0)


def test_the_background_is_one_random_colour_and_the_drawing_stays() -> None:
    pixels = replace(STILL, background=1.0)([drawing()] * 8, 48, [0])
    corners = pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.equal(corners, corners[:, :, :1].expand_as(corners))
    assert len({tuple(colour.tolist()) for colour in corners[:, :, 0]}) == 8
    still = STILL([drawing()], 48, [0])[0, :, 20, 14]
    torch.testing.assert_close(pixels[:, :, 20, 14], still.expand(8, -1), atol=1e-5, rtol=0)


def test_what_transparency_hides_never_shows() -> None:
    hidden = np.array(drawing())
    hidden[hidden[..., 3] == 0] = (0, 255, 0, 0)
    augment = replace(Augmentation.drawing(), noise=0.0, erase=0.0)
    assert torch.equal(augment([Image.fromarray(hidden)] * 4, 24, [0]), augment([drawing()] * 4, 24, [0]))


def test_thin_lines_go_and_are_drawn() -> None:
    lined = Image.new("RGB", (32, 32), (240, 200, 40))
    ImageDraw.Draw(lined).line((16, 0, 16, 31), fill=(0, 0, 0), width=1)
    plain = replace(STILL, unline=1.0)([lined], 32, [0])[0]
    torch.testing.assert_close(plain, plain[:, :1, :1].expand_as(plain))
    halves = Image.new("RGB", (32, 32), (240, 200, 40))
    ImageDraw.Draw(halves).rectangle((16, 0, 31, 31), fill=(40, 90, 240))
    inked = replace(STILL, ink=1.0)([halves], 32, [0])[0].mean(dim=(0, 1))
    assert inked[15:17].max() < 0.5 * inked[[4, 28]].min()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA", "I;16"])
def test_another_mode_is_refused_with_its_place(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"image 1 of the batch has mode {mode}: convert it to RGB or RGBA"):
        Augmentation.photo()([photo(), Image.new(mode, (8, 8))], 16, [0])


def test_no_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        Augmentation()([], 16, [0])
