"""Cases of BLIP-2 and InstructBLIP: both stages, with the LLMs of `tiny_blip2`."""

import torch
from transformers import PreTrainedModel

from cases import tiny, tiny_blip2
from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmInstructBlipForConditionalGeneration,
)

from .case import Case, Inputs
from .clip import dinov2

VOCABULARY = len(tiny.VOCABULARY)


PAIRS = {
    "itm_logits": (5, 2),
    "image_embeds": (5, 4, 16),
    "text_embeds": (5, 16),
    "query_output": (5, 4, 24),
}


NO_SMOOTHING = {"label_smoothing": 0.0}


def seeded_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**inputs, return_loss=True, sample_seed=0).loss


def answer_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return model(**tiny_blip2.labelled(model, inputs)).loss


def first_stage(head: type[PreTrainedModel], **options) -> Case:
    return Case(
        lambda: head(tiny_blip2.blip2_config(**{**NO_SMOOTHING, **options})),
        tiny_blip2.stage1_inputs,
        seeded_loss,
        PAIRS,
        ("vision_model",),
    )


def second_stage(head: type[PreTrainedModel], llm: str, **options) -> Case:
    instruct = head is VlmInstructBlipForConditionalGeneration

    def inputs() -> Inputs:
        decoder = {"decoder_input_ids": tiny.tokens()["input_ids"]} if llm == "t5" else {}
        return {**tiny_blip2.stage2_inputs(padding_side="right", instruct=instruct), **decoder, "use_cache": False}

    length = 11 if llm == "t5" else 14
    return Case(
        lambda: head(tiny_blip2.blip2_config(llm, instruct=instruct, **options)),
        inputs,
        answer_loss,
        {"logits": (5, length, VOCABULARY)},
        ("vision_model", "language_model"),
    )


CASES = {
    "pretraining": first_stage(VlmBlip2ForPreTraining),
    "pretraining, dinov2": first_stage(VlmBlip2ForPreTraining, vision_config=dinov2().config),
    "retrieval": first_stage(VlmBlip2ForImageTextRetrieval),
    **{
        f"second stage, {llm}": second_stage(VlmBlip2ForConditionalGeneration, llm)
        for llm in ("llama", "llama, tied", "opt", "t5")
    },
    "second stage, without a text branch": second_stage(
        VlmBlip2ForConditionalGeneration, "llama", qformer={"use_text": False}
    ),
    **{
        f"instructions, {llm}": second_stage(VlmInstructBlipForConditionalGeneration, llm)
        for llm in ("llama, tied", "t5")
    },
}
