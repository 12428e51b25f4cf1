"""LLaVA between this package and transformers' `LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`.

- transformers stores the LLM's body and its head separately; here the LLM is one module.
- A CLIP tower is converted to our tower and back. Any other tower is the same module on both sides.
- The image newline of LLaVA-1.6 belongs to the model in transformers and to the projector here.
- transformers applies the head alone, so an LLM that scales or caps its logits has no equivalent there.
"""

import copy

from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from ...families import native_heads
from ...models.configuration_llava import VlmLlavaConfig
from ...models.modeling_llava import VlmLlavaForConditionalGeneration
from .blip2 import check_same_llm
from .clip import ALLOWED_VISION, QKV, SAME_NAMES, VISION_FIELDS, VISION_NAMES, check_allowed, chosen
from .llava_processors import processor_from_transformers, processor_to_transformers
from .state_dict import Names, StateDict, flipped, fuse, prefixed, rename, split, with_weights

NATIVE_MODELS = tuple(native_heads("vlm_llava"))
OWN_TOWER, CLIP_TOWER = "vlm_tower", "clip_vision_model"
AFTER_THE_HEAD = dict.fromkeys(("logits_scaling", "logit_scale", "final_logit_softcapping"), (None,))


def names_of(model: VlmLlavaForConditionalGeneration, own_tower: bool) -> Names:
    """The name table for a model; the names of the LLM's body and head are found in the LLM."""
    llm = model.model.language_model
    head = next(name for name, module in llm.named_modules() if module is llm.get_output_embeddings())
    return (
        *prefixed("model.vision_model.", "model.vision_tower.", VISION_NAMES if own_tower else SAME_NAMES),
        ("model.projector.newline", "model.image_newline"),
        ("model.projector.*", "model.multi_modal_projector.*"),
        (f"model.language_model.{head}.*", "lm_head.*"),
        (f"model.language_model.{llm.base_model_prefix}.*", "model.language_model.*"),
    )


def tower_only(state_dict: StateDict, prefix: str) -> tuple[StateDict, StateDict]:
    """The tensors of the tower and the remaining tensors, as two state dicts."""
    tower = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    return tower, {name: tensor for name, tensor in state_dict.items() if name not in tower}


def from_transformers(model: PreTrainedModel) -> VlmLlavaForConditionalGeneration:
    """See [`hf_vlm.hub.convert.from_transformers`]."""
    if type(model) not in NATIVE_MODELS:
        names = ", ".join(native.__name__ for native in NATIVE_MODELS)
        raise ValueError(f"{type(model).__name__} cannot be converted; supported classes: {names}.")
    native = model.config
    layer = native.vision_feature_layer
    if isinstance(layer, list | tuple) and len(layer) != 1:
        raise ValueError(f"VlmLlavaModel does not support vision_feature_layer={layer}; it requires a single layer.")
    vision = native.vision_config
    is_clip = vision.model_type == CLIP_TOWER
    config = VlmLlavaConfig(
        vision_config=chosen(vision, VISION_FIELDS) if is_clip else vision.to_dict(),
        text_config=native.text_config.to_dict(),
        image_token_id=native.image_token_index,
        vision_feature_layer=layer if isinstance(layer, int) else layer[0],
        projector_type="mlp",
        projector_bias=native.multimodal_projector_bias,
        image_grid_pinpoints=[list(grid) for grid in native.image_grid_pinpoints] if is_next(model) else None,
        **chosen(native, ("projector_hidden_act", "vision_feature_select_strategy")),
    )
    own = VlmLlavaForConditionalGeneration(config)
    check_same_llm(model.model.language_model, own.model.language_model.base_model)
    tower, rest = tower_only(model.state_dict(), "model.vision_tower.")
    tower = fuse(tower, QKV, "qkv_proj") if is_clip else tower
    own = with_weights(own, rename({**tower, **rest}, flipped(names_of(own, is_clip))))
    own.generation_config = copy.deepcopy(model.generation_config)
    own.model.freeze_tower()
    return own.to(model.device)


def is_next(model: PreTrainedModel) -> bool:
    """Whether a model of transformers is a LLaVA-1.6, which splits images into tiles."""
    return isinstance(model, LlavaNextForConditionalGeneration)


def to_transformers(model: VlmLlavaForConditionalGeneration) -> PreTrainedModel:
    """See [`hf_vlm.hub.convert.to_transformers`]."""
    config = model.config
    native_class = (
        LlavaForConditionalGeneration if config.image_grid_pinpoints is None else LlavaNextForConditionalGeneration
    )
    owner, vision = native_class.__name__, config.vision_config
    check_allowed(config, {"projector_type": ("mlp",)}, owner=owner)
    check_allowed(config.text_config, AFTER_THE_HEAD, "text_config.", owner)
    own_tower = vision.model_type == OWN_TOWER
    if own_tower:
        check_allowed(vision, ALLOWED_VISION, "vision_config.", owner)
    if len(list(model.get_output_embeddings().parameters())) > 1:
        raise ValueError(
            f"{owner} does not support an output layer with a bias, but the output layer of this LLM has one."
        )
    fields = {
        "vision_config": chosen(vision, VISION_FIELDS) | {"model_type": CLIP_TOWER} if own_tower else vision.to_dict(),
        "text_config": config.text_config.to_dict(),
        "image_token_index": config.image_token_id,
        "vision_feature_layer": config.vision_feature_layer,
        "multimodal_projector_bias": config.projector_bias,
        "tie_word_embeddings": config.text_config.tie_word_embeddings,
        **chosen(config, ("projector_hidden_act", "vision_feature_select_strategy")),
    }
    if config.image_grid_pinpoints is None:
        native = LlavaForConditionalGeneration(LlavaConfig(**fields))
    else:
        native = native_class(LlavaNextConfig(**fields, image_grid_pinpoints=config.image_grid_pinpoints))
    check_same_llm(model.model.language_model, AutoModelForCausalLM.from_config(config.text_config))
    tower, rest = tower_only(rename(model.state_dict(), names_of(model, own_tower)), "model.vision_tower.")
    tower = split(tower, QKV, "qkv_proj") if own_tower else tower
    native = with_weights(native, {**tower, **rest})
    native.generation_config = copy.deepcopy(model.generation_config)
    return native.to(model.device)


__all__ = [
    "from_transformers",
    "processor_from_transformers",
    "processor_to_transformers",
    "to_transformers",
]
