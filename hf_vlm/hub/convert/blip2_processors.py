"""Processors of BLIP-2 and InstructBLIP between this package and transformers; both give the same tokens.

In both, the image placeholders precede the text and its begin token. Ours expects `<image>` before each text.
"""

import copy

from transformers import Blip2Processor, InstructBlipProcessor, ProcessorMixin

from ...models.processing_blip import VlmBlipProcessor
from ...models.processing_blip2 import VlmBlip2Processor, VlmInstructBlipProcessor
from . import blip as convert_blip


def processor_from_transformers(processor: ProcessorMixin) -> VlmBlip2Processor:
    """See [`hf_vlm.hub.convert.processor_from_transformers`].

    A tokenizer with a class token is the Q-Former's; the processor then has no LLM tokenizer.

    Raises:
        ValueError: if `num_query_tokens` is not set.
    """
    owner = type(processor).__name__
    image_processor = convert_blip.processor_from_transformers(processor).image_processor
    tokenizer = copy.deepcopy(processor.tokenizer)
    if isinstance(processor, Blip2Processor) and tokenizer.cls_token is not None:
        return VlmBlip2Processor(image_processor, tokenizer)
    if processor.num_query_tokens is None:
        raise ValueError(f"The number of placeholders per image of this {owner} is unknown: set its num_query_tokens.")
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
    if isinstance(processor, VlmInstructBlipProcessor):
        reader = copy.deepcopy(processor.qformer_tokenizer)
        return InstructBlipProcessor(images.image_processor, tokenizer, reader, processor.num_query_tokens)
    return Blip2Processor(images.image_processor, tokenizer, processor.num_query_tokens)


__all__ = ["processor_from_transformers", "processor_to_transformers"]
