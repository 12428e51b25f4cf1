"""Images of any resolution, as LLaVA-1.6 sees them: an overview, and the tiles of the grid that fits best.

One function, [`anyres_layout`], says how many tiles and tokens an image of a given size becomes; image processor,
processor and model all ask it, so that they cannot disagree. Sizes are (height, width).

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next; the rounding is that of the published models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution


@dataclass(frozen=True)
class AnyresLayout:
    """What becomes of an image.

    Args:
        rows, columns: Tiles of the grid.
        top, left, height, width: The part of the grid's patches that shows the image; the rest is padding.
        side: Patches a side of a tile.
    """

    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int
    side: int

    @property
    def num_views(self) -> int:
        """Tiles, and the overview before them."""
        return 1 + self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """Patches of the overview, patches of the grid that show the image, and a newline a row."""
        return self.side**2 + self.height * (self.width + 1)


def grid_shape(size: tuple[int, int], grids: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The grid, in pixels, in which an image keeps most of its resolution and wastes least."""
    return select_best_resolution(size, grids)


@lru_cache(maxsize=4096)
def _layout(size: tuple[int, int], grids: tuple[tuple[int, int], ...], tile: int, patch: int) -> AnyresLayout:
    (height, width), side = grid_shape(size, grids), tile // patch
    rows, columns = height // tile, width // tile
    high, wide = rows * side, columns * side  # in patches
    if size[1] / size[0] > wide / high:
        shown = int(round(size[0] * (wide / size[1]), 7))
        top = (high - shown) // 2
        return AnyresLayout(rows, columns, top, 0, high - 2 * top, wide, side)
    shown = int(round(size[1] * (high / size[0]), 7))
    left = (wide - shown) // 2
    return AnyresLayout(rows, columns, 0, left, high, wide - 2 * left, side)


def anyres_layout(size: Sequence[int], grids: Sequence[Sequence[int]], tile: int, patch: int) -> AnyresLayout:
    """The layout of an image.

    Args:
        size: Its height and width in pixels.
        grids: `image_grid_pinpoints` of the config.
        tile: Side of a tile in pixels, the tower's image size.
        patch: Side of a patch in pixels.
    """
    height, width = (int(pixels) for pixels in size)
    return _layout((height, width), tuple((int(high), int(wide)) for high, wide in grids), tile, patch)


def anyres_views(
    image: Image.Image, grids: Sequence[Sequence[int]], tile: int, resample: Image.Resampling
) -> list[Image.Image]:
    """The overview and the tiles of an RGB image, row by row; the grid around the image is black."""
    height, width = grid_shape((image.height, image.width), grids)
    by_width, by_height = width / image.width, height / image.height
    if by_width < by_height:
        resized = image.resize((width, min(math.ceil(image.height * by_width), height)), resample)
    else:
        resized = image.resize((min(math.ceil(image.width * by_height), width), height), resample)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - resized.width) // 2, (height - resized.height) // 2))
    corners = [(left, top) for top in range(0, height, tile) for left in range(0, width, tile)]
    tiles = [canvas.crop((left, top, left + tile, top + tile)) for left, top in corners]
    return [image.resize((tile, tile), resample), *tiles]


def join_views(views: torch.Tensor, layout: AnyresLayout, newline: torch.Tensor) -> torch.Tensor:
    """The tokens of an image.

    Args:
        views: `(num_views, side * side, H)`, the overview first.
        layout: Of the image.
        newline: `(H,)`, put after each row of patches.

    Returns:
        `(num_tokens, H)`.

    Raises:
        ValueError: if a view has another number of tokens than patches, as with a class token.
    """
    hidden = views.shape[-1]
    if views.shape[1] != layout.side**2:
        raise ValueError(
            f"A view has {views.shape[1]} tokens for {layout.side}x{layout.side} patches: leave out the class token "
            'with vision_feature_select_strategy="default", and take a tower without registers.'
        )
    grid = views[1:].view(layout.rows, layout.columns, layout.side, layout.side, hidden)
    grid = grid.transpose(1, 2).reshape(layout.rows * layout.side, layout.columns * layout.side, hidden)
    shown = grid[layout.top : layout.top + layout.height, layout.left : layout.left + layout.width]
    ends = newline.to(grid.dtype).expand(layout.height, 1, hidden)
    return torch.cat([views[0], torch.cat([shown, ends], dim=1).flatten(0, 1)])


__all__ = ["AnyresLayout", "anyres_layout", "anyres_views", "join_views"]
