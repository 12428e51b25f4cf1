"""Image towers, ours or any vision encoder of transformers: build, load, resize, freeze, pool, read one layer.

Shapes: I images, P patches (with the class token), B rows, L tokens, H hidden size.
"""

import copy

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_tower import VlmTextTowerConfig, VlmTowerConfig
from .freezing import freeze, is_frozen
from .modeling_tower import VlmTowerModel, resolve_layer


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A new image tower for a config: ours, or the class that `AutoModel` chooses."""
    if config.model_type == VlmTowerConfig.model_type:
        return VlmTowerModel._from_config(config)
    return AutoModel.from_config(config)


def load_tower(source: str | PreTrainedModel, name: str, kwargs: dict) -> PreTrainedModel:
    """Loads a tower.

    Args:
        source: Hub id, folder or instance of an encoder, or of a model with two towers.
        name: `"vision"` or `"text"`: which of two towers to take.
        kwargs: Options of `from_pretrained`; the default dtype is float32.

    Raises:
        ValueError: if `AutoModel` cannot build the tower from its config, which loading the whole model requires.
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


def copy_vision_tower(source: str | PreTrainedModel, kwargs: dict | None, image_size: int | None) -> PreTrainedModel:
    """A copy of an image tower, for images of `image_size` pixels.

    Args:
        source: Hub id, folder or instance.
        kwargs: Options of `from_pretrained`.
        image_size: Side of the images in pixels; None keeps the tower's own. See `resize_tower`.

    Raises:
        ValueError: if the size differs from that of a tower of transformers.
    """
    tower = load_tower(source, "vision", kwargs or {})
    if not isinstance(source, str):
        tower = copy.deepcopy(tower)
    resize_tower(tower, image_size)
    return tower


def config_without_path(tower: PreTrainedModel) -> dict:
    """A model's config without its local path, which must not be published, and without its quantisation.

    transformers reads quantisation only from the config of a whole model: see `quantised.py`.
    """
    config = tower.config.to_dict()
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    return config


def resize_tower(tower: PreTrainedModel, image_size: int | None) -> None:
    """Changes the image size of a tower in place; its position embeddings are interpolated.

    Args:
        tower: The tower. Towers of transformers cannot be resized.
        image_size: Side of the images in pixels; None changes nothing.

    Raises:
        ValueError: if the size differs from that of a tower of transformers.
    """
    if image_size is None or image_size == tower.config.image_size:
        return
    if tower.config.model_type != VlmTowerConfig.model_type:
        name, own_size = tower.config.model_type, tower.config.image_size
        raise ValueError(f"A {name} tower takes images of {own_size} pixels, not of {image_size}.")
    tower.resize_images(image_size)


def default_pooling(config: PreTrainedConfig) -> str:
    """`"tower"` for encoders whose pooled output was trained to represent the whole input, else `"mean"`."""
    has_trained_pooler = config.model_type.startswith(("vlm_", "clip", "siglip", "dinov2", "dinov3"))
    return "tower" if has_trained_pooler else "mean"


def pool_tokens(last_hidden_state: torch.Tensor, mode: str, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The first token (`"class"`) or the mean of the unpadded tokens (`"mean"`) of `(B, L, H)`, as `(B, H)`."""
    if mode == "class":
        return last_hidden_state[:, 0]
    if attention_mask is None:
        return last_hidden_state.mean(dim=1)
    weights = attention_mask.unsqueeze(-1).to(last_hidden_state.dtype)
    return (last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def check_image_inputs(pixel_values: torch.Tensor | None, vision_features: torch.Tensor | None) -> None:
    """Refuses images and cached features together, and neither of them."""
    if (pixel_values is None) == (vision_features is None):
        raise ValueError("Pass either pixel_values or vision_features.")


def freeze_unused(tower: PreTrainedModel, uses_pooled_output: bool) -> None:
    """Freezes the parameters of a tower that no used output depends on: mask tokens, and an unused pooling head.

    DDP raises (or hangs) when a trainable parameter gets no gradient.

    Args:
        tower: The tower.
        uses_pooled_output: Whether the pooled output is used; otherwise only the token states are.
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


def tower_states(
    tower: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
) -> torch.Tensor:
    """Hidden states of the last layer as BLIP-2 uses them, `(I, P, width)`; for our tower, before its final norm.

    They have gradients only if the tower has trainable parameters, such as those of an adapter.
    """
    options: dict = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
    if tower.config.model_type == VlmTowerConfig.model_type:
        options["stop_at_layer"] = -1
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(tower)):
        return tower(pixel_values=pixel_values, **options).last_hidden_state


def layer_states(tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
    """Hidden states of one layer, without a final norm.

    Args:
        tower: The tower.
        pixel_values: `(I, channels, height, width)`.
        layer: Index into the hidden states: 0 for the embeddings, -1 for the last layer, -2 for LLaVA's choice.

    Returns:
        `(I, tokens, width)`.

    Raises:
        ValueError: if there is no such layer, or for layer 0 of a tower of transformers.
    """
    if tower.config.model_type == VlmTowerConfig.model_type:
        return tower(pixel_values=pixel_values, stop_at_layer=layer).last_hidden_state
    count = resolve_layer(layer, tower.config.num_hidden_layers)
    if count == 0:
        raise ValueError("vision_feature_layer=0 is the embeddings, which only VlmTowerModel supports: use 1 or more.")
    states = []
    _, layers = _find_layers(tower)
    hook = layers[count - 1].register_forward_hook(lambda module, inputs, output: states.append(output))
    try:
        _without_last_layers(tower, count)(pixel_values=pixel_values)
    finally:
        hook.remove()
    return states[0][0] if isinstance(states[0], tuple) else states[0]


def read_parameters(tower: PreTrainedModel, layer: int) -> list[nn.Parameter]:
    """The parameters that `layer_states` depends on.

    Only these may be trainable: DDP raises (or hangs) when a trainable parameter gets no gradient.
    """
    _, layers = _find_layers(tower)
    unread = {id(parameter) for parameter in layers[resolve_layer(layer, len(layers)) :].parameters()}
    last = list(layers.parameters())[-1]
    found = []
    for name, parameter in tower.named_parameters():  # modules registered after the layers are called after them
        if id(parameter) not in unread and not name.endswith("mask_token"):
            found.append(parameter)
        if parameter is last:
            return found
    return found


def has_class_token(tower: PreTrainedModel) -> bool:
    """Whether a tower has a class token before the patches."""
    if tower.config.model_type == VlmTowerConfig.model_type:
        return tower.config.use_class_token
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())


def count_extra_tokens(tower: PreTrainedModel) -> int:
    """Number of tokens before the patches: the class token and registers."""
    registers = getattr(tower.config, "num_register_tokens", 0)  # transformers' name for it; most configs have none
    return int(has_class_token(tower)) + registers


def _find_layers(tower: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """A tower's list of layers, and the list's dotted name in the tower."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == tower.config.num_hidden_layers:
            return name, module
    raise ValueError(f"A {tower.config.model_type} tower has no list of layers to choose from: use another tower.")


def _without_last_layers(tower: PreTrainedModel, count: int) -> PreTrainedModel:
    """A view of a tower that runs only the first `count` layers, on the same layers and weights.

    Only the modules above the list of layers are copied, shallowly, so the tower itself does not change.
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


__all__ = [
    "build_vision_tower",
    "check_image_inputs",
    "config_without_path",
    "copy_vision_tower",
    "count_extra_tokens",
    "default_pooling",
    "freeze_unused",
    "has_class_token",
    "layer_states",
    "load_tower",
    "pool_tokens",
    "read_parameters",
    "resize_tower",
    "tower_states",
]
