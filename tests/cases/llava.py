"""Cases of LLaVA: on several towers and LLMs, with and without tiles."""

import torch
from transformers import PreTrainedModel

from cases import tiny, tiny_llava
from cases.tiny_llava import TOWERS
from hf_vlm import VlmLlavaForConditionalGeneration

from .case import Case, Inputs

Llava = VlmLlavaForConditionalGeneration


def own_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    inputs = {name: value for name, value in inputs.items() if name != "use_cache"}
    return model(**tiny_llava.with_labels(inputs)).loss


def case_of(anyres: bool = False, tower: str | None = None, **options) -> Case:
    if tower == "siglip":
        options["vision_feature_select_strategy"] = "full"
    if tower is not None:
        options["vision_config"] = tiny_llava.tower(tower).config
    length = 161 if anyres else 37
    shapes = {"logits": (3, length, len(tiny.VOCABULARY) + 1), "last_hidden_state": (3, length, 20)}
    return Case(
        lambda: Llava(tiny_llava.llava_config(anyres, **options)),
        # Without a mask, which would hide all from what pads on the left, whose states are then arbitrary.
        lambda: {
            **{name: value for name, value in tiny_llava.llava_inputs(anyres).items() if name != "attention_mask"},
            "use_cache": False,
        },
        own_loss,
        shapes,
        ("vision_model",),
    )


CASES = {
    "llama": case_of(),
    "llama, tied": case_of(llm="llama, tied"),
    "qwen2": case_of(llm="qwen2"),
    "linear": case_of(projector_type="linear"),
    "no biases": case_of(projector_bias=False),
    "anyres": case_of(True),
    "anyres, linear": case_of(True, projector_type="linear"),
    **{f"on {tower}": case_of(tower=tower) for tower in TOWERS},
    "anyres on clip": case_of(True, tower="clip"),
}
