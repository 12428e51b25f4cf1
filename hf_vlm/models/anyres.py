"""LLaVA-1.6's "anyres": an image of any resolution becomes an overview and the tiles of the best-fitting grid.

- [`anyres_layout`] computes the number of tiles and tokens from the image size. Image processor, processor and model
  all call it, so their counts agree.
- A *view* is the overview or a tile. Sizes are (height, width).

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next; rounding follows the published models.
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
    """The tiles of an image, and the patches of the grid that show the image.

    Args:
        rows, columns: Number of tiles in each direction.
        top, left, height, width: Rectangle of patches that shows the image; the other patches are padding.
        side: Patches per side of a tile.
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
        """Number of tiles plus the overview."""
        return 1 + self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """Number of overview patches, of grid patches that show the image, and of newlines, one per row."""
        return self.side**2 + self.height * (self.width + 1)


def grid_shape(size: tuple[int, int], grids: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The grid, in pixels, that keeps the most resolution of an image and, among equals, has the least padding."""
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
        size: Height and width of the image in pixels.
        grids: `image_grid_pinpoints` of the config.
        tile: Side of a tile in pixels, the tower's image size.
        patch: Side of a patch in pixels.
    """
    height, width = (int(pixels) for pixels in size)
    return _layout((height, width), tuple((int(high), int(wide)) for high, wide in grids), tile, patch)


def anyres_views(
    image: Image.Image, grids: Sequence[Sequence[int]], tile: int, resample: Image.Resampling
) -> list[Image.Image]:
    """The overview and the tiles, row by row, of an RGB image; padding is black."""
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
        layout: The layout of the image.
        newline: `(H,)`, appended to each row of patches.

    Returns:
        `(num_tokens, H)`.

    Raises:
        ValueError: if a view has more or fewer tokens than patches, for example a class token.
    """
    hidden = views.shape[-1]
    if views.shape[1] != layout.side**2:
        raise ValueError(
            f"A view has {views.shape[1]} tokens for {layout.side}x{layout.side} patches: drop the class token with "
            'vision_feature_select_strategy="default", and use a tower without registers.'
        )
    grid = views[1:].view(layout.rows, layout.columns, layout.side, layout.side, hidden)
    grid = grid.transpose(1, 2).reshape(layout.rows * layout.side, layout.columns * layout.side, hidden)
    shown = grid[layout.top : layout.top + layout.height, layout.left : layout.left + layout.width]
    ends = newline.to(grid.dtype).expand(layout.height, 1, hidden)
    return torch.cat([views[0], torch.cat([shown, ends], dim=1).flatten(0, 1)])


__all__ = ["AnyresLayout", "anyres_layout", "anyres_views", "join_views"]
