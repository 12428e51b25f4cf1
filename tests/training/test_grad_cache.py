"""GradCache: the gradients of the whole batch, with dropout too, in the memory of a chunk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cases import tiny
from hf_vlm import VlmClipModel
from hf_vlm.training.grad_cache import grad_cache_backward
from scripts import tiny_training

TESTS = Path(__file__).parents[1]
CHUNK = 3  # does not divide the batch of eight
PAIR_IDS = torch.tensor([0, 1, 2, 0, 1, 3, 0, 3])


def inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny.pixels(8), **tiny.tokens((2 * tiny.CAPTIONS)[:8])}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of every parameter that has one, which are then forgotten."""
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return grads


def plain_chunks(model: VlmClipModel, batch: dict[str, torch.Tensor], chunk: int) -> torch.Tensor:
    """The same computation without a cache: chunks embedded with gradients, one loss, one backward pass."""
    outputs = [
        model(**{name: value[i : i + chunk] for name, value in batch.items()})
        for i in range(0, len(batch["pixel_values"]), chunk)
    ]
    image_embeds, text_embeds = (torch.cat([out[name] for out in outputs]) for name in ("image_embeds", "text_embeds"))
    loss = model.similarity.loss(image_embeds, text_embeds, PAIR_IDS)
    loss.backward()
    return loss.detach()


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: ((actual[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize("chunk", [1, CHUNK, 8, 100])
@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_with_dropout_equals_the_plain_chunks(loss_type: str, chunk: int) -> None:
    model, batch = tiny_training.model(dropout=True, loss_type=loss_type).train(), inputs()
    torch.manual_seed(1)
    expected_loss = plain_chunks(model, batch, chunk)
    random_state = torch.get_rng_state()
    expected = gradients(model)
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    assert ("similarity.logit_bias" in expected) == (loss_type == "sigmoid")

    torch.manual_seed(1)
    loss = grad_cache_backward(model, {**batch, "pair_ids": PAIR_IDS}, chunk, torch.Tensor.backward)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-6)
    assert_close(gradients(model), expected)
    assert torch.equal(torch.get_rng_state(), random_state)  # as if the first pass alone had been run


def test_dropout_is_on_in_these_tests() -> None:
    model, batch = tiny_training.model(dropout=True).train(), inputs()
    one, other = model(**batch), model(**batch)
    for name in ("image_embeds", "text_embeds"):
        assert (one[name] - other[name]).abs().max() > 0.01


@pytest.mark.parametrize("chunk", [1, CHUNK, 8])
@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_without_dropout_equals_the_full_batch(loss_type: str, chunk: int) -> None:
    model, batch = tiny_training.model(loss_type=loss_type).train(), {**inputs(), "pair_ids": PAIR_IDS}
    output = model(**batch, return_loss=True)
    output.loss.backward()
    expected = gradients(model)
    loss = grad_cache_backward(model, batch, chunk, torch.Tensor.backward)
    assert loss == pytest.approx(output.loss.item(), rel=1e-6)
    assert_close(gradients(model), expected)


def test_with_gradient_checkpointing_and_dropout() -> None:
    model, batch = tiny_training.model(dropout=True).train(), {**inputs(), "pair_ids": PAIR_IDS}
    torch.manual_seed(1)
    grad_cache_backward(model, batch, CHUNK, torch.Tensor.backward)
    expected = gradients(model)
    model.activation_checkpointing_enable()
    torch.manual_seed(1)
    grad_cache_backward(model, batch, CHUNK, torch.Tensor.backward)
    assert_close(gradients(model), expected)


def test_without_ids_only_the_own_pair_is_positive() -> None:
    model, batch = tiny_training.model().train(), inputs()
    loss = grad_cache_backward(model, batch, CHUNK, torch.Tensor.backward)
    assert loss == pytest.approx(model(**batch, return_loss=True).loss.item(), rel=1e-6)


def test_with_a_locked_tower_and_its_cached_features() -> None:
    model, batch = tiny_training.model(dropout=True), {**inputs(), "pair_ids": PAIR_IDS}
    model.lock_tower("text")
    model.train()
    features = model.text_pooled(batch["input_ids"], batch["attention_mask"])
    cached = {name: batch[name] for name in ("pixel_values", "pair_ids")} | {"text_features": features}
    found = []
    for each in (batch, cached):
        torch.manual_seed(1)
        grad_cache_backward(model, each, CHUNK, torch.Tensor.backward)
        found.append(gradients(model))
    assert not [name for name in found[0] if name.startswith("text_model.")]
    assert "text_projection.weight" in found[0]
    assert_close(found[1], found[0])


def test_a_fixed_temperature_stays_without_gradient() -> None:
    model, batch = tiny_training.model().train(), inputs()
    model.similarity.logit_scale.requires_grad_(False)
    grad_cache_backward(model, batch, CHUNK, torch.Tensor.backward)
    assert "similarity.logit_scale" not in gradients(model)


def test_gradients_add_up() -> None:
    model, batch = tiny_training.model().train(), inputs()
    grad_cache_backward(model, batch, CHUNK, torch.Tensor.backward)
    once = gradients(model)
    for _ in range(2):
        grad_cache_backward(model, batch, CHUNK, torch.Tensor.backward)
    assert_close(gradients(model), {name: 2 * value for name, value in once.items()})


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    """Above the resident batch, 4096 pairs take at most 1.3 times what 256 take; 64 x 64 pixels, chunks of 256."""
    peaks = {}
    for size in (256, 4096):
        command = [sys.executable, "-m", "scripts.peak_memory", str(size)]
        # A fixed threshold: glibc's own rises, and then freed buffers stay in the heap and count as used.
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        peaks[size] = json.loads(result.stdout.splitlines()[-1])["peak_bytes"]
    assert peaks[256] > 20 * 2**20
    assert peaks[4096] <= 1.3 * peaks[256]
