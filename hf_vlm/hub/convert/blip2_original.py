"""BLIP-2's first stage from the layout of LAVIS: image tower in EVA's layout, Q-Former and heads.

- Without a config, the sizes are read from the tensor shapes. As in every published BLIP-2, the Q-Former's attention
  heads are 64 wide and EVA's image tower has 16 heads.
- EVA has no bias on the keys. Here the bias is zero, which computes the same.
"""

from collections.abc import Mapping
from math import isqrt

import torch

from ...checkpoints import check_keys
from ...models.configuration_blip2 import VlmBlip2Config
from ...models.modeling_blip2_pretraining import VlmBlip2ForPreTraining
from .blip2 import QFORMER_LAYER_NAMES, fuse_qformer
from .blip_original import VISION_NAMES
from .state_dict import Names, StateDict, check_state_dict, flipped, prefixed, rename, with_weights

# Our names on the left.
NAMES: Names = (
    *prefixed("model.vision_model.", "visual_encoder.", tuple(row for row in VISION_NAMES if row[0] != "post_norm.*")),
    ("model.vision_norm.*", "ln_vision.*"),
    ("model.qformer.embeddings.query_tokens", "query_tokens"),
    ("model.qformer.embeddings.word_embedding.*", "Qformer.bert.embeddings.word_embeddings.*"),
    ("model.qformer.embeddings.position_embedding.*", "Qformer.bert.embeddings.position_embeddings.*"),
    ("model.qformer.embeddings.norm.*", "Qformer.bert.embeddings.LayerNorm.*"),
    *prefixed("model.qformer.layers.*.", "Qformer.bert.encoder.layer.*.", QFORMER_LAYER_NAMES),
    ("lm_head.dense.*", "Qformer.cls.predictions.transform.dense.*"),
    ("lm_head.norm.*", "Qformer.cls.predictions.transform.LayerNorm.*"),
    ("lm_head.decoder.*", "Qformer.cls.predictions.decoder.*"),
    ("similarity.vision_proj.*", "vision_proj.*"),
    ("similarity.text_proj.*", "text_proj.*"),
    ("similarity.temperature", "temp"),
)
# Duplicates of other tensors, and buffers.
REDUNDANT = ("Qformer.cls.predictions.bias", "Qformer.bert.embeddings.position_ids")
PATCHES, POSITIONS = "visual_encoder.patch_embed.proj.weight", "visual_encoder.pos_embed"
FC1 = "visual_encoder.blocks.0.mlp.fc1.weight"
WORDS, TEXT_POSITIONS = (f"Qformer.bert.embeddings.{part}_embeddings.weight" for part in ("word", "position"))
QUERY_FC1 = "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"
SIZES_FROM = (PATCHES, POSITIONS, FC1, WORDS, TEXT_POSITIONS, QUERY_FC1, "query_tokens", "vision_proj.weight")
HEAD_WIDTH, EVA_HEADS = 64, 16
OWNER = "this BLIP-2 checkpoint"


def is_blip2(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensor names belong to a BLIP-2 in this layout."""
    return any(name.startswith("Qformer.bert.") for name in state_dict)


def from_original(state_dict: Mapping[str, torch.Tensor], config: VlmBlip2Config | None) -> VlmBlip2ForPreTraining:
    """See [`hf_vlm.hub.convert.from_original`].

    Raises:
        ValueError: if the image tower is missing, the checkpoint is from a later stage, or tensors do not fit.
    """
    if not any(name.startswith("visual_encoder.") for name in state_dict):
        raise ValueError("This BLIP-2 checkpoint lacks the frozen image tower: add its tensors as visual_encoder.*.")
    if "itm_head.weight" not in state_dict:
        raise ValueError(
            "This BLIP-2 checkpoint is not from the first stage (itm_head.weight is missing): download the "
            "checkpoint in transformers' layout and convert it with from_transformers."
        )
    weights = {name: tensor for name, tensor in state_dict.items() if name not in REDUNDANT}
    renamed = fuse_qformer(rename(with_key_bias(weights), flipped(NAMES)))
    for name, last in (("class_embedding", 2), ("position_embedding.weight", 1)):
        name = f"model.vision_model.embeddings.{name}"
        if name in renamed:
            renamed[name] = renamed[name].flatten(0, last)
    model = VlmBlip2ForPreTraining(config or read_config(state_dict))
    # The tower's own final norm, which BLIP-2 does not use.
    unread = {name: tensor for name, tensor in model.state_dict().items() if ".vision_model.post_norm." in name}
    check_state_dict(OWNER, {**renamed, **unread}, model.state_dict())
    return with_weights(model, {**renamed, **unread}).float()


def with_key_bias(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The state dict with `q_bias` and `v_bias` fused to `qkv.bias`; the bias of the keys is zero."""
    result = dict(state_dict)
    for name in state_dict:
        other = f"{name.removesuffix('q_bias')}v_bias"
        if name.endswith(".q_bias") and other in state_dict:
            query, value = result.pop(name), result.pop(other)
            result[f"{name.removesuffix('q_bias')}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return result


def read_config(state_dict: Mapping[str, torch.Tensor]) -> VlmBlip2Config:
    """The config, read from the tensor shapes.

    Raises:
        ValueError: if a tensor that determines a size is missing.
    """
    check_keys(OWNER, missing=[name for name in SIZES_FROM if name not in state_dict])
    width, num_channels, patch_size, _ = state_dict[PATCHES].shape
    vocab_size, hidden_size = state_dict[WORDS].shape
    blocks = {name.split(".")[2] for name in state_dict if name.startswith("visual_encoder.blocks.")}
    layers = {name.split(".")[4] for name in state_dict if name.startswith("Qformer.bert.encoder.layer.")}
    crosses = {name.split(".")[4] for name in state_dict if ".crossattention.self.query.weight" in name}
    return VlmBlip2Config(
        vision_config={
            "hidden_size": width,
            "intermediate_size": len(state_dict[FC1]),
            "num_hidden_layers": len(blocks),
            "num_attention_heads": EVA_HEADS,
            "num_channels": num_channels,
            "image_size": isqrt(state_dict[POSITIONS].shape[1] - 1) * patch_size,
            "patch_size": patch_size,
        },
        qformer_config={
            "num_query_tokens": state_dict["query_tokens"].shape[1],
            "memory_size": width,
            "cross_attention_frequency": -(-len(layers) // max(len(crosses), 1)),
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": len(state_dict[QUERY_FC1]),
            "num_hidden_layers": len(layers),
            "num_attention_heads": hidden_size // HEAD_WIDTH,
            "max_position_embeddings": len(state_dict[TEXT_POSITIONS]),
            "bos_token_id": vocab_size - 1,
        },
        projection_dim=len(state_dict["vision_proj.weight"]),
    )


__all__ = ["from_original", "is_blip2"]
