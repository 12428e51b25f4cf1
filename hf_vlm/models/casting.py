"""Inputs of a module in the dtype that it computes in, whatever wraps or quantises the module."""

import torch
from torch import nn


def cast_for(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The states in the dtype of a module's floating-point parameters.

    A quantised weight (uint8, int8) is skipped: its layer takes any floating-point input. Without floating-point
    parameters, the states are returned unchanged.

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
        if parameter.is_floating_point():
            return states.to(parameter.dtype)
    return states


__all__ = ["cast_for"]
