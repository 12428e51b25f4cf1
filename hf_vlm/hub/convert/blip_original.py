"""BLIP from the layout of the original code and of LAVIS: captions, question answering, retrieval, pretraining.

- The tensor names tell which head the checkpoint has.
- Without a config, the sizes are read from the tensor shapes. Attention heads are 64 wide, as in every published BLIP.
- Momentum encoders and queue are loaded if the checkpoint has them.
"""

from collections.abc import Mapping
from math import isqrt

import torch

from ...checkpoints import check_keys
from ...models.configuration_blip import VlmBlipConfig
from ...models.configuration_tower import BLIP_VISION
from ...models.modeling_blip import VlmBlipForImageTextRetrieval, VlmBlipForPreTraining, VlmBlipHead
from ...models.modeling_blip_generation import VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering
from .blip import REDUNDANT, SHARED_NAMES, fuse_text
from .state_dict import Names, StateDict, check_state_dict, flipped, prefixed, rename, with_weights

# Our names on the left.
VISION_NAMES: Names = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.patch_embedding.*", "patch_embed.proj.*"),
    ("layers.*", "blocks.*"),
    ("post_norm.*", "norm.*"),
)
NAMES: Names = (
    *prefixed("model.vision_model.", "visual_encoder.", VISION_NAMES),
    *SHARED_NAMES,
    ("similarity.temperature", "temp"),
)
QUEUE = ("image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue")
SIZES_FROM = (
    "visual_encoder.patch_embed.proj.weight",
    "visual_encoder.pos_embed",
    "visual_encoder.blocks.0.mlp.fc1.weight",
)
HEAD_WIDTH = 64
OUTPUT = "text_decoder.cls.predictions.decoder.weight"
TWIN = "encoder.layer.0.output.dense.weight"  # equal in encoder and decoder if the two share weights


def is_blip(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensor names belong to a BLIP in this layout."""
    has_text = any(name.startswith(("text_encoder.", "text_decoder.bert.")) for name in state_dict)
    return "visual_encoder.cls_token" in state_dict and has_text


def head_of(state_dict: Mapping[str, torch.Tensor]) -> type[VlmBlipHead]:
    """Our head class for a checkpoint with these tensors."""
    has_decoder = any(name.startswith("text_decoder.") for name in state_dict)
    if "itm_head.weight" in state_dict:
        return VlmBlipForPreTraining if has_decoder else VlmBlipForImageTextRetrieval
    has_encoder = any(name.startswith("text_encoder.") for name in state_dict)
    return VlmBlipForQuestionAnswering if has_encoder else VlmBlipForConditionalGeneration


def from_original(
    state_dict: Mapping[str, torch.Tensor], config: VlmBlipConfig | None, image_size: int | None
) -> VlmBlipHead:
    """See [`hf_vlm.hub.convert.from_original`]."""
    head = head_of(state_dict)
    is_average = {name: "_m." in name for name in state_dict}
    weights = {n: t for n, t in state_dict.items() if not is_average[n] and not n.endswith((*REDUNDANT, *QUEUE))}
    renamed = reshaped(fuse_text(rename(weights, flipped(NAMES))))
    config = config or read_config(state_dict, head)
    model = head(config)
    if model.model.shares_parts:
        renamed = without_twins(renamed)
    check_state_dict("this BLIP checkpoint", renamed, model.state_dict())
    model = with_weights(model, renamed).float()
    if isinstance(model, VlmBlipForPreTraining) and "image_queue" in state_dict:
        load_momentum(model, {n: t for n, t in state_dict.items() if is_average[n] or n in QUEUE})
    if image_size is not None:
        model = head.from_pretraining(model, image_size=image_size).eval()
    return model


def reshaped(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The state dict with class token, position embeddings and temperature in our shapes."""
    shapes = {"class_embedding": (-1,), "position_embedding.weight": (-1, None), "temperature": (1,)}
    result = dict(state_dict)
    for name, tensor in state_dict.items():
        for ending, shape in shapes.items():
            if name.endswith(ending) and "text" not in name:
                result[name] = tensor.reshape([tensor.shape[-1] if side is None else side for side in shape])
    return result


def without_twins(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Our state dict without the decoder tensors that are shared with the encoder.

    Raises:
        ValueError: if a shared tensor differs between encoder and decoder.
    """
    result = {}
    for name, tensor in state_dict.items():
        twin = name.replace("model.text_decoder.", "model.text_encoder.")
        if twin == name or ".self_attention." in name:
            result[name] = tensor
        elif not torch.equal(tensor, state_dict[twin]):
            raise ValueError(
                f"Text encoder and decoder differ in {name}: pass a config with share_encoder_decoder=False."
            )
    return result


def load_momentum(model: VlmBlipForPreTraining, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Loads momentum encoders and queue from a checkpoint; the queue counts as full."""
    averages = {name.replace("_m.", ".", 1): tensor for name, tensor in state_dict.items() if "_m." in name}
    averages = {name: tensor for name, tensor in averages.items() if "crossattention" not in name}
    averages = {name: tensor for name, tensor in averages.items() if not name.endswith(REDUNDANT)}
    renamed = reshaped(fuse_text(rename(averages, flipped(NAMES))))
    renamed = {name.removeprefix("model."): tensor for name, tensor in renamed.items()}
    momentum, count = model.momentum, state_dict["image_queue"].shape[1]
    momentum.encoders.load_state_dict(renamed | {"similarity.temperature": model.similarity.temperature.detach()})
    queue = momentum.queue
    ids = torch.full((count,), -1)
    queue.add(state_dict["image_queue"].T, state_dict["text_queue"].T, state_dict.get("idx_queue", ids).flatten())
    end = next((state_dict[name] for name in ("queue_ptr", "ptr_queue") if name in state_dict), torch.zeros(1))
    queue.end.fill_(int(end))


def read_config(state_dict: Mapping[str, torch.Tensor], head: type[VlmBlipHead]) -> VlmBlipConfig:
    """The config, read from the tensor shapes.

    Raises:
        ValueError: if a tensor that determines a size is missing.
    """
    text = "text_encoder." if "text_encoder.embeddings.word_embeddings.weight" in state_dict else "text_decoder.bert."
    words = f"{text}embeddings.word_embeddings.weight"
    check_keys("this BLIP checkpoint", missing=[name for name in (*SIZES_FROM, words) if name not in state_dict])
    sizes = {}
    if "image_queue" in state_dict:
        sizes["queue_size"] = state_dict["image_queue"].shape[1]
    if "vision_proj.weight" in state_dict:
        sizes["projection_dim"] = len(state_dict["vision_proj.weight"])
    decoder = "text_decoder.bert."
    return VlmBlipConfig(
        vision_config=read_vision_config(state_dict),
        text_config=read_text_config(state_dict, text),
        **{
            "tie_word_embeddings": same(state_dict, OUTPUT, f"{decoder}embeddings.word_embeddings.weight"),
            "share_encoder_decoder": same(state_dict, f"text_encoder.{TWIN}", f"{decoder}{TWIN}"),
            **head.layout,
        },
        **sizes,
    )


def same(state_dict: Mapping[str, torch.Tensor], one: str, other: str) -> bool:
    """Whether both tensors exist and are equal."""
    return one in state_dict and other in state_dict and torch.equal(state_dict[one], state_dict[other])


def read_vision_config(state_dict: Mapping[str, torch.Tensor]) -> dict:
    """The sizes of the image tower."""
    width, num_channels, patch_size, _ = state_dict["visual_encoder.patch_embed.proj.weight"].shape
    layers = [name for name in state_dict if name.startswith("visual_encoder.blocks.") and name.endswith("qkv.weight")]
    return {
        **BLIP_VISION,
        "hidden_size": width,
        "intermediate_size": len(state_dict["visual_encoder.blocks.0.mlp.fc1.weight"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "num_channels": num_channels,
        "image_size": isqrt(state_dict["visual_encoder.pos_embed"].shape[1] - 1) * patch_size,
        "patch_size": patch_size,
    }


def read_text_config(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict:
    """The sizes of the text transformer with this name prefix."""
    vocab_size, width = state_dict[f"{prefix}embeddings.word_embeddings.weight"].shape
    layers = [name for name in state_dict if name.startswith(prefix) and name.endswith(".intermediate.dense.weight")]
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(state_dict[layers[0]]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": len(state_dict[f"{prefix}embeddings.position_embeddings.weight"]),
        "bos_token_id": vocab_size - 2,
        "enc_token_id": vocab_size - 1,
    }


__all__ = ["from_original", "is_blip"]
