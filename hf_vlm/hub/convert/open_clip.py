"""CLIP from open_clip's layout, which OpenAI's release also uses.

- One table translates the names. The two projections are stored transposed.
- Without a config, the sizes are read from the tensor shapes.
- The rest follows open_clip's defaults: attention heads of width 64 (except in its three largest towers), LayerNorm
  epsilon 1e-5, the class token as pooled output, and the end-of-text token as the last token of the vocabulary.
"""

from collections.abc import Mapping
from math import isqrt

import torch

from ...checkpoints import check_keys
from ...models.configuration_clip import VlmClipConfig
from ...models.modeling_clip import VlmClipModel
from .state_dict import Names, StateDict, check_state_dict, flipped, prefixed, rename, with_weights

# Our names on the left.
LAYER_NAMES: Names = (
    ("layers.*.norm1.*", "transformer.resblocks.*.ln_1.*"),
    ("layers.*.norm2.*", "transformer.resblocks.*.ln_2.*"),
    ("layers.*.attn.qkv.weight", "transformer.resblocks.*.attn.in_proj_weight"),
    ("layers.*.attn.qkv.bias", "transformer.resblocks.*.attn.in_proj_bias"),
    ("layers.*.attn.proj.*", "transformer.resblocks.*.attn.out_proj.*"),
    ("layers.*.mlp.fc1.*", "transformer.resblocks.*.mlp.c_fc.*"),
    ("layers.*.mlp.fc2.*", "transformer.resblocks.*.mlp.c_proj.*"),
)
VISION_NAMES: Names = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.weight", "conv1.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("pre_norm.*", "ln_pre.*"),
    ("post_norm.*", "ln_post.*"),
    *LAYER_NAMES,
)
TEXT_NAMES: Names = (
    ("token_embedding.weight", "token_embedding.weight"),
    ("position_embedding.weight", "positional_embedding"),
    ("post_norm.*", "ln_final.*"),
    *LAYER_NAMES,
)
NAMES: Names = (
    *prefixed("vision_model.", "visual.", VISION_NAMES),
    *prefixed("text_model.", "", TEXT_NAMES),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    ("similarity.logit_scale", "logit_scale"),
    ("similarity.logit_bias", "logit_bias"),
)
TRANSPOSED = ("visual.proj", "text_projection")

# OpenAI's files store these sizes as tensors; they are not weights.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
# Attention head width by image tower width, where it is not 64: ViT-H, ViT-g and ViT-bigG.
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
SIZES_FROM = (
    "visual.conv1.weight",
    "visual.positional_embedding",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "visual.proj",
    "token_embedding.weight",
    "positional_embedding",
    "transformer.resblocks.0.mlp.c_fc.weight",
)


def is_open_clip(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensor names belong to a CLIP with a vision transformer in this layout."""
    return "visual.class_embedding" in state_dict


def from_original(
    state_dict: Mapping[str, torch.Tensor], config: VlmClipConfig | None, hidden_act: str | None
) -> VlmClipModel:
    """See [`hf_vlm.hub.convert.from_original`]."""
    # open_clip's "custom text" models prefix the names of the text tower with `text.`.
    original = {name.removeprefix("text."): tensor for name, tensor in state_dict.items() if name not in OPENAI_SIZES}
    if (config is None) == (hidden_act is None):
        raise ValueError(
            "The weights do not determine the activation: pass hidden_act (quick_gelu for OpenAI's weights, gelu for "
            "most others) or a config, but not both."
        )
    model = VlmClipModel(config or read_config(original, str(hidden_act)))
    check_state_dict("this open_clip checkpoint", original, transposed(rename(model.state_dict(), NAMES)))
    return with_weights(model, rename(transposed(original), flipped(NAMES))).float()


def transposed(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The state dict (in open_clip's names) with its projections transposed."""
    return {name: tensor.T if name in TRANSPOSED else tensor for name, tensor in state_dict.items()}


def read_config(state_dict: Mapping[str, torch.Tensor], hidden_act: str) -> VlmClipConfig:
    """The config, read from the tensor shapes.

    Raises:
        ValueError: if a tensor that determines a size is missing, or a width is not a multiple of the head width.
    """
    check_keys("this open_clip checkpoint", missing=[name for name in SIZES_FROM if name not in state_dict])
    shapes = {name: state_dict[name].shape for name in SIZES_FROM}
    vision_width, num_channels, patch_size, _ = shapes["visual.conv1.weight"]
    side = isqrt(shapes["visual.positional_embedding"][0] - 1)
    vocab_size, text_width = shapes["token_embedding.weight"]
    return VlmClipConfig(
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
            "num_hidden_layers": count_layers(state_dict, "visual.transformer"),
            "num_attention_heads": count_heads(vision_width, HEAD_WIDTHS.get(vision_width, 64)),
            "num_channels": num_channels,
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "hidden_act": hidden_act,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
            "num_hidden_layers": count_layers(state_dict, "transformer"),
            "num_attention_heads": count_heads(text_width, 64),
            "max_position_embeddings": shapes["positional_embedding"][0],
            "hidden_act": hidden_act,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": 0,
        },
        projection_dim=shapes["visual.proj"][1],
        loss_type="sigmoid" if "logit_bias" in state_dict else "softmax",
    )


def count_layers(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    """Number of layers of the transformer with this name prefix."""
    return sum(name.startswith(f"{prefix}.resblocks.") and name.endswith(".ln_1.weight") for name in state_dict)


def count_heads(width: int, head_width: int) -> int:
    """Number of attention heads of `head_width` in a transformer of `width`.

    Raises:
        ValueError: if `width` is not a multiple of `head_width`.
    """
    if width % head_width:
        raise ValueError(
            f"The width {width} is not a multiple of the attention head width {head_width}: pass a config."
        )
    return width // head_width


__all__ = ["from_original", "is_open_clip", "read_config"]
