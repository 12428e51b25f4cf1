"""Iteration over rows about images (texts to match, questions to answer) that encodes every image only once.

- Images are encoded one block at a time, in order; only one block of hidden states is in memory.
- By default the images are encoded by `model.model.encode_images(pixel_values)`, which BLIP's heads have.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

DECODED = 8  # images decoded at a time


@dataclass(frozen=True)
class Block:
    """Encoded images and the rows about them.

    Attributes:
        states: `(I, P, width)`, the patch states of the block's images.
        rows: `(B,)`, indices of the rows about these images.
        places: `(B,)`, the index in `states` of each row's image, on the same device.
    """

    states: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


def read_pixels(processor: ProcessorMixin, images: Sequence[Image.Image], rows: Sequence[int]) -> torch.Tensor:
    """The pixels `(rows, ...)` of some images. Only a few images are decoded at a time: a large one takes 36 MB."""
    parts = [rows[start : start + DECODED] for start in range(0, len(rows), DECODED)]
    pixels = [processor(images=[images[row] for row in part], return_tensors="pt")["pixel_values"] for part in parts]
    return torch.cat(pixels)


def image_blocks(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    image_of_row: torch.Tensor | Sequence[int],
    batch_size: int,
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[Block]:
    """All rows, block by block, sorted by image.

    Args:
        images: Any sequence of images; an image without rows is not read.
        image_of_row: `(rows,)`, the image of each row.
        batch_size: Images per block.
        encode: Pixels to hidden states; by default `model.model.encode_images`.

    Raises:
        ValueError: if there are no rows, or a row names an image that does not exist.
    """
    wanted = torch.as_tensor(image_of_row)
    if len(wanted) == 0:
        raise ValueError("No questions or texts about the images: give at least one.")
    wrong = ((wanted < 0) | (wanted >= len(images))).nonzero()
    if len(wrong) > 0:
        row = int(wrong[0])
        raise ValueError(f"Row {row} is about image {int(wanted[row])}, but there are only {len(images)} images.")
    order = wanted.argsort(stable=True)
    needed, counts = wanted.unique(return_counts=True)
    ends = counts.cumsum(0)
    for start in range(0, len(needed), batch_size):
        block = slice(start, start + batch_size)
        wanted_here = needed[block].tolist()
        pixel_values = read_pixels(processor, images, wanted_here)
        states = (encode or model.model.encode_images)(pixel_values.to(model.device, model.dtype))
        rows = order[int(ends[start] - counts[start]) : int(ends[block][-1])]
        places = torch.arange(len(wanted_here)).repeat_interleave(counts[block])
        yield Block(states, rows, places.to(states.device))


__all__ = ["Block", "image_blocks", "read_pixels"]
