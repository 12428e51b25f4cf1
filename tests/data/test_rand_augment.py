"""RandAugment: which operations are drawn, what each does at which magnitude, and that the seed alone decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlm.data import Augmentation
from hf_vlm.data.batches.rand_augment import OPERATIONS, RandAugment
from hf_vlm.runs.arguments import BlipDataArguments
from hf_vlm.runs.catalogue import find_recipe
from hf_vlm.runs.data import find_augmentation

SIDE = 28
MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def ramp() -> Image.Image:
    """Red grows to the right, green downwards, from 40 to 202; blue is one value."""
    x = np.broadcast_to(40 + 6 * np.arange(SIDE), (SIDE, SIDE))
    return Image.fromarray(np.stack([x, x.T, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def grain() -> Image.Image:
    """Random pixels, dark ones more often: every operation changes it in its own way."""
    pixels = np.random.default_rng(0).beta(2, 5, (SIDE, SIDE, 3))
    return Image.fromarray((30 + 170 * pixels).astype(np.uint8))


def draws(augment: RandAugment, count: int = 400, seed: int = 0) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(grain())).permute(2, 0, 1).float().div(255).expand(count, -1, -1, -1)
    return augment(pixels, torch.Generator().manual_seed(seed))


def test_the_ten_operations_of_the_paper() -> None:
    assert set(OPERATIONS) == {"identity", "auto_contrast", "equalize", "brightness", "sharpness", *MOVES}


def test_one_certain_operation_gives_its_results_and_nothing_else() -> None:
    """Every image is the result of one operation in one direction, all about equally often."""
    results = draws(RandAugment(count=1, magnitude=8, probability=1.0), count=2000)
    expected = {
        (name, way): torch.from_numpy(np.array(operation(grain(), 0.8, way))).permute(2, 0, 1) / 255
        for name, operation in OPERATIONS.items()
        for way in (1, -1)
    }
    found = {key: int((results == image).flatten(1).all(dim=1).sum()) for key, image in expected.items()}
    for name in MOVES:
        assert all(60 < found[name, way] < 140 for way in (1, -1))
    for name in set(OPERATIONS) - set(MOVES):
        assert found[name, 1] == found[name, -1]
        assert 140 < found[name, 1] < 260
    assert sum(found[name, 1] + found[name, -1] * (name in MOVES) for name in OPERATIONS) == 2000


def test_each_is_done_with_its_probability() -> None:
    """With two draws, and all operations but identity changing the image, (1 - p + p / 10) squared stay unchanged."""
    results = draws(RandAugment(magnitude=8), count=2000)
    unchanged = (results == draws(RandAugment(count=0), count=1)).flatten(1).all(dim=1).float().mean()
    assert unchanged == pytest.approx((0.5 + 0.5 / 10) ** 2, abs=0.035)


def test_magnitude_nought_moves_nothing_and_ten_is_the_largest() -> None:
    image = ramp()
    for name in MOVES:
        assert OPERATIONS[name](image, 0.0, 1).tobytes() == image.tobytes()
    assert (
        OPERATIONS["rotate"](image, 1.0, 1).tobytes()
        == image.rotate(30, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)).tobytes()
    )
    dark = np.array(OPERATIONS["brightness"](image, 0.0, 1)).astype(int)
    assert np.abs(dark - np.array(image) * 0.1).max() <= 1
    assert np.array_equal(np.array(OPERATIONS["brightness"](image, 1.0, 1))[0, 0], [76, 76, 171])


def test_magnitude_five_leaves_brightness_and_sharpness() -> None:
    for name in ("brightness", "sharpness"):
        assert OPERATIONS[name](grain(), 0.5, 1).tobytes() == grain().tobytes()


def test_moves_go_as_far_as_they_say_and_are_filled_with_grey() -> None:
    """At the largest, 28 pixels shift by 10 / 224 of them, 1.25, and row 20 slants by 6: red steps by 6 a pixel."""
    right = np.array(OPERATIONS["translate_x"](ramp(), 1.0, -1)).astype(int)
    assert np.abs(np.array(ramp())[:, 3:-2, 0] - right[:, 3:-2, 0] - 1.25 * 6).max() <= 1
    assert right[5, 0].tolist() == [128, 128, 128]
    slanted = np.array(OPERATIONS["shear_x"](ramp(), 1.0, 1)).astype(int)
    assert np.abs(slanted[20, 2:18, 0] - np.array(ramp())[20, 2:18, 0] - 0.3 * 20.5 * 6).max() <= 1
    assert slanted[27, 27].tolist() == [128, 128, 128]


def test_contrast_and_histogram_fill_the_range() -> None:
    for name in ("auto_contrast", "equalize"):
        spread = np.array(OPERATIONS[name](ramp(), 0.5, 1))
        assert (spread[..., 0].min(), spread[..., 0].max()) == (0, 255)


def test_pictures_vary_apart_and_follow_the_seed_alone() -> None:
    augment = Augmentation.blip()
    first = augment([ramp()] * 8, SIDE, [4, 5])
    assert len({tuple(picture.flatten().tolist()) for picture in first}) == 8
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(augment([ramp()] * 8, SIDE, [4, 5]), first)
    assert not torch.equal(augment([ramp()] * 8, SIDE, [5, 4]), first)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]


def test_it_comes_after_all_else() -> None:
    """Without its operations, crop and flip are what they are without it; shape and range hold with transparency."""
    plain = Augmentation()([ramp()] * 4, SIDE, [7])
    assert torch.equal(replace(Augmentation.blip(), rand_augment=RandAugment(count=0))([ramp()] * 4, SIDE, [7]), plain)
    assert Augmentation.blip() == replace(Augmentation(), rand_augment=RandAugment(2, 5, 0.5))
    clear = Image.new("RGBA", (9, 50), (0, 255, 0, 0))
    pixels = Augmentation.blip()([clear, ramp()] * 8, 16, [1])
    assert pixels.shape == (16, 3, 16, 16)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert (pixels[::2, :, 8, 8] == 1).float().mean() > 0.5  # transparency is laid on white before


@pytest.mark.parametrize("wrong", [{"count": -1}, {"magnitude": 10.1}, {"magnitude": -1}, {"probability": 1.5}])
def test_arguments_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="magnitude 0 to 10"):
        RandAugment(**wrong)


def test_the_published_recipe_takes_it() -> None:
    assert find_augmentation(BlipDataArguments().augmentation) == Augmentation.blip()
    paper = find_recipe("blip_pretrain").find_config("paper")
    assert "\naugmentation: blip\n" in paper.read_text()
