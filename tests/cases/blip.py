"""Cases of BLIP: the body and its heads."""

from collections.abc import Callable

import torch
from transformers import (
    PreTrainedModel,
)

from cases import tiny
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipModel,
)
from hf_vlm.models.modeling_blip import VlmBlipHead

from .case import Case, Inputs
from .clip import dinov2


def first_token_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The distance of the texts' first states from arbitrary ones, for BLIP's body, which has no loss of its own."""
    states = model(**inputs).last_hidden_state[:, 0]
    return (states - torch.arange(states.numel()).view_as(states).sin()).square().mean()


def seeded_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    model.update_momentum()
    return model(**inputs, return_loss=True, sample_seed=0).loss


def caption_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss


def answer_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**{**inputs, "labels": inputs["decoder_input_ids"], "decoder_input_ids": None}).loss


def blip_case(head_class: type[PreTrainedModel], loss: Callable, shapes: dict[str, tuple[int, ...]], **options) -> Case:
    """Without what keeps a loss from reaching zero soon: smoothed labels, soft targets, slow averages."""
    options = {"label_smoothing": 0.0, "soft_target_weight": 0.0, "momentum": 0.5, **options}
    options = {**(head_class.layout if issubclass(head_class, VlmBlipHead) else {}), **options}

    def inputs() -> Inputs:
        answers = {"decoder_input_ids": tiny.blip_tokens(["red", "two tree", "a", "right", "blue"])["input_ids"]}
        return tiny.blip_inputs() | (answers if head_class is VlmBlipForQuestionAnswering else {})

    return Case(lambda: head_class(tiny.blip_config(**options)), inputs, loss, shapes, overfits=True)


BLIP_STATES = {"last_hidden_state": (5, 11, 24)}


BLIP_PAIRS = {"itm_logits": (5, 2), "image_embeds": (5, 16), "text_embeds": (5, 16)}


BLIP_CAPTIONS = {"logits": (5, 11, len(tiny.BLIP_VOCABULARY)), **BLIP_STATES}


BLIP_ANSWERS = {"logits": (5, 4, len(tiny.BLIP_VOCABULARY)), "last_hidden_state": (5, 4, 24)}


CASES = {
    "blip, encoder": blip_case(VlmBlipModel, first_token_loss, BLIP_STATES, use_text_decoder=False),
    "blip, decoder": blip_case(VlmBlipModel, first_token_loss, BLIP_STATES, use_text_encoder=False),
    "blip, pretraining": blip_case(VlmBlipForPreTraining, seeded_loss, BLIP_PAIRS),
    "blip, pretraining, nothing shared": blip_case(
        VlmBlipForPreTraining, seeded_loss, BLIP_PAIRS, share_encoder_decoder=False, queue_size=0
    ),
    "blip, pretraining, tied words": blip_case(
        VlmBlipForPreTraining, seeded_loss, BLIP_PAIRS, tie_word_embeddings=True
    ),
    "blip, retrieval": blip_case(VlmBlipForImageTextRetrieval, seeded_loss, BLIP_PAIRS),
    "blip, retrieval, means of tokens": blip_case(
        VlmBlipForImageTextRetrieval,
        seeded_loss,
        BLIP_PAIRS,
        vision={"layout": "mean", "final_norm": "sequence"},
        vision_pooling="mean",
    ),
    "blip, captions": blip_case(VlmBlipForConditionalGeneration, caption_loss, BLIP_CAPTIONS),
    "blip, captions, tied words, dinov2": blip_case(
        VlmBlipForConditionalGeneration,
        caption_loss,
        BLIP_CAPTIONS,
        vision_config=dinov2().config,
        tie_word_embeddings=True,
    ),
    "blip, answers": blip_case(VlmBlipForQuestionAnswering, answer_loss, BLIP_ANSWERS),
    "blip, answers, tied words": blip_case(
        VlmBlipForQuestionAnswering, answer_loss, BLIP_ANSWERS, tie_word_embeddings=True
    ),
}
