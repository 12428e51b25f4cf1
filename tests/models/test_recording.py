"""Hidden states, attentions and `return_dict`: names and shapes of transformers, and no cost without a request."""

import pytest
import torch
from torch import nn
from transformers import CLIPModel
from transformers.utils import ModelOutput

from cases import tiny, tiny_blip2, tiny_llava
from cases.case import Inputs
from cases.table import CASES
from hf_vlm.models.recording import recording

ASKED = {"output_hidden_states": True, "output_attentions": True}
# The outputs in which each case's states lie ("" for the output itself), with the number of layers and the widths.
WHERE: dict[str, dict[str, tuple[int, int, int]]] = {
    "tower, clip layout": {"": (2, 17, 32)},
    "text tower": {"": (2, 11, 24)},
    "clip": {"vision_model_output": (2, 17, 32), "text_model_output": (2, 11, 24)},
    "clip, means of tokens": {"vision_model_output": (2, 17, 32), "text_model_output": (2, 11, 24)},
    "clip, siglip + bert": {"vision_model_output": (2, 16, 32), "text_model_output": (2, 11, 24)},
    "blip, encoder": {"": (2, 11, 24)},
    "blip, pretraining": {"": (2, 17, 32)},
    "blip, retrieval": {"": (2, 17, 32)},
    "blip, captions": {"": (2, 17, 32)},
    "blip, answers": {"": (2, 17, 32)},
    "blip2, retrieval": {"vision_model_output": (2, 17, 32), "text_model_output": (3, 11, 24)},
    "blip2, second stage, llama": {
        "vision_outputs": (2, 17, 32),
        "qformer_outputs": (3, 4, 24),
        "language_model_outputs": (2, 14, 20),
    },
    "blip2, instructions, llama, tied": {
        "vision_outputs": (2, 17, 32),
        "qformer_outputs": (3, 15, 24),
        "language_model_outputs": (2, 14, 20),
    },
    "llava, llama": {"": (2, 37, 20)},
    "llava, on clip": {"": (2, 37, 20)},
}


@torch.no_grad()
@pytest.mark.parametrize("name", WHERE)
def test_states_are_recorded_where_they_are_asked_for(name: str) -> None:
    """And every other output is the same; as a tuple, the outputs are those of the dict."""
    model, inputs = tiny.randomise(CASES[name].build()), CASES[name].inputs()
    model.set_attn_implementation("eager")
    plain, asked = model(**inputs), model(**inputs, **ASKED)
    assert not any("hidden_states" in key or "attentions" in key or "model_output" in key for key in plain)
    for key, value in plain.items():
        if torch.is_tensor(value) and value.shape == asked[key].shape:
            torch.testing.assert_close(asked[key], value)
    for where, (layers, tokens, width) in WHERE[name].items():
        output = asked[where] if where else asked
        assert [tuple(states.shape[1:]) for states in output.hidden_states] == [(tokens, width)] * (layers + 1)
        assert [tuple(weights.shape[2:]) for weights in output.attentions] == [(tokens, tokens)] * layers
        for weights in output.attentions:
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    as_tuple = model(**inputs, **ASKED, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert not any(isinstance(value, ModelOutput) for value in as_tuple)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["clip", "clip, means of tokens", "blip, retrieval", "blip2, retrieval", "llava, llama"]
)
def test_features_record_states(name: str) -> None:
    model, inputs = tiny.randomise(CASES[name].build()), CASES[name].inputs()
    model.set_attn_implementation("eager")
    texts = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
    methods = {"get_image_features": {"pixel_values": inputs["pixel_values"]}, "get_text_features": texts}
    for method, given in methods.items():
        if method == "get_text_features" and name.startswith("llava"):
            continue
        call = getattr(model, method)
        plain, asked = call(**given), call(**given, **ASKED)
        assert plain.hidden_states is plain.attentions is None
        assert len(asked.last_hidden_state) == len(asked.hidden_states[0])
        assert len(asked.hidden_states) == len(asked.attentions) + 1
        for found, expected in zip(asked.pooler_output, plain.pooler_output, strict=True):
            torch.testing.assert_close(found, expected)
        assert isinstance(call(**given, return_dict=False), tuple)


@torch.no_grad()
def test_clip_records_what_transformers_clip_records() -> None:
    native, inputs = tiny.randomise(CLIPModel(tiny.native_clip_config())), tiny.clip_inputs()
    own = tiny.clip_model()
    native.set_attn_implementation("eager")
    own.set_attn_implementation("eager")
    outputs = [model(**inputs, **ASKED) for model in (own, native)]
    assert list(outputs[0].keys()) == list(outputs[1].keys())
    for name in ("vision_model_output", "text_model_output"):
        own_shapes, native_shapes = ([s.shape for s in (*o[name].hidden_states, *o[name].attentions)] for o in outputs)
        assert own_shapes == native_shapes


@torch.no_grad()
def test_llava_records_what_transformers_llava_records() -> None:
    """The numbers, too."""
    native, own = tiny_llava.pair(anyres=False)
    native.set_attn_implementation("eager")
    own.set_attn_implementation("eager")
    input_ids = torch.randint(1, 40, (2, 24))
    input_ids[:, 2:18] = tiny_llava.IMAGE
    inputs: Inputs = {"input_ids": input_ids, "pixel_values": tiny.pixels(2)}
    ours, theirs = own(**inputs, **ASKED), native(**inputs, **ASKED)
    for name in ("hidden_states", "attentions"):
        for found, expected in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blip, captions", "blip2, second stage, llama", "llava, llama"])
def test_generate_returns_states(name: str) -> None:
    model = tiny.randomise(CASES[name].build())
    model.set_attn_implementation("eager")
    inputs = {key: value for key, value in CASES[name].inputs().items() if key != "use_cache"}
    if name.startswith("blip2"):
        inputs = tiny_blip2.stage2_inputs(padding_side="left")
    output = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, output_scores=True, **ASKED
    )
    assert len(output.scores) == len(output.hidden_states) == len(output.attentions) == 3
    assert len(output.hidden_states[0]) == 3  # embeddings and two layers


def test_nothing_is_hooked_without_a_request() -> None:
    model = tiny.clip_model()
    calls: list[nn.Module] = []
    with recording({}, vision=model.vision_model) as outputs:
        assert not model.vision_model._forward_hooks
        model.vision_model.register_forward_hook(lambda module, args, output: calls.append(module))
        model.vision_pooled(tiny.pixels())
    assert outputs == {}
    assert len(calls) == 1
    with recording(ASKED, vision=model.vision_model) as outputs:
        model.vision_pooled(tiny.pixels())
    assert len(outputs["vision"].hidden_states) == 3
    assert not model.vision_model._forward_pre_hooks
