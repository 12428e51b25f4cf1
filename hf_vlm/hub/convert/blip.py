"""BLIP between this package and transformers' classes (captions, question answering, retrieval), in both directions.

- transformers stores query, key and value projections of the text separately; here they are fused.
- transformers' class token and position embeddings have extra leading dimensions.
- The tables translate all other names. The names of the text part are also those of the original code.
"""

from collections.abc import Mapping

import torch
from transformers import (
    BlipConfig,
    BlipProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from ...families import native_heads
from ...models.configuration_blip import VlmBlipConfig
from ...models.configuration_tower import BLIP_VISION
from ...models.image_processing_vlm import VlmImageProcessor
from ...models.modeling_blip import VlmBlipHead
from ...models.processing_blip import VlmBlipProcessor
from .clip import check_allowed, chosen
from .images import SHARED_FIELDS
from .state_dict import Names, StateDict, flipped, fuse, prefixed, rename, split, with_weights

HEADS = native_heads("vlm_blip")

# Our names on the left; `q`, `k`, `v` are split from `qkv`, and `memory_k`, `memory_v` from `key_value`.
QKV, KEY_VALUE = ("q", "k", "v"), ("memory_k", "memory_v")
LAYER_NAMES: Names = (
    ("self_attention.q.*", "attention.self.query.*"),
    ("self_attention.k.*", "attention.self.key.*"),
    ("self_attention.v.*", "attention.self.value.*"),
    ("self_attention.proj.*", "attention.output.dense.*"),
    ("self_attention.norm.*", "attention.output.LayerNorm.*"),
    ("cross_attention.query.*", "crossattention.self.query.*"),
    ("cross_attention.memory_k.*", "crossattention.self.key.*"),
    ("cross_attention.memory_v.*", "crossattention.self.value.*"),
    ("cross_attention.proj.*", "crossattention.output.dense.*"),
    ("cross_attention.norm.*", "crossattention.output.LayerNorm.*"),
    ("mlp.fc1.*", "intermediate.dense.*"),
    ("mlp.fc2.*", "output.dense.*"),
    ("mlp.norm.*", "output.LayerNorm.*"),
)
TEXT_NAMES: Names = (
    ("embeddings.word_embedding.*", "embeddings.word_embeddings.*"),
    ("embeddings.position_embedding.*", "embeddings.position_embeddings.*"),
    ("embeddings.norm.*", "embeddings.LayerNorm.*"),
    *prefixed("layers.*.", "encoder.layer.*.", LAYER_NAMES),
)
# The original code uses these names too.
SHARED_NAMES: Names = (
    *prefixed("model.text_encoder.", "text_encoder.", TEXT_NAMES),
    *prefixed("model.text_decoder.", "text_decoder.bert.", TEXT_NAMES),
    ("lm_head.dense.*", "text_decoder.cls.predictions.transform.dense.*"),
    ("lm_head.norm.*", "text_decoder.cls.predictions.transform.LayerNorm.*"),
    ("lm_head.decoder.*", "text_decoder.cls.predictions.decoder.*"),
    ("similarity.vision_proj.*", "vision_proj.*"),
    ("similarity.text_proj.*", "text_proj.*"),
)
VISION_NAMES: Names = (
    ("layers.*.norm1.*", "encoder.layers.*.layer_norm1.*"),
    ("layers.*.norm2.*", "encoder.layers.*.layer_norm2.*"),
    ("layers.*.attn.qkv.*", "encoder.layers.*.self_attn.qkv.*"),
    ("layers.*.attn.proj.*", "encoder.layers.*.self_attn.projection.*"),
    ("layers.*.mlp.*", "encoder.layers.*.mlp.*"),
    ("post_norm.*", "post_layernorm.*"),
    ("embeddings.position_embedding.weight", "embeddings.position_embedding"),
    ("embeddings.*", "embeddings.*"),
)
NAMES: Names = (*prefixed("model.vision_model.", "vision_model.", VISION_NAMES), *SHARED_NAMES)
# Duplicates of other tensors, and buffers.
REDUNDANT = ("cls.predictions.bias", "position_ids", "logit_scale")

VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "initializer_range",
    "bos_token_id",
    "pad_token_id",
    "sep_token_id",
)
ALLOWED = {"vision_pooling": ("class",)}
ALLOWED_VISION = {
    "model_type": ("vlm_tower",),
    "qkv_bias": (True,),
    "use_class_token": (True,),
    "pooling": ("class",),
    **{name: (BLIP_VISION[name],) for name in ("use_patch_bias", "use_pre_norm", "final_norm")},
}


def split_text(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Our state dict with the fused projections of the text split."""
    vision = {name: tensor for name, tensor in state_dict.items() if name.startswith("model.vision_model.")}
    text = {name: tensor for name, tensor in state_dict.items() if name not in vision}
    return {**vision, **split(split(text, QKV, "qkv"), KEY_VALUE, "key_value")}


def fuse_text(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The inverse of [`split_text`]."""
    return fuse(fuse(state_dict, QKV, "qkv"), KEY_VALUE, "key_value")


def read_config(native: BlipConfig, head: type[VlmBlipHead]) -> VlmBlipConfig:
    """The config of our head for a config of transformers."""
    text = chosen(native.text_config, TEXT_FIELDS)
    text["hidden_dropout"] = native.text_config.hidden_dropout_prob
    text["attention_dropout"] = native.text_config.attention_probs_dropout_prob
    # The two tokens that BLIP adds are the last of the vocabulary.
    text["enc_token_id"] = text["vocab_size"] - 1
    return VlmBlipConfig(
        vision_config={**BLIP_VISION, **chosen(native.vision_config, VISION_FIELDS)},
        text_config=text,
        projection_dim=native.image_text_hidden_size,
        label_smoothing=native.text_config.label_smoothing,
        **{
            "share_encoder_decoder": False,
            "tie_word_embeddings": native.text_config.tie_word_embeddings,
            **head.layout,
        },
    )


def from_transformers(model: PreTrainedModel) -> VlmBlipHead:
    """See [`hf_vlm.hub.convert.from_transformers`]."""
    if type(model) not in HEADS:
        names = ", ".join(native.__name__ for native in HEADS)
        raise ValueError(f"{type(model).__name__} cannot be converted; supported classes: {names}.")
    head = HEADS[type(model)]
    own = head(read_config(model.config, head))
    state_dict = {name: t for name, t in model.state_dict().items() if not name.endswith(REDUNDANT)}
    renamed = fuse_text(rename(state_dict, flipped(NAMES)))
    for name in ("class_embedding", "position_embedding.weight"):
        name = f"model.vision_model.embeddings.{name}"
        renamed[name] = renamed[name].reshape(own.get_parameter(name).shape)
    if "similarity.vision_proj.weight" in renamed:
        renamed["similarity.temperature"] = own.similarity.temperature
    return with_weights(own, renamed)


def to_transformers(model: VlmBlipHead) -> PreTrainedModel:
    """See [`hf_vlm.hub.convert.to_transformers`]."""
    natives = {head: native for native, head in HEADS.items()}
    if type(model) not in natives:
        names = ", ".join(head.__name__ for head in natives)
        raise ValueError(
            f"transformers has no class for {type(model).__name__}: load the checkpoint as one of {names} first."
        )
    if any(getattr(model.config, name) != value for name, value in model.layout.items()):
        model = type(model).from_pretraining(model)  # drops parts that came with another head's checkpoint
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    check_allowed(vision, ALLOWED_VISION, "vision_config.", "transformers' BLIP")
    check_allowed(config, ALLOWED, owner="transformers' BLIP")
    if config.decoder_memory == "question" and vision.hidden_size != text.hidden_size:
        raise ValueError(
            "BlipForQuestionAnswering requires the same hidden_size for image tower and text, but this model has "
            f"{vision.hidden_size} and {text.hidden_size}."
        )
    state_dict = split_text(model.state_dict())
    state_dict.pop("similarity.temperature", None)
    native = natives[type(model)](native_config(config))
    renamed = rename(state_dict, NAMES)
    if "text_decoder.cls.predictions.decoder.bias" in renamed:
        renamed["text_decoder.cls.predictions.bias"] = renamed["text_decoder.cls.predictions.decoder.bias"]
    for name in ("class_embedding", "position_embedding"):
        name = f"vision_model.embeddings.{name}"
        renamed[name] = renamed[name].reshape(native.get_parameter(name).shape)
    if "logit_scale" in native.state_dict():
        renamed["logit_scale"] = native.logit_scale
    return with_weights(native, renamed).to(model.device)


def native_config(config: VlmBlipConfig) -> BlipConfig:
    """The config of transformers' class for our config."""
    text = chosen(config.text_config, TEXT_FIELDS)
    text["hidden_dropout_prob"] = config.text_config.hidden_dropout
    text["attention_probs_dropout_prob"] = config.text_config.attention_dropout
    text["encoder_hidden_size"] = config.vision_config.hidden_size
    text["eos_token_id"] = config.text_config.sep_token_id
    return BlipConfig(
        text_config={
            **text,
            "label_smoothing": config.label_smoothing,
            "tie_word_embeddings": config.tie_word_embeddings,
        },
        vision_config=chosen(config.vision_config, VISION_FIELDS),
        image_text_hidden_size=config.projection_dim,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def processor_from_transformers(processor: ProcessorMixin) -> VlmBlipProcessor:
    """See [`hf_vlm.hub.convert.processor_from_transformers`]."""
    values = processor.image_processor.to_dict()
    options = {name: values[name] for name in SHARED_FIELDS}
    image_processor = VlmImageProcessor(size=dict(values["size"]), resize_mode="squash", **options)
    return VlmBlipProcessor(image_processor, processor.tokenizer)


def processor_to_transformers(processor: VlmBlipProcessor) -> BlipProcessor:
    """See [`hf_vlm.hub.convert.processor_to_transformers`]."""
    values = processor.image_processor.to_dict()
    if values["resize_mode"] != "squash":
        raise ValueError(
            f"BlipImageProcessor does not support resize_mode={values['resize_mode']!r}; it requires 'squash'."
        )
    options = {name: values[name] for name in SHARED_FIELDS}
    return BlipProcessor(BlipImageProcessorPil(size=dict(values["size"]), **options), processor.tokenizer)


__all__ = [
    "REDUNDANT",
    "SHARED_NAMES",
    "from_transformers",
    "fuse_text",
    "processor_from_transformers",
    "processor_to_transformers",
    "to_transformers",
]
