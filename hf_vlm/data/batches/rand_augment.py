"""RandAugment (arXiv 1909.13719) as BLIP trains with it: a few operations drawn at random, all of one magnitude.

- The ten operations are those that leave colours recognisable, since captions name them (arXiv 2107.07651, section 4).
- BLIP's released training applies each operation drawn with probability one half, at magnitude 5 of 10, and fills what
  comes from outside the picture with middle grey. Magnitude 5 is in the middle of the range for brightness and
  sharpness, and so leaves them as they are.
- Shear, shift and rotation go either way. A shift is a share of the side, so that it does not depend on the picture's
  size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

LARGEST = 10.0  # magnitude at which the ranges below are reached
SHEAR = 0.3  # shift over height
SHIFT = 10 / 224  # of the side: BLIP's 10 pixels at its image size
ROTATION = 30.0  # degrees
ENHANCE = (0.1, 1.9)  # factor at magnitude 0 and at the largest
GREY = (128, 128, 128)


def _enhanced(strength: float) -> float:
    return ENHANCE[0] + (ENHANCE[1] - ENHANCE[0]) * strength


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    """The picture whose pixel (x, y) is the given one's (ax + by + c, dx + ey + f)."""
    method, resample = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, method, matrix, resample=resample, fillcolor=GREY)


# Each takes a picture, the share of the largest magnitude, and which way to go: 1 or -1.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, strength, way: image,
    "auto_contrast": lambda image, strength, way: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, way: ImageOps.equalize(image),
    "brightness": lambda image, strength, way: ImageEnhance.Brightness(image).enhance(_enhanced(strength)),
    "sharpness": lambda image, strength, way: ImageEnhance.Sharpness(image).enhance(_enhanced(strength)),
    "shear_x": lambda image, strength, way: _moved(image, 1, way * SHEAR * strength, 0, 0, 1, 0),
    "shear_y": lambda image, strength, way: _moved(image, 1, 0, 0, way * SHEAR * strength, 1, 0),
    "translate_x": lambda image, strength, way: _moved(image, 1, 0, way * SHIFT * strength * image.width, 0, 1, 0),
    "translate_y": lambda image, strength, way: _moved(image, 1, 0, 0, 0, 1, way * SHIFT * strength * image.height),
    "rotate": lambda image, strength, way: image.rotate(
        way * ROTATION * strength, resample=Image.Resampling.BILINEAR, fillcolor=GREY
    ),
}


@dataclass(frozen=True)
class RandAugment:
    """Operations drawn for each picture, with replacement.

    Args:
        count: how many are drawn.
        magnitude: their strength, from 0 to 10.
        probability: that one that was drawn is done.

    Raises:
        ValueError: an argument out of range.
    """

    count: int = 2
    magnitude: float = 5.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.magnitude <= LARGEST or not 0 <= self.probability <= 1:
            raise ValueError(f"count must be >= 0, magnitude 0 to {LARGEST:.0f}, probability 0 to 1; got {self}")

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Varies pictures of one size.

        Args:
            pixels: `torch.FloatTensor` of shape `(B, 3, H, W)` in [0, 1].
            generator: what the operations are drawn from; as much is drawn whatever comes out.

        Returns:
            The same shape; a picture to which nothing was done keeps its very values.
        """
        shape = (len(pixels), self.count)
        chosen = torch.randint(len(OPERATIONS), shape, generator=generator).tolist()
        done = (torch.rand(shape, generator=generator) < self.probability).tolist()
        ways = (1 - 2 * torch.randint(2, shape, generator=generator)).tolist()
        operations, result = list(OPERATIONS.values()), pixels.clone()
        for row, draws in enumerate(zip(chosen, done, ways, strict=True)):
            kept = [(operations[number], way) for number, applied, way in zip(*draws, strict=True) if applied]
            if kept:
                image = Image.fromarray(pixels[row].permute(1, 2, 0).mul(255).round().byte().numpy())
                for operation, way in kept:
                    image = operation(image, self.magnitude / LARGEST, way)
                result[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return result


__all__ = ["OPERATIONS", "RandAugment"]
