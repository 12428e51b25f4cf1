"""BLIP-2 and InstructBLIP between this package and transformers' classes (generation, retrieval), in both directions.

- The LLM is the same module on both sides and keeps its names. The tables translate all other names.
- transformers stores query, key and value projections of the Q-Former separately; here they are fused.
- transformers counts the LayerNorm after the image tower as part of the tower.
- transformers looks up the embedding of the image token. If its id lies past the LLM's vocabulary, embedding and output
  layer are extended up to the id. New rows are the mean of the old ones, so logits of old tokens stay equal.
- transformers' BLIP-2 with an LLM has no text branch in the Q-Former. The text branch is dropped on the way there, and
  the model converted from there has none.
- If dtypes differ, the trained modules take the Q-Former's dtype here. In transformers, LayerNorm and projection take
  the image tower's dtype.
"""

import copy
from collections.abc import Mapping

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from ...families import native_heads
from ...models.configuration_blip2 import EVA_VISION, VlmBlip2Config
from ...models.modeling_blip2 import VlmBlip2PreTrainedModel
from ...models.modeling_blip2_generation import VlmBlip2ForConditionalGeneration
from ...models.modeling_blip2_pretraining import VlmBlip2ForImageTextRetrieval
from ...models.modeling_instructblip import VlmInstructBlipForConditionalGeneration
from ...models.towers import config_without_path
from .blip import KEY_VALUE, LAYER_NAMES, QKV
from .blip import VISION_FIELDS as BLIP_VISION_FIELDS
from .blip import VISION_NAMES as BLIP_VISION_NAMES
from .blip2_processors import processor_from_transformers, processor_to_transformers
from .clip import check_allowed, chosen
from .state_dict import Names, StateDict, flipped, fuse, prefixed, rename, split, with_weights

HEADS = native_heads("vlm_blip2", "vlm_instructblip")

# Our names on the left. The original code uses the names on the right too.
QFORMER_LAYER_NAMES: Names = (
    ("query_mlp.fc1.*", "intermediate_query.dense.*"),
    ("query_mlp.fc2.*", "output_query.dense.*"),
    ("query_mlp.norm.*", "output_query.LayerNorm.*"),
    *LAYER_NAMES,
)
NATIVE_LAYER_NAMES: Names = tuple(
    (own, other.replace("attention.self.", "attention.attention.")) for own, other in QFORMER_LAYER_NAMES
)
VISION_NAMES: Names = tuple(row for row in BLIP_VISION_NAMES if row[0] != "post_norm.*")
SHARED_NAMES: Names = (
    *prefixed("model.vision_model.", "vision_model.", VISION_NAMES),
    *prefixed("model.qformer.layers.*.", "qformer.encoder.layer.*.", NATIVE_LAYER_NAMES),
    ("model.vision_norm.*", "vision_model.post_layernorm.*"),
    ("model.qformer.embeddings.query_tokens", "query_tokens"),
    ("model.language_projection.*", "language_projection.*"),
    ("model.language_model.*", "language_model.*"),
    ("similarity.vision_proj.*", "vision_projection.*"),
    ("similarity.text_proj.*", "text_projection.*"),
)


def embedding_names(norm: str, words: str) -> Names:
    """The name table of the Q-Former's embeddings; the arguments are transformers' prefixes of LayerNorm and words."""
    return (
        ("model.qformer.embeddings.norm.*", f"{norm}.*"),
        ("model.qformer.embeddings.word_embedding.*", f"{words}.word_embeddings.*"),
        ("model.qformer.embeddings.position_embedding.*", f"{words}.position_embeddings.*"),
    )


NAMES: dict[type[PreTrainedModel], Names] = {
    Blip2ForConditionalGeneration: (*SHARED_NAMES, *embedding_names("qformer.layernorm", "embeddings")),
    Blip2ForImageTextRetrieval: (*SHARED_NAMES, *embedding_names("qformer.layernorm", "embeddings")),
    InstructBlipForConditionalGeneration: (
        *SHARED_NAMES,
        *embedding_names("qformer.embeddings.layernorm", "qformer.embeddings"),
    ),
}
FROZEN = ("model.vision_model.", "model.language_model.")
POST_NORM = "model.vision_model.post_norm."  # the tower's own final norm, which BLIP-2 does not use
TEXT_BRANCH = (".mlp.", ".word_embedding.", ".position_embedding.")

VISION_FIELDS = (*BLIP_VISION_FIELDS, "qkv_bias")
QFORMER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "cross_attention_frequency",
    "initializer_range",
)
# BLIP-2 does not use the tower's final norm and pooling, so they are not checked. Dropout does not change outputs.
ALLOWED_VISION = {
    "model_type": ("vlm_tower",),
    "num_channels": (3,),
    "use_class_token": (True,),
    **{name: (EVA_VISION[name],) for name in ("use_patch_bias", "use_pre_norm")},
}


def fuse_qformer(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Our state dict with fused projections in the Q-Former only, because an LLM may have modules of the same names."""
    qformer = {name: tensor for name, tensor in state_dict.items() if name.startswith("model.qformer.")}
    rest = {name: tensor for name, tensor in state_dict.items() if name not in qformer}
    return {**rest, **fuse(fuse(qformer, QKV, "qkv"), KEY_VALUE, "key_value")}


def split_qformer(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The inverse of [`fuse_qformer`]."""
    qformer = {name: tensor for name, tensor in state_dict.items() if name.startswith("model.qformer.")}
    rest = {name: tensor for name, tensor in state_dict.items() if name not in qformer}
    return {**rest, **split(split(qformer, QKV, "qkv"), KEY_VALUE, "key_value")}


def read_config(native: PreTrainedModel) -> VlmBlip2Config:
    """The config of our head for a model of transformers.

    Raises:
        ValueError: if a model with an LLM has no image token, or the text branch is missing or not expected.
    """
    config, head = native.config, HEADS[type(native)]
    owner, is_retrieval = type(native).__name__, head is VlmBlip2ForImageTextRetrieval
    if head is not VlmInstructBlipForConditionalGeneration:
        use_text = {"use_qformer_text_input": (is_retrieval,)}
        check_allowed(config.qformer_config, use_text, "qformer_config.", head.__name__)
    qformer = chosen(config.qformer_config, QFORMER_FIELDS)
    qformer |= {
        "num_query_tokens": config.num_query_tokens,
        "memory_size": config.vision_config.hidden_size,
        "use_text": head is not VlmBlip2ForConditionalGeneration,
        "hidden_dropout": config.qformer_config.hidden_dropout_prob,
        "attention_dropout": config.qformer_config.attention_probs_dropout_prob,
        "pad_token_id": config.qformer_config.pad_token_id or 0,
        "bos_token_id": qformer["vocab_size"] - 1,  # the token that BLIP-2 adds is the last of the vocabulary
    }
    options: dict = {}
    if is_retrieval:
        options["projection_dim"] = config.image_text_hidden_size
    elif config.image_token_index is None:
        raise ValueError(f"This {owner} has no image token: set image_token_index in its config.")
    else:
        options = {
            "text_config": config_without_path(native.language_model),
            "image_token_id": config.image_token_index,
        }
    return head.config_class(
        vision_config={**EVA_VISION, **chosen(config.vision_config, VISION_FIELDS)},
        qformer_config=qformer,
        vision_norm_eps=config.vision_config.layer_norm_eps,
        **options,
    )


def check_same_llm(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """Refuses an LLM whose class differs from the class that its config builds."""
    if type(one) is not type(other):
        raise ValueError(
            f"The LLM is a {type(one).__name__}, but its config builds a {type(other).__name__}: use another LLM."
        )


def from_transformers(model: PreTrainedModel) -> VlmBlip2PreTrainedModel:
    """See [`hf_vlm.hub.convert.from_transformers`]."""
    if type(model) not in HEADS:
        names = ", ".join(native.__name__ for native in HEADS)
        raise ValueError(f"{type(model).__name__} cannot be converted; supported classes: {names}.")
    own = HEADS[type(model)](read_config(model))
    renamed = fuse_qformer(rename(model.state_dict(), flipped(NAMES[type(model)])))
    embeddings = "model.vision_model.embeddings."
    for name in (f"{embeddings}class_embedding", f"{embeddings}position_embedding.weight"):
        renamed[name] = renamed[name].reshape(own.get_parameter(name).shape)
    dtype = model.vision_model.dtype
    unread = {name: tensor.to(dtype) for name, tensor in own.state_dict().items() if name.startswith(POST_NORM)}
    if "similarity.vision_proj.weight" in renamed:
        renamed["similarity.temperature"] = own.similarity.temperature
    dtype = model.qformer.dtype
    trained = {name: tensor.to(dtype) for name, tensor in renamed.items() if not name.startswith(FROZEN)}
    if own.model.language_model is not None:
        check_same_llm(model.language_model, own.model.language_model)
    own = with_weights(own, {**renamed, **trained, **unread})
    if own.model.language_model is not None:
        own.model.language_model.generation_config = copy.deepcopy(model.language_model.generation_config)
        own.generation_config = own.model.language_model.generation_config
    return own


def native_config(config: VlmBlip2Config, native_class: type[PreTrainedModel]) -> Blip2Config | InstructBlipConfig:
    """The config of transformers' class for our config.

    Raises:
        ValueError: if an option has no equivalent in transformers; the error names the option.
    """
    vision, qformer = config.vision_config, config.qformer_config
    check_allowed(vision, ALLOWED_VISION, "vision_config.", native_class.__name__)
    check_allowed(config, {"vision_norm_eps": (vision.layer_norm_eps,)}, owner=native_class.__name__)
    fields = {
        "vision_config": chosen(vision, VISION_FIELDS),
        "qformer_config": chosen(qformer, QFORMER_FIELDS)
        | {
            "hidden_dropout_prob": qformer.hidden_dropout,
            "attention_probs_dropout_prob": qformer.attention_dropout,
            "pad_token_id": qformer.pad_token_id,
            "encoder_hidden_size": vision.hidden_size,
        },
        "num_query_tokens": qformer.num_query_tokens,
    }
    if native_class is Blip2ForImageTextRetrieval:
        fields["qformer_config"]["use_qformer_text_input"] = True
        return Blip2Config(image_text_hidden_size=config.projection_dim, **fields)
    text_config: PreTrainedConfig = config.text_config
    fields |= {"text_config": text_config.to_dict(), "image_token_index": config.image_token_id}
    return native_class.config_class(**fields)


def to_transformers(model: VlmBlip2PreTrainedModel) -> PreTrainedModel:
    """See [`hf_vlm.hub.convert.to_transformers`]."""
    natives = {head: native for native, head in HEADS.items()}
    if type(model) not in natives:
        names = ", ".join(head.__name__ for head in natives)
        raise ValueError(
            f"transformers has no class for {type(model).__name__}: load the checkpoint as one of {names} first."
        )
    native_class = natives[type(model)]
    native = native_class(native_config(model.config, native_class))
    if model.model.language_model is not None:
        check_same_llm(model.model.language_model, native.language_model)
    state_dict = split_qformer(model.state_dict())
    state_dict.pop("similarity.temperature", None)
    if native_class is Blip2ForConditionalGeneration:
        state_dict = {n: t for n, t in state_dict.items() if not (n.startswith("model.qformer.") and is_text(n))}
    kept = {name: tensor for name, tensor in state_dict.items() if not name.startswith(POST_NORM)}
    renamed = rename(kept, NAMES[native_class])
    for name in ("vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding"):
        renamed[name] = renamed[name].reshape(native.get_parameter(name).shape)
    for name in renamed:
        if name.startswith(("vision_model.post_layernorm.", "language_projection.")):
            renamed[name] = renamed[name].to(model.model.vision_model.dtype)
    native = with_weights(native, renamed)
    if model.model.language_model is not None:
        native.language_model.generation_config = copy.deepcopy(model.generation_config)
        native.generation_config = copy.deepcopy(model.generation_config)
        add_rows(native, native.config.image_token_index)
    return native.to(model.device)


def is_text(name: str) -> bool:
    """Whether a tensor of the Q-Former belongs to its text branch."""
    return any(part in name for part in TEXT_BRANCH)


@torch.no_grad()
def add_rows(native: PreTrainedModel, token_id: int) -> None:
    """Extends the LLM's vocabulary up to a token id; each new row is the mean of the existing rows."""
    llm = native.language_model
    count = llm.get_input_embeddings().num_embeddings
    if token_id < count:
        return
    llm.resize_token_embeddings(token_id + 1, mean_resizing=False)
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        for parameter in layer.parameters(recurse=False):
            parameter[count:] = parameter[:count].float().mean(dim=0).to(parameter.dtype)
    native.config.text_config.vocab_size = token_id + 1


__all__ = [
    "QFORMER_LAYER_NAMES",
    "from_transformers",
    "fuse_qformer",
    "processor_from_transformers",
    "processor_to_transformers",
    "to_transformers",
]
