"""What holds for every model, each a row of `cases.table.CASES`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cases import tiny
from cases.case import Case, assert_all_close, assert_tensors_equal, calls_of, gradients, trained
from cases.table import CASES

OVERFITTED = {name: case for name, case in CASES.items() if case.overfits}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_shapes(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        outputs = model(**inputs)
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == case.shapes
    assert all(tensor.isfinite().all() for tensor in outputs.values())


def test_new_model_has_no_unset_weights(case: Case) -> None:
    """A parameter that the initialisation forgets is garbage, and would be so after loading too."""
    with torch.device("meta"):
        model = case.build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    """Loaded by AutoModel, if no head: all keys match, all tensors are equal, the same parts are frozen."""
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.save_pretrained(tmp_path)
    loader = AutoModel if model.base_model is model else type(model)
    loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_tensors_equal(loaded, model)
    assert trained(loaded) == trained(model)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert_all_close(dict(loaded(**inputs)), dict(model(**inputs)))


def test_sdpa_is_eager(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    outputs = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        attentions = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
        assert attentions == {attention}
        outputs.append(dict(model(**inputs)))
    assert_all_close(*outputs)


def test_sdpa_in_bfloat16_on_a_cpu(case: Case) -> None:
    """There it is written out: the same numbers as PyTorch's kernel in float32, to bfloat16's precision."""
    model, inputs = case.build().eval(), case.inputs()
    with torch.no_grad():
        expected = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**inputs)
    for name in case.shapes:
        assert (found[name] - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_tuple_is_dict(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        as_dict, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for found, expected in zip(as_tuple, as_dict.to_tuple(), strict=True):
        assert torch.equal(found, expected)


def test_every_trained_parameter_has_a_gradient(case: Case) -> None:
    model = tiny.randomise(case.build())
    found = gradients(model, case.loss(model, case.inputs()))
    for name, parameter in model.named_parameters():
        assert (found[name] is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert found[name].isfinite().all()
            assert found[name].abs().max() > 0, name


def test_gradient_checkpointing(case: Case) -> None:
    """Loss and gradients stay equal. Checkpointed layers run once more in the backward pass, frozen parts do not."""
    model, inputs = tiny.randomise(case.build()).train(), case.inputs()
    frozen = [model.base_model.get_submodule(name) for name in case.frozen if getattr(model.base_model, name)]
    within = {module for part in frozen for module in part.modules()}
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m not in within]
    watched = [next(m for m in layer.modules() if type(m).__name__.endswith("Norm")) for layer in layers]
    case.loss(model, inputs)  # makes the momentum encoders, whose calls do not count
    towers = [model.base_model.vision_model] if "vision_model" in case.frozen else []
    results, num_calls = [], []
    for _ in range(2):
        with calls_of(*watched, *towers) as calls:
            loss = case.loss(model, inputs)
            results.append({"loss": loss.detach(), **gradients(model, loss)})
        assert [calls.count(tower) for tower in towers] == [1] * len(towers)
        num_calls.append([calls.count(module) for module in watched])
        model.activation_checkpointing_enable()
    assert min(num_calls[0]) > 0
    assert num_calls[1] == [2 * count for count in num_calls[0]]
    plain, checkpointed = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert_all_close(checkpointed, plain)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.overfits],
    ids=[name for name, case in CASES.items() if case.overfits],
)
def test_one_batch_is_overfitted(case: Case) -> None:
    model, inputs = case.build().train(), case.inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses: list[float] = []
    while len(losses) < 200 and (not losses or losses[-1] > 0.1 * losses[0]):
        optimizer.zero_grad()
        loss = case.loss(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0
    assert losses[-1] <= 0.1 * losses[0]
