"""A layer's states of any image tower, without running the layers after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_tower import VlmTowerConfig
from .modeling_tower import resolve_layer


def has_class_token(tower: PreTrainedModel) -> bool:
    """Whether a tower puts a class token before the patches."""
    if tower.config.model_type == VlmTowerConfig.model_type:
        return tower.config.use_class_token
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())


def count_extra_tokens(tower: PreTrainedModel) -> int:
    """How many tokens a tower puts before the patches: a class token, registers."""
    registers = getattr(tower.config, "num_register_tokens", 0)  # the name in all of transformers; most have none
    return int(has_class_token(tower)) + registers


def _stack_of(tower: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the tower's layers, and their name in it."""
    for module in tower.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == tower.config.num_hidden_layers:
                return module, name
    raise ValueError(f"A {tower.config.model_type} tower has no list of layers to choose one of: take another tower.")


@contextmanager
def _shortened(tower: PreTrainedModel, count: int) -> Iterator[list[torch.Tensor]]:
    """Within it, a tower has `count` layers, and what the last of them gives is put into the list."""
    parent, name = _stack_of(tower)
    layers, states = getattr(parent, name), []

    def keep(module, inputs, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hook = layers[count - 1].register_forward_hook(keep)
    setattr(parent, name, layers[:count])
    try:
        yield states
    finally:
        setattr(parent, name, layers)
        hook.remove()


def layer_states(tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
    """Hidden states of one layer, without a final norm.

    Args:
        tower: Ours or any vision encoder of transformers.
        pixel_values: `(I, channels, height, width)`.
        layer: Index into the hidden states (0 the embeddings, -1 the last layer's, -2 what LLaVA takes).

    Returns:
        `(I, tokens, width)`.

    Raises:
        ValueError: if there is no such layer; of a foreign tower, layer 0 cannot be had.
    """
    if tower.config.model_type == VlmTowerConfig.model_type:
        return tower(pixel_values=pixel_values, stop_at_layer=layer).last_hidden_state
    count = resolve_layer(layer, tower.config.num_hidden_layers)
    if count == 0:
        raise ValueError("vision_feature_layer=0 is the embeddings, which are read of our own towers only.")
    with _shortened(tower, count) as states:
        tower(pixel_values=pixel_values)
    return states[0]


def read_parameters(tower: PreTrainedModel, layer: int) -> list[nn.Parameter]:
    """The parameters that `layer_states` depends on: a trained one without a gradient stalls data parallelism."""
    parent, name = _stack_of(tower)
    layers = getattr(parent, name)
    unread = {id(parameter) for parameter in layers[resolve_layer(layer, len(layers)) :].parameters()}
    last = next(reversed(list(layers.parameters())))
    found = []
    for name, parameter in tower.named_parameters():  # what is registered behind the layers is called behind them
        if id(parameter) not in unread and not name.endswith("mask_token"):
            found.append(parameter)
        if parameter is last:
            return found
    return found


__all__ = ["count_extra_tokens", "has_class_token", "layer_states", "read_parameters"]
