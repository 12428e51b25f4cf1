"""Initialisation from a BERT: config, weights, language-modelling head, first token.

BLIP's text transformers and the Q-Former have BERT's shape and start from its weights.

Shapes: B rows, L tokens, H hidden size.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_blip import VlmBlipTextConfig


class VlmBlipLMHead(nn.Module):
    """Vocabulary logits of decoder states: BERT's transform, then a linear layer that may be the word embedding."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.act(self.dense(hidden_states))))


def require_input_ids(input_ids: torch.Tensor | None) -> torch.Tensor:
    """The token ids, checked to be there.

    Raises:
        ValueError: if they are missing.
    """
    if input_ids is None:
        raise ValueError("Pass the texts as input_ids.")
    return input_ids


def with_first_token(input_ids: torch.Tensor | None, token_id: int) -> torch.Tensor:
    """Copies token ids `(B, L)` and replaces the first token, `[CLS]`, by `[ENC]` or `[DEC]`."""
    input_ids = require_input_ids(input_ids).clone()
    input_ids[:, 0] = token_id
    return input_ids


# The names of a layer's modules: ours, then BERT's.
BERT_NAMES = (
    ("self_attention.proj", "attention.output.dense"),
    ("self_attention.norm", "attention.output.LayerNorm"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("mlp.norm", "output.LayerNorm"),
)


def bert_text_config(bert: PreTrainedConfig, dropout: float | None = None) -> VlmBlipTextConfig:
    """The config of a text transformer that is initialised from a BERT.

    Args:
        bert: The BERT's config. `[DEC]` and `[ENC]` are added after its vocabulary.
        dropout: All dropout probabilities; None keeps the BERT's.

    Raises:
        ValueError: if `bert` is the config of another architecture.
    """
    if bert.model_type != "bert":
        raise ValueError(f"BLIP's text transformers start from a BERT, not a {bert.model_type}: choose another text.")
    shared = "hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act"
    return VlmBlipTextConfig(
        **{name: bert.to_dict()[name] for name in shared.split()},
        layer_norm_eps=bert.layer_norm_eps,
        hidden_dropout=bert.hidden_dropout_prob if dropout is None else dropout,
        attention_dropout=bert.attention_probs_dropout_prob if dropout is None else dropout,
        vocab_size=bert.vocab_size + 2,
        bos_token_id=bert.vocab_size,
        enc_token_id=bert.vocab_size + 1,
        pad_token_id=bert.pad_token_id,
    )


@torch.no_grad()
def copy_bert_embeddings(model: PreTrainedModel, bert: PreTrainedModel) -> None:
    """Copies word and position embeddings and their LayerNorm.

    Our models have no token types, so BERT's embedding of the first type is added to every position.
    """
    ours, theirs = model.embeddings, bert.embeddings
    ours.word_embedding.weight[: bert.config.vocab_size] = theirs.word_embeddings.weight
    ours.position_embedding.weight.copy_(theirs.position_embeddings.weight + theirs.token_type_embeddings.weight[0])
    ours.norm.load_state_dict(theirs.LayerNorm.state_dict())


@torch.no_grad()
def copy_bert_layer(own: GradientCheckpointingLayer, its: GradientCheckpointingLayer, with_mlp: bool = True) -> None:
    """Copies one layer's self-attention and, with `with_mlp`, its feed-forward layer."""
    qkv = [its.attention.self.query, its.attention.self.key, its.attention.self.value]
    own.self_attention.qkv.weight.copy_(torch.cat([part.weight for part in qkv]))
    own.self_attention.qkv.bias.copy_(torch.cat([part.bias for part in qkv]))
    for name, bert_name in BERT_NAMES:
        if with_mlp or name.startswith("self_attention"):
            own.get_submodule(name).load_state_dict(its.get_submodule(bert_name).state_dict())


def copy_bert(text_model: PreTrainedModel, bert: PreTrainedModel) -> None:
    """Copies a BERT's weights into a BLIP text model, which then computes the same function for text alone.

    Cross-attention and the two added tokens keep their new weights.
    """
    if text_model.owner is text_model:
        copy_bert_embeddings(text_model, bert)
    for own, its in zip(text_model.layers, bert.encoder.layer, strict=True):
        copy_bert_layer(own, its, with_mlp=own.owner is own)


def bert_qformer_config(bert: PreTrainedConfig, memory_size: int, dropout: float | None = None, **fields) -> dict:
    """Config fields of a Q-Former that is initialised from a BERT (arXiv 2301.12597, section 3.1).

    Args:
        bert: The BERT's config. `[DEC]` is added after its vocabulary.
        memory_size: Width of the image states that the queries attend to.
        dropout: All dropout probabilities; None keeps the BERT's.
        **fields: Further fields of [`VlmQFormerConfig`].

    Raises:
        ValueError: if `bert` is the config of another architecture.
    """
    shared = bert_text_config(bert, dropout).to_dict()
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act"
    names += " layer_norm_eps hidden_dropout attention_dropout bos_token_id pad_token_id"
    sizes = {"vocab_size": bert.vocab_size + 1, "memory_size": memory_size}
    return {**{name: shared[name] for name in names.split()}, **sizes, **fields}


def copy_bert_to_qformer(qformer: PreTrainedModel, bert: PreTrainedModel) -> None:
    """Copies a BERT's weights into a Q-Former, with its feed-forward layers for both queries and text.

    Queries and cross-attention keep their new weights.
    """
    copy_bert_embeddings(qformer, bert)
    for own, its in zip(qformer.layers, bert.encoder.layer, strict=True):
        copy_bert_layer(own, its)
        own.query_mlp.load_state_dict(own.mlp.state_dict())


__all__ = [
    "VlmBlipLMHead",
    "bert_qformer_config",
    "bert_text_config",
    "copy_bert",
    "copy_bert_embeddings",
    "copy_bert_layer",
    "copy_bert_to_qformer",
    "require_input_ids",
    "with_first_token",
]
