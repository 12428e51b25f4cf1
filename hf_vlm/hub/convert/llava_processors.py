"""Processors of LLaVA between this package and transformers; both give the same pixels and tokens."""

import copy

from transformers import LlavaNextProcessor, LlavaProcessor, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ...models.chat_templates import reads_parts
from ...models.image_processing_vlm import VlmImageProcessor
from ...models.processing_llava import VICUNA_TEMPLATE, VlmLlavaProcessor
from .images import SHARED_FIELDS, from_clip_image_processor, to_clip_image_processor

# transformers' processors receive content as a list of parts; chat templates of LLMs expect a string.
PARTS_TO_TEXT = (
    "{%- set said = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set said.messages = said.messages + [message] -%}"
    "{%- else -%}"
    "{%- set one = namespace(marks='', words='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{%- set one.words = one.words + part['text'] -%}"
    "{%- else -%}{%- set one.marks = one.marks + '<image>\n' -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set said.messages = said.messages + [{'role': message['role'], 'content': one.marks + one.words}] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = said.messages -%}"
)
FIELDS = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")


def _images_from(native: BaseImageProcessor) -> VlmImageProcessor:
    values = native.to_dict()
    shared = {name: values[name] for name in SHARED_FIELDS}
    if "image_grid_pinpoints" in values:
        grids = [list(grid) for grid in values["image_grid_pinpoints"]]
        return VlmImageProcessor(
            size=dict(values["crop_size"]), resize_mode="anyres", image_grid_pinpoints=grids, **shared
        )
    if values.get("do_pad") and type(native).__name__.startswith("Llava"):
        return VlmImageProcessor(size=dict(values["crop_size"]), resize_mode="pad", **shared)
    return from_clip_image_processor(native)


def _images_to(own: VlmImageProcessor) -> BaseImageProcessor:
    values = own.to_dict()
    size = dict(values["size"])
    fields = {
        "size": {"shortest_edge": size["height"]},
        "crop_size": size,
        **{name: values[name] for name in SHARED_FIELDS},
    }
    if own.resize_mode == "anyres":
        return LlavaNextImageProcessorPil(**fields, image_grid_pinpoints=own.image_grid_pinpoints)
    if own.resize_mode == "pad":
        return LlavaImageProcessorPil(**fields, do_pad=True)
    return to_clip_image_processor(own)


def _template_to(template: str | None) -> str | None:
    """A template that accepts content as parts and as strings."""
    if not isinstance(template, str) or reads_parts(template) or template.startswith(PARTS_TO_TEXT):
        return template
    return PARTS_TO_TEXT + template


def processor_from_transformers(processor: ProcessorMixin) -> VlmLlavaProcessor:
    """See [`hf_vlm.hub.convert.processor_from_transformers`].

    Raises:
        ValueError: if the processor does not determine the number of placeholders per image.
    """
    fields = {name: getattr(processor, name) for name in FIELDS}
    if fields["patch_size"] is None or fields["vision_feature_select_strategy"] is None:
        raise ValueError(
            f"The number of tokens per image of this {type(processor).__name__} is unknown: set its patch_size and "
            "vision_feature_select_strategy."
        )
    template = processor.chat_template or processor.tokenizer.chat_template or VICUNA_TEMPLATE
    if isinstance(template, str):
        template = template.removeprefix(PARTS_TO_TEXT)  # our processor turns parts into strings itself
    tokenizer = copy.deepcopy(processor.tokenizer)
    return VlmLlavaProcessor(_images_from(processor.image_processor), tokenizer, chat_template=template, **fields)


def processor_to_transformers(processor: VlmLlavaProcessor) -> ProcessorMixin:
    """See [`hf_vlm.hub.convert.processor_to_transformers`]."""
    native_class = LlavaNextProcessor if processor.image_processor.resize_mode == "anyres" else LlavaProcessor
    return native_class(
        _images_to(processor.image_processor),
        copy.deepcopy(processor.tokenizer),
        chat_template=_template_to(processor.chat_template),
        **{name: getattr(processor, name) for name in FIELDS},
    )


__all__ = ["processor_from_transformers", "processor_to_transformers"]
