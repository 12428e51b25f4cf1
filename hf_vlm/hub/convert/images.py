"""Image processors between this package and transformers, where both compute the same pixels."""

from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...models.image_processing_vlm import VlmImageProcessor

SHARED_FIELDS = (
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def from_clip_image_processor(native: BaseImageProcessor) -> VlmImageProcessor:
    """Ours for a `CLIPImageProcessor`, whichever backend it runs on.

    Pictures in RGB give the same `pixel_values`; transparency becomes white here, and is dropped there.

    Raises:
        ValueError: unless it crops what it resized at the same size, or resizes both sides and does not crop.
    """
    values = native.to_dict()
    size, crop = dict(values["size"]), dict(values["crop_size"]) if values["do_center_crop"] else None
    if values["do_resize"] and crop is not None and size == {"shortest_edge": max(crop.values())}:
        mode, target = "crop", crop
    elif size.keys() == {"height", "width"} and crop in (None, size):
        mode, target = "squash", size
    else:
        raise ValueError(f"VlmImageProcessor has no equivalent of size={size} with crop_size={crop}.")
    return VlmImageProcessor(size=target, resize_mode=mode, **{name: values[name] for name in SHARED_FIELDS})


def to_clip_image_processor(image_processor: VlmImageProcessor) -> CLIPImageProcessorPil:
    """The inverse of [`from_clip_image_processor`]. It is saved as a `CLIPImageProcessor` of any backend.

    Raises:
        ValueError: if the resize mode is `"pad"`.
    """
    values = image_processor.to_dict()
    size, mode = dict(values["size"]), values["resize_mode"]
    if mode == "pad":
        raise ValueError("CLIPImageProcessor has no equivalent of resize_mode='pad'; it needs 'crop' or 'squash'.")
    return CLIPImageProcessorPil(
        size={"shortest_edge": max(size.values())} if mode == "crop" else size,
        crop_size=size,
        do_center_crop=mode == "crop" and values["do_resize"],
        **{name: values[name] for name in SHARED_FIELDS},
    )


__all__ = ["from_clip_image_processor", "to_clip_image_processor"]
