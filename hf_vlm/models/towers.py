"""Any image tower: build, load, resize, freeze, and read one of its layers."""

import copy

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_tower import VlmTextTowerConfig, VlmTowerConfig
from .freezing import freeze
from .modeling_tower import VlmTowerModel, resolve_layer


def default_pooling(config: PreTrainedConfig) -> str:
    """`"tower"` for encoders whose pooled output is trained to stand for the whole, else `"mean"`."""
    has_trained_pooler = config.model_type.startswith(("vlm_", "clip", "siglip", "dinov2", "dinov3"))
    return "tower" if has_trained_pooler else "mean"


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A new image tower: ours, or the one that `AutoModel` knows for the config."""
    if config.model_type == VlmTowerConfig.model_type:
        return VlmTowerModel._from_config(config)
    return AutoModel.from_config(config)


def freeze_unused(tower: PreTrainedModel, uses_pooled_output: bool) -> None:
    """Freezes a tower's mask tokens and, where only its token states are used, what its pooled output alone needs.

    A trained parameter without a gradient stalls data parallelism.
    """
    config = tower.config
    unused: tuple[str, ...] = () if uses_pooled_output else ("pooler.", "head.")
    if not uses_pooled_output and config.model_type == "clip_vision_model":
        unused += ("post_layernorm.",)
    if not uses_pooled_output and config.model_type == VlmTowerConfig.model_type and config.final_norm == "pooled":
        unused += ("post_norm.",)
    for name, parameter in tower.named_parameters():
        if name.startswith(unused) or name.endswith("mask_token"):
            freeze(parameter)


def load_tower(source: str | PreTrainedModel, name: str, kwargs: dict) -> PreTrainedModel:
    """A tower from an id, a folder or an instance; of a two-tower model, the tower called `name`.

    Raises:
        ValueError: if `AutoModel` could not build it again from its config, as loading the whole will have to.
    """
    model = source
    if isinstance(source, str):
        config = AutoConfig.from_pretrained(source, revision=kwargs.get("revision"))
        model = AutoModel.from_pretrained(source, config=config, **{"dtype": torch.float32, **kwargs})
    if f"{name}_config" in model.config.to_dict():
        model = model.get_submodule(f"{name}_model")
    is_own = model.config.model_type in (VlmTowerConfig.model_type, VlmTextTowerConfig.model_type)
    if not is_own and type(model.config) not in MODEL_MAPPING:
        raise ValueError(f"AutoModel has no encoder for {model.config.model_type}: choose another {name} tower.")
    return model


def resize_tower(tower: PreTrainedModel, image_size: int | None) -> None:
    """Makes an image tower take images of `image_size` pixels (None: as it is): one of ours interpolates its positions.

    Raises:
        ValueError: if a foreign tower takes images of another size.
    """
    if image_size is None or image_size == tower.config.image_size:
        return
    if tower.config.model_type != VlmTowerConfig.model_type:
        name, own_size = tower.config.model_type, tower.config.image_size
        raise ValueError(f"A {name} tower takes images of {own_size} pixels, not of {image_size}.")
    tower.resize_images(image_size)


def config_without_path(tower: PreTrainedModel) -> dict:
    """A tower's config without the folder that it was loaded from, which is nobody else's business."""
    config = tower.config.to_dict()
    config.pop("_name_or_path", None)
    return config


def tower_states(
    tower: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
) -> torch.Tensor:
    """What BLIP-2 reads of an image tower, `(I, P, width)`: its last states, ours without their final norm."""
    options: dict = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
    if tower.config.model_type == VlmTowerConfig.model_type:
        options["stop_at_layer"] = -1
    with torch.no_grad():
        return tower(pixel_values=pixel_values, **options).last_hidden_state


def frozen_tower(source: str | PreTrainedModel, kwargs: dict | None, image_size: int | None) -> PreTrainedModel:
    """A copy of an image tower for images of `image_size` pixels: one of ours interpolates its positions.

    Raises:
        ValueError: if a foreign tower takes images of another size.
    """
    tower = load_tower(source, "vision", kwargs or {})
    if not isinstance(source, str):
        tower = copy.deepcopy(tower)
    resize_tower(tower, image_size)
    return tower


def has_class_token(tower: PreTrainedModel) -> bool:
    """Whether a tower puts a class token before the patches."""
    if tower.config.model_type == VlmTowerConfig.model_type:
        return tower.config.use_class_token
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())


def count_extra_tokens(tower: PreTrainedModel) -> int:
    """How many tokens a tower puts before the patches: a class token, registers."""
    registers = getattr(tower.config, "num_register_tokens", 0)  # the name in all of transformers; most have none
    return int(has_class_token(tower)) + registers


def _find_layers(tower: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a tower's layers, and its dotted name in the tower."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == tower.config.num_hidden_layers:
            return name, module
    raise ValueError(f"A {tower.config.model_type} tower has no list of layers to choose one of: take another tower.")


def _without_last_layers(tower: PreTrainedModel, count: int) -> PreTrainedModel:
    """A second view of a tower that runs the first `count` layers only; the modules and weights are the same objects.

    Only the modules that lead to the list of layers are copied (shallowly), so the tower itself does not change.
    """
    name, layers = _find_layers(tower)
    *parents, last = name.split(".")
    view = _shallow_copy(tower)
    parent: nn.Module = view
    for child in parents:
        parent._modules[child] = _shallow_copy(parent.get_submodule(child))
        parent = parent.get_submodule(child)
    parent._modules[last] = layers[:count]
    return view


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the same parameters and children, whose children can be replaced without changing the original."""
    shallow = copy.copy(module)
    shallow._modules = dict(module._modules)
    return shallow


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
    states = []
    _, layers = _find_layers(tower)
    hook = layers[count - 1].register_forward_hook(lambda module, inputs, output: states.append(output))
    try:
        _without_last_layers(tower, count)(pixel_values=pixel_values)
    finally:
        hook.remove()
    return states[0][0] if isinstance(states[0], tuple) else states[0]


def read_parameters(tower: PreTrainedModel, layer: int) -> list[nn.Parameter]:
    """The parameters that `layer_states` depends on: a trained one without a gradient stalls data parallelism."""
    _, layers = _find_layers(tower)
    unread = {id(parameter) for parameter in layers[resolve_layer(layer, len(layers)) :].parameters()}
    last = next(reversed(list(layers.parameters())))
    found = []
    for name, parameter in tower.named_parameters():  # what is registered behind the layers is called behind them
        if id(parameter) not in unread and not name.endswith("mask_token"):
            found.append(parameter)
        if parameter is last:
            return found
    return found


__all__ = [
    "build_vision_tower",
    "config_without_path",
    "count_extra_tokens",
    "freeze_unused",
    "frozen_tower",
    "has_class_token",
    "layer_states",
    "load_tower",
    "read_parameters",
    "resize_tower",
    "tower_states",
]
