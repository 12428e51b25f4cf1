"""Image processors between this package and transformers, for settings that give the same pixels in both."""

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
    """Our image processor for a `CLIPImageProcessor` of any backend.

    RGB images give the same `pixel_values`. Transparent pixels become white here; transformers drops the alpha channel.

    Raises:
        ValueError: unless the processor resizes the shorter side and crops to that size, or resizes both sides without
            cropping.
    """
    values = native.to_dict()
    size, crop = dict(values["size"]), dict(values["crop_size"]) if values["do_center_crop"] else None
    if values["do_resize"] and crop is not None and size == {"shortest_edge": max(crop.values())}:
        mode, target = "crop", crop
    elif size.keys() == {"height", "width"} and crop in (None, size):
        mode, target = "squash", size
    else:
        raise ValueError(
            f"VlmImageProcessor does not support size={size} with crop_size={crop} and do_resize="
            f"{values['do_resize']}; it requires the shorter side resized to the longer side of the crop, or a fixed "
            "height and width without a crop."
        )
    return VlmImageProcessor(size=target, resize_mode=mode, **{name: values[name] for name in SHARED_FIELDS})


def to_clip_image_processor(image_processor: VlmImageProcessor) -> CLIPImageProcessorPil:
    """The inverse of [`from_clip_image_processor`]; any backend of `CLIPImageProcessor` loads the saved result.

    Raises:
        ValueError: if the resize mode is `"pad"`.
    """
    values = image_processor.to_dict()
    size, mode = dict(values["size"]), values["resize_mode"]
    if mode == "pad":
        raise ValueError("CLIPImageProcessor does not support resize_mode='pad'; it requires 'crop' or 'squash'.")
    return CLIPImageProcessorPil(
        size={"shortest_edge": max(size.values())} if mode == "crop" else size,
        crop_size=size,
        do_center_crop=mode == "crop" and values["do_resize"],
        **{name: values[name] for name in SHARED_FIELDS},
    )


__all__ = ["from_clip_image_processor", "to_clip_image_processor"]
