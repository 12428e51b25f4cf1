"""Dtypes of modules that may be wrapped or quantised: what their inputs must be, and what must not be cast."""

import torch
from torch import nn


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds a quantised weight, whose numbers are no weights: a cast would destroy it."""
    return not parameter.is_floating_point() or type(parameter).__name__ in ("Params4bit", "Int8Params")


def cast_for(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The states in the dtype of a module's parameters.

    Quantised weights are skipped, because their layers take any floating-point input. Without other parameters, the
    states are returned unchanged.

    Args:
        module: A layer, possibly wrapped by an adapter.
        states: Floating-point inputs of the layer.

    Example:
        ```python
        >>> cast_for(nn.Linear(2, 2).bfloat16(), torch.zeros(2)).dtype
        torch.bfloat16
        ```
    """
    for parameter in module.parameters():
        if not is_packed(parameter):
            return states.to(parameter.dtype)
    return states


__all__ = ["cast_for", "is_packed"]
