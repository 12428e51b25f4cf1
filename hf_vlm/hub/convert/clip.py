"""CLIP between this package and transformers' `CLIPModel`, in both directions.

- Parameter names differ; the tables translate them.
- transformers stores query, key and value projections separately; here they are fused.
- `ALLOWED` lists the option values that `CLIPModel` can express.
"""

from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ...models.configuration_clip import VlmClipConfig
from ...models.modeling_clip import VlmClipModel
from ...models.processing_clip import VlmClipProcessor
from .images import from_clip_image_processor, to_clip_image_processor
from .state_dict import Names, flipped, fuse, prefixed, rename, split, with_weights

QKV = ("q_proj", "k_proj", "v_proj")
# Our names on the left. `qkv_proj` stands for transformers' three projections after fusing.
LAYER_NAMES: Names = (
    ("layers.*.norm1.*", "encoder.layers.*.layer_norm1.*"),
    ("layers.*.norm2.*", "encoder.layers.*.layer_norm2.*"),
    ("layers.*.attn.qkv.*", "encoder.layers.*.self_attn.qkv_proj.*"),
    ("layers.*.attn.proj.*", "encoder.layers.*.self_attn.out_proj.*"),
    ("layers.*.mlp.*", "encoder.layers.*.mlp.*"),
)
VISION_NAMES: Names = (
    ("embeddings.*", "embeddings.*"),
    ("pre_norm.*", "pre_layrnorm.*"),
    ("post_norm.*", "post_layernorm.*"),
    *LAYER_NAMES,
)
TEXT_NAMES: Names = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("position_embedding.weight", "embeddings.position_embedding.weight"),
    ("post_norm.*", "final_layer_norm.*"),
    *LAYER_NAMES,
)
HEAD_NAMES: Names = (
    ("visual_projection.weight", "visual_projection.weight"),
    ("text_projection.weight", "text_projection.weight"),
    ("similarity.logit_scale", "logit_scale"),
)
# A tower that is a transformers module on both sides keeps its names.
SAME_NAMES: Names = (("*", "*"),)

LAYER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
)
VISION_FIELDS = (*LAYER_FIELDS, "num_channels", "image_size", "patch_size")
TOKEN_FIELDS = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
TEXT_FIELDS = (*LAYER_FIELDS, *TOKEN_FIELDS)

# For options that CLIPModel does not have: the values that it computes with. Options that only act in training (patch
# dropout, drop path, the clamp) do not change outputs and are dropped.
ALLOWED = {"vision_pooling": ("tower",), "text_pooling": ("tower",), "loss_type": ("softmax",)}
ALLOWED_VISION = {
    "model_type": ("vlm_tower", "clip_vision_model"),
    "qkv_bias": (True,),
    "use_class_token": (True,),
    "use_patch_bias": (False,),
    "use_pre_norm": (True,),
    "final_norm": ("pooled",),
    "pooling": ("class",),
}
ALLOWED_TEXT = {"model_type": ("vlm_text_tower", "clip_text_model")}


def native_names(config: VlmClipConfig) -> Names:
    """The name table for a config; each tower is ours or a transformers module."""
    is_own_vision = config.vision_config.model_type == "vlm_tower"
    is_own_text = config.text_config.model_type == "vlm_text_tower"
    return (
        *prefixed("vision_model.", "vision_model.", VISION_NAMES if is_own_vision else SAME_NAMES),
        *prefixed("text_model.", "text_model.", TEXT_NAMES if is_own_text else SAME_NAMES),
        *HEAD_NAMES,
    )


def chosen(config: PreTrainedConfig, fields: tuple[str, ...]) -> dict:
    """The values of the given fields of a config."""
    values = config.to_dict()
    return {name: values[name] for name in fields}


def check_allowed(
    config: PreTrainedConfig, allowed: dict[str, tuple], prefix: str = "", owner: str = "CLIPModel"
) -> None:
    """Raises a one-line ValueError for the first option whose value `owner` cannot express."""
    values = config.to_dict()
    for name, choices in allowed.items():
        if name in values and values[name] not in choices:
            option = f"{prefix}{name}={values[name]!r}"
            raise ValueError(f"{owner} does not support {option}; it requires {choices[0]!r}.")


def from_transformers(model: PreTrainedModel) -> VlmClipModel:
    """See [`hf_vlm.hub.convert.from_transformers`]."""
    if not isinstance(model, CLIPModel):
        raise ValueError(f"{type(model).__name__} is not a complete CLIP model: pass a CLIPModel.")
    config = VlmClipConfig(
        vision_config=chosen(model.config.vision_config, VISION_FIELDS),
        text_config=chosen(model.config.text_config, TEXT_FIELDS),
        **chosen(model.config, ("projection_dim", "logit_scale_init_value")),
    )
    state_dict = fuse(model.state_dict(), QKV, "qkv_proj")
    return with_weights(VlmClipModel(config), rename(state_dict, flipped(native_names(config))))


def to_transformers(model: VlmClipModel) -> CLIPModel:
    """See [`hf_vlm.hub.convert.to_transformers`]."""
    config = model.config
    check_allowed(config.vision_config, ALLOWED_VISION, "vision_config.")
    check_allowed(config.text_config, ALLOWED_TEXT, "text_config.")
    check_allowed(config, ALLOWED)
    projection = {"projection_dim": config.projection_dim}
    native_config = CLIPConfig(
        vision_config=chosen(config.vision_config, VISION_FIELDS) | projection,
        text_config=chosen(config.text_config, TEXT_FIELDS) | projection,
        # CLIPModel makes a parameter of the number, and an integer parameter is refused.
        logit_scale_init_value=float(config.to_dict()["logit_scale_init_value"]),
        **projection,
    )
    state_dict = rename(model.state_dict(), native_names(config))
    return with_weights(CLIPModel(native_config), split(state_dict, QKV, "qkv_proj")).to(model.device)


def processor_from_transformers(processor: ProcessorMixin) -> VlmClipProcessor:
    """See [`hf_vlm.hub.convert.processor_from_transformers`]."""
    return VlmClipProcessor(from_clip_image_processor(processor.image_processor), processor.tokenizer)


def processor_to_transformers(processor: VlmClipProcessor) -> CLIPProcessor:
    """See [`hf_vlm.hub.convert.processor_to_transformers`]."""
    return CLIPProcessor(to_clip_image_processor(processor.image_processor), processor.tokenizer)


__all__ = [
    "from_transformers",
    "processor_from_transformers",
    "processor_to_transformers",
    "to_transformers",
]
