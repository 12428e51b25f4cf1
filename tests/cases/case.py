"""A case: one model with a batch, its loss and the shapes of its outputs; and what tests of models compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from hf_vlm.models.modeling_fusion import VlmFusionCrossAttention

Inputs = dict[str, torch.Tensor]


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Case:
    """A model with what the common tests need to know of it.

    Args:
        build: Makes the model, newly initialised.
        inputs: Makes a batch.
        loss: The loss of model and batch.
        shapes: Shapes of the outputs on that batch.
        frozen: Names of the frozen modules, below the base model.
        overfits: Whether 200 steps on one batch bring the loss below a tenth.
    """

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]
    loss: Callable[[PreTrainedModel, Inputs], torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    frozen: tuple[str, ...] = ()
    overfits: bool = False


@contextmanager
def calls_of(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules among these that are called, in order, once for each call; a shallow copy counts as its original."""
    calls: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda *_, own=module: calls.append(own)) for module in modules]
    yield calls
    for handle in handles:
        handle.remove()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_all_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def assert_tensors_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, tensors)()), dict(getattr(expected, tensors)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def rows_projected(model: nn.Module) -> Iterator[dict[nn.Module, list[int]]]:
    """How many images each cross-attention projects keys and values of, call by call."""
    calls: dict[nn.Module, list[int]] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, VlmFusionCrossAttention):
            rows = calls.setdefault(module, [])
            hook = lambda _, inputs, rows=rows: rows.append(len(inputs[0]))  # noqa: E731
            handles.append(module.key_value.register_forward_pre_hook(hook))
    yield calls
    for handle in handles:
        handle.remove()
