"""How heads with a language model are asked: in the words and the layout of tokens that they were trained with."""

from functools import partial

from transformers import PreTrainedModel, ProcessorMixin

from ..data.instruction_templates import Wordings, wordings_of
from ..data.prompt_collators import prompt_inputs
from ..evaluation import Prompting
from ..models import VlmBlip2ForConditionalGeneration, VlmInstructBlipForConditionalGeneration, tower_states

BLIP2_QUESTION = "Question: {question} Short answer:"
"""BLIP-2, which has learned captions alone, is asked as in its paper (arXiv 2301.12597, section 4.1)."""


def prompting_of(model: PreTrainedModel, processor: ProcessorMixin) -> Prompting | None:
    """How the model is given its prompts, or None of a head without a language model."""
    if not isinstance(model, VlmBlip2ForConditionalGeneration):
        return None
    body = model.model
    options = {
        "with_qformer": body.reads_instruction,
        "is_encoder_decoder": body.language_model.config.is_encoder_decoder,
    }
    return Prompting(partial(prompt_inputs, processor, **options), partial(tower_states, body.vision_model))


def caption_prompt(model: PreTrainedModel, wordings: Wordings) -> str | None:
    """The first wording of InstructBLIP's captions; other heads have learned to write them without being told."""
    follows = isinstance(model, VlmInstructBlipForConditionalGeneration)
    return wordings_of("caption", wordings)[0] if follows else None


def question_wording(model: PreTrainedModel, wordings: Wordings) -> str:
    """What `{question}` is put into: the first wording, BLIP-2's own for one that is seen, none of BLIP's heads."""
    if not isinstance(model, VlmBlip2ForConditionalGeneration):
        return "{question}"
    if wordings == "train" and not isinstance(model, VlmInstructBlipForConditionalGeneration):
        return BLIP2_QUESTION
    return wordings_of("vqa", wordings)[0]


__all__ = ["BLIP2_QUESTION", "caption_prompt", "prompting_of", "question_wording"]
