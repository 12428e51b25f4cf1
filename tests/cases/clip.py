"""Cases of CLIP and of the towers, ours and foreign ones."""

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from cases import tiny
from hf_vlm import (
    VlmClipModel,
    VlmTextTowerModel,
    VlmTowerModel,
)

from .case import Case, Inputs

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


TEXT_SIZES = {**tiny.layer_sizes(width=24, heads=2), "vocab_size": len(tiny.VOCABULARY)}


VISION_SIZES = tiny.layer_sizes(image_size=tiny.IMAGE_SIZE, patch_size=8)


def pooled_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The distance of the pooled outputs from arbitrary ones, for towers, which have no loss of their own."""
    pooled = model(**inputs).pooler_output
    return (pooled - torch.arange(pooled.numel()).view_as(pooled).sin()).square().mean()


def own_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**inputs, return_loss=True).loss


def tower_case(layout: str, tokens: int) -> Case:
    shapes = {"last_hidden_state": (5, tokens, 32), "pooler_output": (5, 32)}
    return Case(
        lambda: VlmTowerModel(tiny.tower_config(layout)),
        lambda: {"pixel_values": tiny.pixels()},
        pooled_loss,
        shapes,
        overfits=True,
    )


def clip_case(build: Callable[[], PreTrainedModel]) -> Case:
    shapes = dict.fromkeys(("logits_per_image", "logits_per_text"), (5, 5))
    shapes |= dict.fromkeys(("text_embeds", "image_embeds"), (5, 16))
    return Case(build, tiny.clip_inputs, own_loss, shapes, overfits=True)


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**VISION_SIZES))


def dinov2() -> Dinov2Model:
    return Dinov2Model(Dinov2Config(**VISION_SIZES, mlp_ratio=2))


def vit() -> ViTModel:
    return ViTModel(ViTConfig(**VISION_SIZES, **NO_DROPOUT))


def bert() -> BertModel:
    return BertModel(BertConfig(**TEXT_SIZES, **NO_DROPOUT))


def roberta() -> RobertaModel:
    return RobertaModel(RobertaConfig(**TEXT_SIZES, **NO_DROPOUT, pad_token_id=tiny.PAD))


def distilbert() -> DistilBertModel:
    sizes = {"dim": 24, "hidden_dim": 48, "n_heads": 2, "n_layers": 2, "vocab_size": len(tiny.VOCABULARY)}
    return DistilBertModel(DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0))


def clip_text() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**TEXT_SIZES, eos_token_id=tiny.END))


def whole_clip() -> CLIPModel:
    return CLIPModel(tiny.native_clip_config())


def our_vision() -> VlmTowerModel:
    return VlmTowerModel(tiny.tower_config())


def our_text() -> VlmTextTowerModel:
    return VlmTextTowerModel(tiny.text_config())


PARTS = {
    "siglip + bert": (siglip, bert),
    "dinov2 + clip text": (dinov2, clip_text),
    "vit + roberta": (vit, roberta),
    "whole clip + distilbert": (whole_clip, distilbert),
    "our tower + whole clip": (our_vision, whole_clip),
    "siglip + our text tower": (siglip, our_text),
}


def from_parts(vision: Callable[[], PreTrainedModel], text: Callable[[], PreTrainedModel], **options) -> VlmClipModel:
    return VlmClipModel.from_parts(vision=vision(), text=text(), projection_dim=16, **options)


CASES = {
    "tower, clip layout": tower_case("clip", 17),
    "tower, blip layout": tower_case("blip", 17),
    "tower, eva layout": tower_case("eva", 17),
    "tower, mean of patches": tower_case("mean", 16),
    "text tower": Case(
        our_text, tiny.tokens, pooled_loss, {"last_hidden_state": (5, 11, 24), "pooler_output": (5, 24)}, overfits=True
    ),
    "clip": clip_case(lambda: VlmClipModel(tiny.clip_config())),
    "clip, sigmoid loss": clip_case(lambda: VlmClipModel(tiny.clip_config(loss_type="sigmoid"))),
    "clip, means of tokens": clip_case(
        lambda: VlmClipModel(tiny.clip_config(vision_pooling="mean", text_pooling="mean"))
    ),
    **{f"clip, {name}": clip_case(lambda parts=parts: from_parts(*parts)) for name, parts in PARTS.items()},
}
