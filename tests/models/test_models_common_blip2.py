"""What `test_models_common.py` asks of every model, of BLIP-2 and InstructBLIP; and what holds for frozen parts."""

from pathlib import Path

import pytest
import torch
from test_models_common import (
    Case,
    Inputs,
    assert_all_close,
    calls_of,
    dinov2,
    gradients,
    test_every_trained_parameter_has_a_gradient,
    test_new_model_has_no_unset_weights,
    test_sdpa_in_bfloat16_on_a_cpu,
    test_sdpa_is_eager,
    test_shapes,
    test_tuple_is_dict,
)
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import tiny
import tiny_blip2
from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmBlip2Model,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipModel,
)

__all__ = [
    "test_every_trained_parameter_has_a_gradient",
    "test_new_model_has_no_unset_weights",
    "test_sdpa_in_bfloat16_on_a_cpu",
    "test_sdpa_is_eager",
    "test_shapes",
    "test_tuple_is_dict",
]
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


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def assert_tensors_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, tensors)()), dict(getattr(expected, tensors)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_tensors_equal(loaded, model)
    assert trained(loaded) == trained(model)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert_all_close(dict(loaded(**inputs)), dict(model(**inputs)))


def test_automodel_has_the_body_of_every_head(case: Case, tmp_path: Path) -> None:
    """Nothing is missing, only the head's own layers are left over, and its features are the head's."""
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.save_pretrained(tmp_path)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    is_instruct = isinstance(model, VlmInstructBlipForConditionalGeneration)
    assert type(body) is (VlmInstructBlipModel if is_instruct else VlmBlip2Model)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(("similarity.", "itm_head.", "lm_head.")) for name in info["unexpected_keys"])
    assert_tensors_equal(body, model.base_model)
    inputs = {name: value for name, value in inputs.items() if name not in ("decoder_input_ids", "use_cache")}
    with torch.no_grad():
        assert torch.equal(body(**inputs).last_hidden_state, model.base_model(**inputs).last_hidden_state)


def test_gradient_checkpointing(case: Case) -> None:
    """The tower, frozen, is not run again; the Q-Former's layers are."""
    model, inputs = tiny.randomise(case.build()).train(), case.inputs()
    layers = [m for m in model.base_model.qformer.modules() if isinstance(m, GradientCheckpointingLayer)]
    norms = [next(module for module in layer.modules() if isinstance(module, nn.LayerNorm)) for layer in layers]
    results, num_calls = [], []
    for _ in range(2):
        with calls_of(*norms, model.base_model.vision_model) as calls:
            loss = case.loss(model, inputs)
            results.append({"loss": loss.detach(), **gradients(model, loss)})
        assert calls.count(model.base_model.vision_model) == 1
        num_calls.append([calls.count(norm) for norm in norms])
        model.activation_checkpointing_enable()
    assert min(num_calls[0]) > 0
    assert num_calls[1] == [2 * count for count in num_calls[0]]
    plain, checkpointed = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert_all_close(checkpointed, plain)


def test_frozen_parts_stay_as_they_are(case: Case) -> None:
    """Three steps with weight decay: tower and LLM in eval mode, without gradients, and unchanged."""
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.train()
    body = model.base_model
    frozen = [body.vision_model, *([] if body.language_model is None else [body.language_model])]
    assert not any(module.training for part in frozen for module in part.modules())
    assert all(module.training for module in body.qformer.modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        case.loss(model, inputs).backward()
        assert all(p.grad is None for part in frozen for p in part.parameters())
        optimizer.step()
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == trained(model)
    prefixes = ("model.vision_model.", "model.language_model.")
    assert not any(name.startswith(prefixes) for name in changed)
    assert {"model.vision_norm.weight", "model.qformer.embeddings.query_tokens"} <= changed


def test_cached_features_take_the_place_of_the_tower(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        options = {"stop_at_layer": -1} if model.config.vision_config.model_type == "vlm_tower" else {}
        features = model.base_model.vision_model(pixel_values=inputs["pixel_values"], **options).last_hidden_state
    cached = {**{k: v for k, v in inputs.items() if k != "pixel_values"}, "vision_features": features}
    results = []
    for batch, num_calls in ((inputs, 1), (cached, 0)):
        with calls_of(model.base_model.vision_model) as calls:
            loss = case.loss(model, batch)
        assert len(calls) == num_calls
        results.append({"loss": loss.detach(), **gradients(model, loss)})
    from_pixels, from_cache = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert_all_close(from_cache, from_pixels)
    with pytest.raises(ValueError, match="Pass either pixel_values or vision_features"):
        case.loss(model, {**inputs, "vision_features": features})


def test_another_image_changes_the_loss(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        one = case.loss(model, inputs)
        other = case.loss(model, {**inputs, "pixel_values": tiny.pixels()})
    assert abs(one - other) > 1e-4


def test_text_branch_is_trained_where_it_is_read(case: Case) -> None:
    model = case.build()
    branch = {n for n in trained(model) if ".qformer." in n and (".mlp." in n and ".query_mlp." not in n)}
    layers = {int(name.split("layers.")[1][0]) for name in branch}
    words = {n for n in trained(model) if "word_embedding" in n or "position_embedding" in n}
    if isinstance(model, VlmInstructBlipForConditionalGeneration):
        assert layers == {0, 1}  # of the last, queries see nothing
        assert len(words) == 2
    elif isinstance(model, VlmBlip2ForConditionalGeneration):
        assert not branch | words
    else:
        assert layers == {0, 1, 2}
        assert len(words) == 2
