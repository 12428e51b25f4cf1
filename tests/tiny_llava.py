"""Tiny LLaVA models and processors, made from nothing; see `tiny.py`."""

from transformers import PreTrainedModel

import tiny
import tiny_blip2
from hf_vlm import VlmLlavaConfig, VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.models import with_image_token

GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def llava_model(
    head_class: type[PreTrainedModel] = VlmLlavaForConditionalGeneration, anyres: bool = False, **options
) -> PreTrainedModel:
    """A randomised model in eval mode, whose LLM knows the placeholder."""
    llm = tiny_blip2.llm_config("llama", vocab_size=len(tiny.VOCABULARY) + 1)
    config = VlmLlavaConfig(
        vision_config=tiny.tower_config(),
        text_config=llm,
        image_token_id=tiny_blip2.IMAGE_TOKEN_ID,
        image_grid_pinpoints=GRIDS if anyres else None,
        **options,
    )
    return tiny.randomise(head_class(config)).eval()


def llava_processor(anyres: bool = False) -> VlmLlavaProcessor:
    """That of the model."""
    return VlmLlavaProcessor.from_parts(llava_model(anyres=anyres), with_image_token(tiny_blip2.llm_tokenizer()))
