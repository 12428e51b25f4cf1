"""Rows about images (texts to match, questions to answer), taken so that every image is encoded once.

- The images that rows ask about are encoded a block at a time, in their order; never more than a block is in memory.
- By default `model` is any whose body `model.model` has `encode_images(pixel_values)`, such as BLIP's heads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Block:
    """Rows and their images.

    Attributes:
        states: `(I, P, width)`, the patch states of the block's images.
        rows: `(B,)`, numbers of the rows that ask about them.
        places: `(B,)`, each row's image as a place in `states`, on the same device.
    """

    states: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


def image_blocks(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    image_of_row: torch.Tensor | Sequence[int],
    batch_size: int,
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[Block]:
    """The rows in the order of their images.

    Args:
        images: anything with a length and integer indices; an image that no row asks about is not read.
        image_of_row: `(rows,)`, which image each row asks about.
        batch_size: images a block.
        encode: from pixels to states; by default `model.model.encode_images`.

    Raises:
        ValueError: there are no rows, or a row asks about an image that is not there.
    """
    wanted = torch.as_tensor(image_of_row)
    if len(wanted) == 0:
        raise ValueError("there is nothing to ask about the images: no rows")
    wrong = ((wanted < 0) | (wanted >= len(images))).nonzero()
    if len(wrong) > 0:
        row = int(wrong[0])
        raise ValueError(f"row {row} asks about image {int(wanted[row])}, and there are {len(images)}")
    order = wanted.argsort(stable=True)
    needed, counts = wanted.unique(return_counts=True)
    ends = counts.cumsum(0)
    for start in range(0, len(needed), batch_size):
        block = slice(start, start + batch_size)
        batch = [images[i] for i in needed[block].tolist()]
        pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
        states = (encode or model.model.encode_images)(pixel_values.to(model.device, model.dtype))
        rows = order[int(ends[start] - counts[start]) : int(ends[block][-1])]
        places = torch.arange(len(batch)).repeat_interleave(counts[block])
        yield Block(states, rows, places.to(states.device))


__all__ = ["Block", "image_blocks"]
