"""Augmentation of a batch of training images: geometry, colour, and style of drawing.

- Only the random crop is made image by image; PIL resizes it, as in BLIP. All other steps run on the whole batch in
  torch.
- Pixels stay premultiplied by their opacity until the end, so that warps and colour changes never mix in the colour of
  transparent pixels. Then the image is composited on white or on a random colour.
- RandAugment, if enabled, comes last.
- Three steps bridge styles of drawing: `unline` removes thin dark lines, `ink` draws them along edges, `shade` lights
  flat colours unevenly.
- The result depends only on the images and on `seed`. The global random state is neither read nor changed, so a resumed
  run sees the same images as an uninterrupted one.

Shapes: B images, S side of the result in pixels. Channels are red, green, blue, opacity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .rand_augment import RandAugment

# RGB to YIQ (NTSC): luma and two chroma axes. In the chroma plane hue is an angle and saturation a length.
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
LUMA = YIQ[0]
FIELD_WAVES = 4  # cosines per side in a random field (wobble, shade), including the constant one


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of images. The defaults are BLIP's crop and flip only (arXiv 2201.12086, section 4).

    Every strength is drawn for each image, uniformly from the given range.

    Args:
        crop_scale: smallest and largest share of the image's area that the crop keeps.
        crop_ratio: smallest and largest ratio of the crop's width to its height, before it is resized to a square.
        flip: probability of mirroring left and right.
        rotation: largest rotation in either direction, in degrees.
        zoom: smallest and largest scale factor; below 1, background appears at the edges.
        stretch: largest ratio of the width's to the height's scale factor, or of its inverse; 1 for none.
        shear: largest horizontal shear in either direction: shift over height.
        shift: largest translation in either direction, as a share of the side.
        wobble: typical displacement of a smooth random distortion, as a share of the side.
        background: probability of compositing on a random colour instead of white.
        hue: largest rotation of the hue in either direction, in full turns (0.5 reaches every hue).
        saturation: the saturation is multiplied by a factor from `1 - saturation` to `1 + saturation`.
        brightness: the same for the brightness.
        contrast: the same for the contrast around middle grey.
        grey: probability of converting to grey.
        shade: largest darkening or lightening by a smooth random field; 0 for none.
        unline: probability of removing thin dark lines.
        ink: probability of darkening along edges of colour or opacity.
        blur: probability of blurring.
        noise: largest standard deviation of the pixel noise, on the range [0, 1].
        erase: probability of filling a rectangle with one colour; its sides are at most half of the image's.
        rand_augment: RandAugment, applied last.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    shear: float = 0.0
    shift: float = 0.0
    wobble: float = 0.0
    background: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    grey: float = 0.0
    shade: float = 0.0
    unline: float = 0.0
    ink: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    rand_augment: RandAugment | None = None

    @classmethod
    def blip(cls) -> "Augmentation":
        """BLIP's pretraining augmentation: crop, flip and RandAugment of two operations at magnitude 5 of 10."""
        return cls(rand_augment=RandAugment(count=2, magnitude=5))

    @classmethod
    def photo(cls) -> "Augmentation":
        """For photographs: BLIP's crop and flip, and moderate colour changes."""
        return cls(hue=0.03, saturation=0.4, brightness=0.3, contrast=0.3, grey=0.05)

    @classmethod
    def scene(cls) -> "Augmentation":
        """For scenes whose captions name positions and colours: no crop, no flip, no warp, no change of hue."""
        return cls(
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip=0.0,
            saturation=0.2,
            brightness=0.15,
            contrast=0.2,
            shade=0.15,
            unline=0.3,
            ink=0.2,
            blur=0.2,
            noise=0.03,
        )

    @classmethod
    def drawing(cls) -> "Augmentation":
        """For drawings on a transparent or white background, to generalise to other styles of drawing."""
        return cls(
            crop_scale=(0.7, 1.0),
            flip=0.5,
            rotation=20.0,
            zoom=(0.7, 1.2),
            stretch=1.25,
            shear=0.2,
            shift=0.08,
            wobble=0.03,
            background=0.3,
            hue=0.06,
            saturation=0.5,
            brightness=0.3,
            contrast=0.4,
            grey=0.1,
            shade=0.3,
            unline=0.3,
            ink=0.2,
            blur=0.3,
            noise=0.05,
            erase=0.2,
        )

    def __call__(self, images: Sequence[Image.Image], size: int, seed: Sequence[int]) -> torch.Tensor:
        """Augments and resizes the images of a batch.

        Args:
            images: PIL images of any sizes, each in mode RGB or RGBA.
            size: S, the side of the result in pixels.
            seed: one or several numbers >= 0, such as the row numbers; equal seeds give equal results.

        Returns:
            `torch.FloatTensor` of shape `(B, 3, S, S)` in [0, 1].

        Raises:
            ValueError: if an image has another mode, or there are no images.
        """
        if not images:
            raise ValueError("there are no images to augment: give at least one")
        state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]
        draw = _Draw(len(images), torch.Generator().manual_seed(int(state)))
        pixels = self._warp(self._crops(images, size, draw), draw)
        pixels = self._redraw(pixels, draw)
        pixels = self._recolour(pixels, draw)
        pixels = self._finish(self._lay_on_background(pixels, draw), draw)
        return pixels if self.rand_augment is None else self.rand_augment(pixels, draw.generator)

    def _crops(self, images: Sequence[Image.Image], size: int, draw: "_Draw") -> torch.Tensor:
        """A random crop of each image, resized: premultiplied `(B, 4, S, S)`."""
        scale = draw.uniform(*self.crop_scale).tolist()
        ratio = draw.uniform(math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])).exp().tolist()
        left, top = draw.uniform(0, 1).tolist(), draw.uniform(0, 1).tolist()
        crops = []
        for i, image in enumerate(images):
            if image.mode not in ("RGB", "RGBA"):
                raise ValueError(f"image {i} of the batch has mode {image.mode}: convert it to RGB or RGBA first")
            width = min(1.0, math.sqrt(scale[i] * ratio[i] * image.height / image.width))
            height = min(1.0, math.sqrt(scale[i] / ratio[i] * image.width / image.height))
            width, height = width * image.width, height * image.height
            x, y = left[i] * (image.width - width), top[i] * (image.height - height)
            premultiplied = image if image.mode == "RGB" else image.convert("RGBa")
            crop = premultiplied.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))
            crops.append(np.asarray(crop.convert("RGBA") if image.mode == "RGB" else crop))
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255)

    def _warp(self, pixels: torch.Tensor, draw: "_Draw") -> torch.Tensor:
        """Flip, rotation, zoom, stretch, shear, shift and wobble; pixels from outside the image are transparent."""
        angle = draw.uniform(-self.rotation, self.rotation) * (math.pi / 180)
        zoom = draw.uniform(math.log(self.zoom[0]), math.log(self.zoom[1])).exp()
        stretch = draw.uniform(-math.log(self.stretch), math.log(self.stretch)).div(2).exp()
        shear = draw.uniform(-self.shear, self.shear)
        x, y = draw.uniform(-2 * self.shift, 2 * self.shift), draw.uniform(-2 * self.shift, 2 * self.shift)
        mirror = 1 - 2 * draw.chance(self.flip).float()
        wide, high = mirror / (zoom * stretch), stretch / zoom
        cos, sin = angle.cos(), angle.sin()
        rows = (wide * cos, wide * (shear * cos - sin), x, high * sin, high * (shear * sin + cos), y)
        grid = F.affine_grid(torch.stack(rows, dim=-1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
        if self.wobble:
            grid = grid + 2 * self.wobble * draw.field(2, pixels.shape[-1]).permute(0, 2, 3, 1)
        return F.grid_sample(pixels, grid, align_corners=False)

    def _redraw(self, pixels: torch.Tensor, draw: "_Draw") -> torch.Tensor:
        """Apply `unline`, `ink` and `shade`."""
        chosen = draw.chosen(self.unline)
        if len(chosen):
            colour, opacity = pixels[chosen].split([3, 1], dim=1)
            on_white = F.max_pool2d(colour + 1 - opacity, 3, stride=1, padding=1)
            closed = -F.max_pool2d(-on_white, 3, stride=1, padding=1) - (1 - opacity)
            pixels[chosen] = torch.cat([closed.clamp_(min=0).minimum(opacity), opacity], dim=1)
        chosen = draw.chosen(self.ink)
        if len(chosen):
            part = pixels[chosen]
            edges = F.max_pool2d(part, 3, stride=1, padding=1) + F.max_pool2d(-part, 3, stride=1, padding=1)
            ink = (edges.amax(dim=1, keepdim=True) * draw.uniform(0.5, 1.5)[chosen].view(-1, 1, 1, 1)).clamp(0, 1)
            pixels[chosen] = torch.cat([part[:, :3] * (1 - ink), torch.maximum(part[:, 3:], ink)], dim=1)
        if self.shade:
            light = draw.field(1, pixels.shape[-1]).clamp_(-1, 1) * draw.uniform(0, self.shade).view(-1, 1, 1, 1)
            colour, opacity = pixels[:, :3], pixels[:, 3:]
            lit = torch.where(light > 0, colour + (opacity - colour) * light, colour * (1 + light))
            pixels = torch.cat([lit, opacity], dim=1)
        return pixels

    def _recolour(self, pixels: torch.Tensor, draw: "_Draw") -> torch.Tensor:
        """Hue, saturation, brightness, contrast and grey as one linear map of each image's colours."""
        if not (self.hue or self.saturation or self.brightness or self.contrast or self.grey):
            return pixels
        angle = draw.uniform(-self.hue, self.hue) * (2 * math.pi)
        chroma = draw.uniform(1 - self.saturation, 1 + self.saturation) * (~draw.chance(self.grey)).float()
        bright = draw.uniform(1 - self.brightness, 1 + self.brightness)
        contrast = draw.uniform(1 - self.contrast, 1 + self.contrast)
        cos, sin, zero = chroma * angle.cos(), chroma * angle.sin(), torch.zeros_like(angle)
        rows = (torch.ones_like(angle), zero, zero, zero, cos, -sin, zero, sin, cos)
        yiq = torch.tensor(YIQ)
        matrix = yiq.inverse() @ torch.stack(rows, dim=-1).view(-1, 3, 3) @ yiq
        matrix = matrix * (bright * contrast).view(-1, 1, 1)
        offset = (0.5 - 0.5 * contrast).view(-1, 1, 1).expand(-1, 3, 1)  # multiplied by the opacity below
        colour = torch.cat([matrix, offset], dim=2) @ pixels.flatten(2)
        opacity = pixels[:, 3:]
        return torch.cat([colour.view_as(pixels[:, :3]).clamp_(min=0).minimum(opacity), opacity], dim=1)

    def _lay_on_background(self, pixels: torch.Tensor, draw: "_Draw") -> torch.Tensor:
        """The images composited on white or a random colour, `(B, 3, S, S)`."""
        colours = torch.where(draw.chance(self.background)[:, None], draw.colours(), 1.0)
        return pixels[:, :3] + (1 - pixels[:, 3:]) * colours[:, :, None, None]

    def _finish(self, pixels: torch.Tensor, draw: "_Draw") -> torch.Tensor:
        """Blur, erase and noise."""
        size = pixels.shape[-1]
        chosen = draw.chosen(self.blur)
        if len(chosen):
            sharp = pixels[chosen]
            soft = F.avg_pool2d(sharp, 3, stride=1, padding=1, count_include_pad=False)
            pixels[chosen] = sharp.lerp(soft, draw.uniform(0, 1)[chosen].view(-1, 1, 1, 1))
        if self.erase:
            middle, half = draw.uniform(0, 1, 2) * size, draw.uniform(0.05, 0.25, 2) * size
            inside = (torch.arange(size) + 0.5 - middle[..., None]).abs() < half[..., None]  # (B, 2, S)
            chosen, colours = draw.chosen(self.erase), draw.colours()[:, :, None, None]
            box = inside[chosen, None, 0, :, None] & inside[chosen, None, 1, None, :]
            pixels[chosen] = torch.where(box, colours[chosen], pixels[chosen])
        if self.noise:
            deviation = draw.uniform(0, self.noise).view(-1, 1, 1, 1)
            pixels.addcmul_(torch.randn(pixels.shape, generator=draw.generator), deviation)
        return pixels.clamp_(0, 1)


class _Draw:
    """Random numbers for `count` images, all from one generator."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """`(B, *shape)`, uniform from `low` to `high`."""
        return torch.rand(self.count, *shape, generator=self.generator) * (high - low) + low

    def chance(self, probability: float) -> torch.Tensor:
        """A mask over the images, `(B,)`, each True with the given probability."""
        return torch.rand(self.count, generator=self.generator) < probability

    def chosen(self, probability: float) -> torch.Tensor:
        """Indices of the images for which `chance` is True."""
        return self.chance(probability).nonzero().flatten()

    def colours(self) -> torch.Tensor:
        """A colour for each image, `(B, 3)`."""
        return torch.rand(self.count, 3, generator=self.generator)

    def field(self, channels: int, size: int) -> torch.Tensor:
        """A smooth random field for each image, `(B, channels, S, S)`, of mean 0 and variance 1."""
        place = (torch.arange(size) + 0.5) / size
        waves = torch.cos(math.pi * torch.arange(FIELD_WAVES)[:, None] * place)
        heights = torch.randn(self.count, channels, FIELD_WAVES, FIELD_WAVES, generator=self.generator)
        return waves.T @ (heights / waves.square().mean(dim=1).sum()) @ waves


__all__ = ["Augmentation"]
