"""Image processor of all models: any image in, normalised `pixel_values` out.

- One implementation, on PIL, so that results do not depend on whether torchvision is installed.
- Four resize modes: `"crop"` (CLIP: shortest edge resized, centre cropped), `"squash"` (BLIP, SigLIP: both sides
  resized), `"pad"` (LLaVA-1.5: padded to a square with the mean colour, then resized) and `"anyres"` (LLaVA-1.6: an
  overview and the tiles of a grid, see `anyres.py`).
- Every image becomes upright 8-bit RGB by the rules of `images.py`: PIL images of any mode, files, arrays and tensors.
"""

import base64
import binascii
import os
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .anyres import anyres_views
from .images import ImageError, decode_image, image_of_array, shortened, to_rgb

MAX_ASPECT_RATIO = 16
LONGEST_PATH = 4096
RESIZE_MODES = ("crop", "squash", "pad", "anyres")


class VlmImageKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of [`VlmImageProcessor`] beyond those of every image processor."""

    resize_mode: Literal["crop", "squash", "pad", "anyres"]
    image_grid_pinpoints: list[list[int]] | None
    crop_to_patches: bool | None


class VlmImageProcessor(PilBackend):
    """Resizes, crops or pads, scales to [0, 1] and normalises.

    Args:
        size: `{"height": ..., "width": ...}` of the output in pixels.
        resize_mode: `"crop"`, `"squash"`, `"pad"` or `"anyres"`; see the module's docstring.
        image_grid_pinpoints: `[height, width]` in pixels of the grids that `"anyres"` chooses from.
        crop_to_patches: Also return `num_patches` of shape `(batch,)`, the number of views of each image. TRL asks for
            it to tell the views of one image from those of the next.
        resample: PIL's resampling filter.
        image_mean: Mean of each channel, in [0, 1].
        image_std: Standard deviation of each channel, in [0, 1].

    Example:
        ```python
        >>> processor = VlmImageProcessor(size={"height": 224, "width": 224}, resize_mode="squash")
        >>> processor(Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 224, 224])
        ```

    Calling it with images (PIL, arrays, tensors, paths, URLs or base64; one or a list) gives `pixel_values` of shape
    `(batch, 3, height, width)` in float32. With `"anyres"`, `pixel_values` contains every view, image by image, and
    `image_sizes` of shape `(batch, 2)` the height and width of each image.
    """

    valid_kwargs = VlmImageKwargs
    size = {"height": 224, "width": 224}
    resize_mode = "crop"
    image_grid_pinpoints = None
    crop_to_patches = None
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[VlmImageKwargs]):
        super().__init__(**kwargs)
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode is {self.resize_mode!r}: use one of {', '.join(RESIZE_MODES)}.")

    def fetch_images(self, images: Any) -> Any:
        """The same images in the same lists; paths, URLs and base64 texts are loaded, batches become lists.

        An array or tensor with two dimensions becomes a PIL image, one with four a list.
        """
        if isinstance(images, list | tuple):
            return [self.fetch_images(one) for one in images]
        if isinstance(images, str | os.PathLike):
            return decode_image(*_read(os.fspath(images)))
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim != 3:
            return self.fetch_images(list(images)) if images.ndim == 4 else self.process_image(images)
        return images

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        """A flat list of single images; transformers takes no two-dimensional array, and prints the whole of it."""
        if not (flat := flat_images(self.fetch_images(images))):
            raise ImageError("There are no images: give at least one.")
        return flat

    def process_image(self, image, input_data_format=None, **kwargs) -> Image.Image:
        """An upright RGB PIL image from a PIL image, array or tensor.

        A PIL image is rotated as its EXIF orientation says. Values become 8 bits by the rule of `images.eight_bits`.

        Raises:
            ImageError: for another type, for an array that has neither the shape `(height, width)` nor 1, 3 or 4
                channels, and for an array with negative values.
        """
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        if isinstance(image, np.ndarray):
            channels_first = None if input_data_format is None else input_data_format == ChannelDimension.FIRST
            image = image_of_array(image, channels_first)
        if not isinstance(image, Image.Image):
            raise ImageError(f"{type(image).__name__} is not an image: give a PIL image, array, tensor, path or URL.")
        return to_rgb(decode_image(image))

    def fit(
        self, image: Image.Image, size: SizeDict, resize_mode: str, resample: PILImageResampling, fill: tuple[int, ...]
    ) -> Image.Image:
        """An RGB image resized to exactly `size` by the given mode; `fill` is the colour of the padding."""
        target = (size.width, size.height)
        if resize_mode == "pad":
            image = pad_to_square(limit_size(image, MAX_ASPECT_RATIO * max(target)), fill)
        if resize_mode != "crop":
            return image if image.size == target else image.resize(target, resample)
        image = limit_aspect_ratio(image)
        width, height = image.size
        shortest = max(target)
        long_side = int(shortest * max(width, height) / min(width, height))
        resized = (shortest, long_side) if width <= height else (long_side, shortest)
        if image.size != resized:
            image = image.resize(resized, resample)
        left, top = (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2
        return image.crop((left, top, left + target[0], top + target[1]))

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resize_mode: str,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None,
        image_grid_pinpoints: list[list[int]] | None = None,
        crop_to_patches: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        sizes: dict[str, Any] = {"num_patches": np.ones(len(images), dtype=np.int64)} if crop_to_patches else {}
        if do_resize and resize_mode == "anyres":
            if not image_grid_pinpoints or size.height != size.width:
                raise ValueError(
                    f'resize_mode="anyres" needs image_grid_pinpoints and square tiles, but image_grid_pinpoints is '
                    f"{image_grid_pinpoints} and size is {size.height} x {size.width}: set both."
                )
            sizes["image_sizes"] = np.array([(image.height, image.width) for image in images])
            filter_ = PILImageResampling(resample)
            views = [anyres_views(image, image_grid_pinpoints, size.height, filter_) for image in images]
            if crop_to_patches:
                sizes["num_patches"] = np.array([len(of_image) for of_image in views])
            images = [view for of_image in views for view in of_image]
        elif do_resize:
            fill = tuple(int(255 * mean) for mean in image_mean)  # rounded down, as LLaVA does
            images = [self.fit(image, size, resize_mode, PILImageResampling(resample), fill) for image in images]
        pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32)  # (B, H, W, 3)
        if do_rescale:
            pixels *= rescale_factor
        if do_normalize:
            pixels -= np.array(image_mean, dtype=np.float32)
            pixels /= np.array(image_std, dtype=np.float32)
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return BatchFeature({"pixel_values": pixels, **sizes}, tensor_type=return_tensors)


def flat_images(images: Any) -> list:
    """All images of nested lists, in order."""
    return [one for each in images for one in flat_images(each)] if isinstance(images, list) else [images]


def _read(source: str) -> tuple[bytes, str]:
    """The bytes of a URL, a file or a text in base64, and their name in errors."""
    where = shortened(source)
    if source.startswith(("http://", "https://")):
        try:
            return httpx.get(source, follow_redirects=True).raise_for_status().content, where
        except httpx.HTTPError as error:
            raise ImageError(f"{where}: cannot be downloaded ({shortened(str(error))}); correct the URL.") from None
    if os.path.isfile(source):
        where = shortened(source, LONGEST_PATH)
        try:
            return Path(source).read_bytes(), where
        except OSError as error:
            raise ImageError(f"{where}: cannot be read ({error.strerror}); correct the permissions.") from None
    try:
        text = source.partition(",")[2] if source.startswith("data:image/") else source
        return base64.b64decode("".join(text.split()), validate=True), f"{where} (no file, read as base64)"
    except (binascii.Error, ValueError):
        raise ImageError(f"{where}: no such file, and neither a URL nor base64; correct the path.") from None


def limit_size(image: Image.Image, longest: int) -> Image.Image:
    """The image, downscaled if a side exceeds `longest` pixels, to limit the size of the square around it."""
    width, height = image.size
    if max(width, height) <= longest:
        return image
    scale = longest / max(width, height)
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)


def pad_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """The image centred on a square of one colour (LLaVA-1.5)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def limit_aspect_ratio(image: Image.Image) -> Image.Image:
    """The centre of a very elongated image: resizing its short edge would enlarge pixels that are then cropped."""
    width, height = image.size
    longest = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    if width > height:
        left = (width - longest) // 2
        return image.crop((left, 0, left + longest, height))
    top = (height - longest) // 2
    return image.crop((0, top, width, top + longest))


__all__ = ["VlmImageProcessor", "flat_images", "to_rgb"]
