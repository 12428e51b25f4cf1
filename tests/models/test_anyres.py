"""Images of any resolution: layouts, pixels and order of tokens against transformers' LLaVA-NeXT, for many sizes."""

import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from cases import tiny, tiny_blip2, tiny_llava
from cases.tiny_llava import GRIDS
from hf_vlm import VlmImageProcessor
from hf_vlm.models.anyres import AnyresLayout, anyres_layout, anyres_views, join_views

# Grids, side of a tile and of a patch: the tests', LLaVA-1.6's, and patches that do not divide a tile.
PAPER = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SETTINGS = {"tiny": (GRIDS, 32, 8), "paper": (PAPER, 336, 14), "odd": ([[384, 768], [768, 384], [768, 768]], 384, 14)}
SIDES = [1, 2, 7, 31, 32, 33, 63, 64, 65, 97, 224, 335, 336, 337, 500, 672, 673, 1000, 1344, 4000]
DRAWN = random.Random(0)
ALL_SIZES = [(high, wide) for high in SIDES for wide in SIDES]
ALL_SIZES += [(DRAWN.randint(1, 3000), DRAWN.randint(1, 3000)) for _ in range(300)]
# (width, height); the last are so long that a side of what is shown is less than a patch.
PICTURES = [
    (32, 32),
    (40, 36),
    (36, 40),
    (100, 30),
    (30, 90),
    (64, 64),
    (65, 63),
    (7, 5),
    (200, 50),
    (300, 4),
    (3, 170),
]


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request: pytest.FixtureRequest) -> tuple[list[list[int]], int, int]:
    return request.param


def native_processor(grids: list[list[int]], patch: int) -> LlavaNextProcessor:
    """What counts tokens there; it needs nothing but these."""
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=grids)
    processor.patch_size, processor.num_additional_image_tokens = patch, 1
    return processor


def shown(size: tuple[int, int], layout: AnyresLayout) -> torch.Tensor:
    """The patches, numbered row by row, that transformers leaves of the grid."""
    grid = torch.arange(layout.rows * layout.columns * layout.side**2)
    return unpad_image(grid.view(1, layout.rows * layout.side, layout.columns * layout.side), size)[0]


def test_layouts_equal_transformers_for_all_sizes(setting: tuple) -> None:
    grids, tile, patch = setting
    counter = native_processor(grids, patch)
    found_layouts = set()
    for size in ALL_SIZES:
        layout = anyres_layout(size, grids, tile, patch)
        found_layouts.add(layout)
        assert layout.num_views == image_size_to_num_patches(size, grids, tile), size
        assert (layout.rows, layout.columns) == tuple(get_anyres_image_grid_shape(size, grids, tile)), size
        assert layout.num_tokens == counter._get_number_of_features(*size, tile, tile) - 1, size  # no class token
        wanted = shown(size, layout)
        assert (layout.height, layout.width) == wanted.shape, size
        if wanted.numel():
            assert layout.top * layout.columns * layout.side + layout.left == wanted[0, 0], size
    assert len(found_layouts) > 20


def test_sizes_may_be_lists_and_tensors() -> None:
    expected = anyres_layout((40, 100), GRIDS, 32, 8)
    assert anyres_layout([40, 100], GRIDS, 32, 8) == expected
    assert anyres_layout(torch.tensor([40, 100]), GRIDS, 32, 8) == expected
    assert anyres_layout((40, 100), [tuple(grid) for grid in GRIDS], 32, 8) == expected
    assert anyres_layout((100, 40), GRIDS, 32, 8) != expected


def native_images(grids: list[list[int]], tile: int) -> LlavaNextImageProcessorPil:
    size = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    return LlavaNextImageProcessorPil(**size, image_grid_pinpoints=grids)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_pixels_equal_transformers(resample: Image.Resampling) -> None:
    native = native_images(GRIDS, 32)
    own = VlmImageProcessor(
        size={"height": 32, "width": 32}, resize_mode="anyres", image_grid_pinpoints=GRIDS, resample=resample
    )
    images = [tiny.image(*size, seed=i) for i, size in enumerate(PICTURES)]
    found = own(images, return_tensors="pt")
    wanted = native(images, return_tensors="pt", resample=resample)
    assert torch.equal(found["image_sizes"], wanted["image_sizes"])
    counts = [anyres_layout(size, GRIDS, 32, 8).num_views for size in found["image_sizes"]]
    assert len({*counts}) > 2
    for views, padded, count, size in zip(
        found["pixel_values"].split(counts), wanted["pixel_values"], counts, PICTURES, strict=True
    ):
        torch.testing.assert_close(views, padded[:count], atol=1e-5, rtol=0, msg=lambda text, s=size: f"{s}: {text}")
        assert not padded[count:].any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_pixels_of_other_colour_modes_are_those_of_rgb(mode: str) -> None:
    own = tiny_llava.llava_processor(anyres=True).image_processor
    image = tiny.image(100, 30).convert(mode)
    found = own(image, return_tensors="pt")
    assert torch.equal(found["pixel_values"], own(image.convert("RGB"), return_tensors="pt")["pixel_values"])
    assert found["image_sizes"].tolist() == [[30, 100]]


def test_the_overview_comes_first_and_then_the_tiles_row_by_row() -> None:
    """An image of four colours that fills its grid: each tile has one colour."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    image = Image.new("RGB", (64, 64))
    for i, colour in enumerate(colours):
        image.paste(colour, (i % 2 * 32, i // 2 * 32, i % 2 * 32 + 32, i // 2 * 32 + 32))
    overview, *tiles = anyres_views(image, [[64, 64]], 32, Image.Resampling.BICUBIC)
    assert [tile.getcolors() for tile in tiles] == [[(32 * 32, colour)] for colour in colours]
    assert overview.size == (32, 32)
    assert [overview.getpixel(corner) for corner in ((0, 0), (31, 0), (0, 31), (31, 31))] == colours


@pytest.mark.parametrize("setting_name", ["tiny", "paper"])
def test_order_of_tokens_equals_transformers(setting_name: str) -> None:
    grids, tile, patch = SETTINGS[setting_name]
    newline = torch.randn(3)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=patch), image_grid_pinpoints=grids
    )
    for size in ALL_SIZES[:: 7 if setting_name == "tiny" else 70]:
        layout = anyres_layout(size, grids, tile, patch)
        views = torch.randn(layout.num_views, layout.side**2, 3)
        wanted, _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config), [views], [size], "default", newline
        )
        assert torch.equal(join_views(views, layout, newline), wanted[0]), size
        assert len(wanted[0]) == layout.num_tokens


def test_placeholders_are_as_many_as_the_models_tokens_for_all_sizes() -> None:
    """The processor counts by size, the model by what it lays out."""
    processor, model = tiny_llava.llava_processor(anyres=True), tiny_llava.llava_model(anyres=True)
    sizes = torch.tensor(ALL_SIZES)
    num_views = sum(anyres_layout(size, GRIDS, 32, 8).num_views for size in ALL_SIZES)
    with torch.no_grad():
        tokens = model.model.projector(torch.zeros(num_views, 16, 32), sizes)
    assert [len(one) for one in tokens] == [processor.num_image_tokens(*size) for size in ALL_SIZES]


def test_texts_get_as_many_placeholders_as_the_model_wants() -> None:
    """With images of all small sizes, in one batch, through the tower."""
    processor, model = tiny_llava.llava_processor(anyres=True), tiny_llava.llava_model(anyres=True)
    sizes = [size for size in ALL_SIZES if max(size) <= 500][::3]
    images = [tiny.image(wide, high, seed=i) for i, (high, wide) in enumerate(sizes)]
    inputs = processor(images=images, text=["a <image> tree"] * len(images))
    assert inputs["image_sizes"].tolist() == [[*size] for size in sizes]
    found = (inputs["input_ids"] == tiny_blip2.IMAGE_TOKEN_ID).sum(dim=1).tolist()
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        assert found == [len(tokens) for tokens in features.pooler_output]
        inputs.pop("pixel_values")
        assert model(**inputs, mm_encoder_outputs={"image": features}).logits.isfinite().all()


def test_class_tokens_are_refused_in_one_line() -> None:
    layout = anyres_layout((32, 64), GRIDS, 32, 8)
    with pytest.raises(ValueError, match='drop the class token with vision_feature_select_strategy="default"'):
        join_views(torch.zeros(layout.num_views, 17, 3), layout, torch.zeros(3))


def test_tiles_need_grids_and_squares() -> None:
    for options in ({}, {"image_grid_pinpoints": GRIDS, "size": {"height": 32, "width": 64}}):
        processor = VlmImageProcessor(**{"size": {"height": 32, "width": 32}, **options}, resize_mode="anyres")
        with pytest.raises(ValueError, match="needs image_grid_pinpoints and square tiles"):
            processor(tiny.image())
