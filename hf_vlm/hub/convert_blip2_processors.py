"""Processors of BLIP-2 and InstructBLIP between this package and transformers, where both give the same tokens.

transformers puts the placeholders before the text and its begin token, ours where `<image>` stands in the text. With a
tokenizer that begins every text with a token (OPT's, Llama's) these are different inputs, and the processor is refused.
"""

import copy

from transformers import (
    Blip2Processor,
    InstructBlipProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..models.processing_blip import VlmBlipProcessor
from ..models.processing_blip2 import IMAGE_TOKEN, VlmBlip2Processor, VlmInstructBlipProcessor
from . import convert_blip

PROBE = "A photo of two cats."


def check_placeholders(tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
    """Refuses a tokenizer by which placeholders before the text and before its tokens are not the same.

    Raises:
        ValueError: if they are not.
    """
    placeholder = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    within, before = tokenizer(IMAGE_TOKEN + PROBE).input_ids, [placeholder, *tokenizer(PROBE).input_ids]
    if within != before:
        raise ValueError(
            f"{owner} has no equivalent: by this tokenizer, {type(tokenizer).__name__}, placeholders in the text and "
            "placeholders before its begin token are different inputs."
        )


def processor_from_transformers(processor: ProcessorMixin) -> VlmBlip2Processor:
    """See [`hf_vlm.hub.convert.processor_from_transformers`]; a tokenizer with a class token is the Q-Former's own.

    Raises:
        ValueError: if placeholders would stand elsewhere, or their number is not known.
    """
    owner = type(processor).__name__
    image_processor = convert_blip.processor_from_transformers(processor).image_processor
    tokenizer = copy.deepcopy(processor.tokenizer)
    if isinstance(processor, Blip2Processor) and tokenizer.cls_token is not None:
        return VlmBlip2Processor(image_processor, tokenizer)
    if processor.num_query_tokens is None:
        raise ValueError(f"This {owner} does not say how many placeholders an image has: set its num_query_tokens.")
    check_placeholders(tokenizer, f"This {owner}")
    tokenizer.padding_side = "left"
    if isinstance(processor, InstructBlipProcessor):
        reader = copy.deepcopy(processor.qformer_tokenizer)
        return VlmInstructBlipProcessor(image_processor, tokenizer, reader, processor.num_query_tokens)
    return VlmBlip2Processor(image_processor, tokenizer, processor.num_query_tokens)


def processor_to_transformers(processor: VlmBlip2Processor) -> ProcessorMixin:
    """See [`hf_vlm.hub.convert.processor_to_transformers`]."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    images = convert_blip.processor_to_transformers(VlmBlipProcessor(processor.image_processor, tokenizer))
    if processor.num_query_tokens is None:
        return Blip2Processor(images.image_processor, tokenizer)
    check_placeholders(tokenizer, f"This {type(processor).__name__}")
    if isinstance(processor, VlmInstructBlipProcessor):
        reader = copy.deepcopy(processor.qformer_tokenizer)
        return InstructBlipProcessor(images.image_processor, tokenizer, reader, processor.num_query_tokens)
    return Blip2Processor(images.image_processor, tokenizer, processor.num_query_tokens)


__all__ = ["processor_from_transformers", "processor_to_transformers"]
