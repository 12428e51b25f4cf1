"""RandAugment (arXiv 1909.13719) as in BLIP: a few random operations of one magnitude.

- The ten operations keep colours recognisable, because captions name them (arXiv 2107.07651, section 4).
- BLIP's released code applies each drawn operation with probability one half, at magnitude 5 of 10. Pixels from outside
  the image are middle grey. Magnitude 5 is the middle of the range of brightness and sharpness: no change.
- Shear, shift and rotation go in either direction. A shift is a share of the side, so it does not depend on the image
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
    """The image whose pixel (x, y) is the pixel (ax + by + c, dx + ey + f) of the given image."""
    method, resample = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, method, matrix, resample=resample, fillcolor=GREY)


# Arguments of an operation: an image, the share of the largest magnitude, and the direction, 1 or -1.
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
    """Random operations for each image, drawn with replacement.

    Args:
        count: number of operations drawn.
        magnitude: strength of the operations, from 0 to 10.
        probability: probability that a drawn operation is applied.

    Raises:
        ValueError: if an argument is out of range.
    """

    count: int = 2
    magnitude: float = 5.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 <= self.magnitude <= LARGEST or not 0 <= self.probability <= 1:
            raise ValueError(f"count must be >= 0, magnitude 0 to {LARGEST:.0f}, probability 0 to 1; got {self}")

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augments images of one size.

        Args:
            pixels: `torch.FloatTensor` of shape `(B, 3, H, W)` in [0, 1].
            generator: source of the random numbers; the quantity drawn does not depend on their values.

        Returns:
            The same shape. An image without an applied operation keeps exactly its values.
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
