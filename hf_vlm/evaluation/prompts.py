"""Prompts of heads with a language model: the wordings and the token layout of their training."""

from functools import partial

from transformers import PreTrainedModel, ProcessorMixin

from ..data.batches.prompt_collators import prompt_inputs
from ..data.builtin.instruction_templates import Wordings, wordings_of
from ..data.builtin.scene_conversations import CAPTION
from ..data.sources.conversations import SHORT_ANSWER
from ..models import (
    VlmBlip2ForConditionalGeneration,
    VlmInstructBlipForConditionalGeneration,
    VlmLlavaForConditionalGeneration,
    tower_states,
)
from .chat import answer_by_chat
from .writing import Chatting, Prompting

BLIP2_QUESTION = "Question: {question} Short answer:"
"""The question prompt of BLIP-2, trained on captions only (arXiv 2301.12597, section 4.1)."""


def prompting_of(model: PreTrainedModel, processor: ProcessorMixin) -> Prompting | Chatting | None:
    """The functions that give prompts to the head's language model; None for a head without one."""
    if isinstance(model, VlmLlavaForConditionalGeneration):
        return Chatting(partial(answer_by_chat, model, processor))
    if not isinstance(model, VlmBlip2ForConditionalGeneration):
        return None
    body = model.model
    options = {
        "with_qformer": body.reads_instruction,
        "is_encoder_decoder": body.language_model.config.is_encoder_decoder,
    }
    return Prompting(partial(prompt_inputs, processor, **options), partial(tower_states, body.vision_model))


def caption_prompt(model: PreTrainedModel, wordings: Wordings) -> str | None:
    """The caption instruction of InstructBLIP and LLaVA; None for heads that caption without an instruction."""
    if isinstance(model, VlmLlavaForConditionalGeneration):
        return CAPTION if wordings == "train" else wordings_of("caption", wordings)[0]
    follows = isinstance(model, VlmInstructBlipForConditionalGeneration)
    return wordings_of("caption", wordings)[0] if follows else None


def question_wording(model: PreTrainedModel, wordings: Wordings) -> str:
    """Question template: the first wording; BLIP-2's paper prompt; the bare question for BLIP.

    LLaVA is asked for a short answer in every wording, because it was also trained to answer in sentences.
    """
    if isinstance(model, VlmLlavaForConditionalGeneration):
        asked = "{question}" if wordings == "train" else wordings_of("vqa", wordings)[0]
        return SHORT_ANSWER.format(question=asked)
    if not isinstance(model, VlmBlip2ForConditionalGeneration):
        return "{question}"
    if wordings == "train" and not isinstance(model, VlmInstructBlipForConditionalGeneration):
        return BLIP2_QUESTION
    return wordings_of("vqa", wordings)[0]


__all__ = ["BLIP2_QUESTION", "caption_prompt", "prompting_of", "question_wording"]
