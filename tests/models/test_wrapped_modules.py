"""Modules are called and their weights are never read past them, so whatever wraps a module works.

Adapters, reentrant checkpointing and offloading wrap modules; quantisation replaces them: see `test_quantised.py`.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, PreTrainedModel

from cases import tiny
from cases.case import Case, Inputs
from cases.table import CASES

# Of every family and part; the layers that no output depends on are named by a pattern.
UNUSED = {
    "tower, clip layout": None,
    "tower, mean of patches": None,
    "text tower": None,
    "clip": None,
    "clip, sigmoid loss": None,
    "clip, dinov2 + clip text": None,
    "blip, encoder": None,
    "blip, pretraining": None,
    "blip, pretraining, nothing shared": None,
    "blip, retrieval": None,
    "blip, captions": None,
    "blip, answers": None,
    "blip2, pretraining": r"lm_head\.decoder",  # tied to the word embeddings, which a merge would change
    "blip2, retrieval": None,
    "blip2, second stage, llama": r"qformer\.layers\.\d\.mlp\.",
    "blip2, second stage, t5": r"qformer\.layers\.\d\.mlp\.|language_model\.lm_head",
    "blip2, instructions, llama, tied": r"qformer\.layers\.2\.mlp\.|language_model\.lm_head",
    "llava, llama": r"vision_model\.layers\.1\.",
    "llava, anyres": r"vision_model\.layers\.1\.",
    "llava, on clip": r"vision_model\.encoder\.layers\.3\.",
}


SOME = [
    "tower, mean of patches",
    "clip, sigmoid loss",
    "blip, retrieval",
    "blip, answers",
    "blip2, retrieval",
    "blip2, second stage, t5",
    "blip2, instructions, llama, tied",
    "llava, anyres",
]


@pytest.fixture(params=UNUSED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def with_lora(model: PreTrainedModel, unused: str | None, **options) -> PeftModel:
    """LoRA on every linear and convolutional layer that an output depends on, with random adapters and no dropout."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    reached = [name for name in layers if unused is None or not re.search(unused, name)]
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": reached, **options}))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and not options:
            nn.init.normal_(parameter, std=0.1)
    return adapted


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model(**inputs).items() if torch.is_tensor(value)}


def assert_equal_to(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    """Relative to the largest value of each output."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        difference = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert difference <= atol, (name, float(difference))


def test_adapters_are_trained_and_merged(name: str) -> None:
    """Each layer's adapter gets a gradient and moves in a step; merged into the weights, the outputs are equal."""
    case = CASES[name]
    model, inputs = tiny.randomise(case.build()), case.inputs()
    plain = outputs_of(model, inputs)
    adapted = with_lora(model, UNUSED[name])
    before = {key: value.detach().clone() for key, value in adapted.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=1e-3)
    case.loss(adapted.get_base_model(), inputs).backward()
    optimizer.step()
    trained = dict(adapted.named_parameters())
    assert [key for key in before if trained[key].grad is None or not trained[key].grad.abs().max() > 0] == []
    assert [key for key in before if torch.equal(trained[key], before[key])] == []
    found = outputs_of(adapted.get_base_model(), inputs)
    assert any((found[key] - plain[key]).abs().max() > 1e-3 for key in plain)
    assert_equal_to(outputs_of(adapted.merge_and_unload(), inputs), found, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "blip, retrieval", "blip2, retrieval", "llava, llama"], indirect=True)
def test_pissa_starts_from_the_same_model(name: str) -> None:
    """Its adapters take a part of each weight away, so a layer that reads the weight itself computes something else."""
    case = CASES[name]
    model, inputs = tiny.randomise(case.build()), case.inputs()
    plain = outputs_of(model, inputs)
    unused = "patch_embedding" if UNUSED[name] is None else f"{UNUSED[name]}|patch_embedding"
    adapted = with_lora(model, unused, init_lora_weights="pissa", lora_alpha=2)
    assert_equal_to(outputs_of(adapted.get_base_model(), inputs), plain, atol=1e-4)


@pytest.mark.parametrize("name", SOME, indirect=True)
def test_reentrant_checkpointing_reaches_every_adapter(name: str) -> None:
    """transformers makes the outputs of embeddings require a gradient, which needs the embeddings to be called."""
    case = CASES[name]
    model, inputs = tiny.randomise(case.build()).train(), case.inputs()
    unused = "patch_embedding" if UNUSED[name] is None else f"{UNUSED[name]}|patch_embedding"
    adapted = with_lora(model, unused)
    base = adapted.get_base_model()
    case.loss(base, inputs).backward()
    expected = {key: value.grad.clone() for key, value in adapted.named_parameters() if value.grad is not None}
    adapted.zero_grad()
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    case.loss(base, inputs).backward()
    found = {key: value.grad for key, value in adapted.named_parameters() if value.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOME, indirect=True)
def test_offloaded_models_compute_the_same(name: str) -> None:
    """accelerate's `cpu_offload` loads the weights of a module while the module is called, and only then."""
    case = CASES[name]
    model, inputs = tiny.randomise(case.build()), case.inputs()
    expected = outputs_of(model, inputs)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_equal_to(outputs_of(offloaded, inputs), expected, atol=0.0)
    if not hasattr(model, "update_momentum"):  # the momentum encoders copy weights, which are away
        with torch.no_grad():
            assert torch.equal(case.loss(offloaded, inputs), case.loss(model, inputs))


@pytest.mark.parametrize("name", ["clip", "blip, captions", "blip2, retrieval", "llava, llama"], indirect=True)
def test_a_model_on_disk_computes_the_same(name: str, tmp_path: Path) -> None:
    """`device_map` with every weight on disk."""
    case: Case = CASES[name]
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.save_pretrained(tmp_path)
    loader = AutoModel if model.base_model is model else type(model)
    on_disk = loader.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert_equal_to(outputs_of(on_disk, inputs), outputs_of(model, inputs), atol=0.0)
