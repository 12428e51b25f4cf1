"""Begin as a BERT: config, weights, language-modelling head, first token."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_blip import VlmBlipTextConfig


class VlmBlipLMHead(nn.Module):
    """Vocabulary logits of decoder states: BERT's transform, then a matrix, the word embedding where tied."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.act(self.dense(hidden_states))))


def require_input_ids(input_ids: torch.Tensor | None) -> torch.Tensor:
    """The token ids.

    Raises:
        ValueError: if they are missing.
    """
    if input_ids is None:
        raise ValueError("Pass the texts as input_ids.")
    return input_ids


def with_first_token(input_ids: torch.Tensor | None, token_id: int) -> torch.Tensor:
    """Token ids with another first token: `[ENC]` or `[DEC]` in place of `[CLS]`."""
    input_ids = require_input_ids(input_ids).clone()
    input_ids[:, 0] = token_id
    return input_ids


# Ours, and what BERT calls it, within a layer.
BERT_NAMES = (
    ("self_attention.proj", "attention.output.dense"),
    ("self_attention.norm", "attention.output.LayerNorm"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("mlp.norm", "output.LayerNorm"),
)


def bert_text_config(bert: PreTrainedConfig, dropout: float | None = None) -> VlmBlipTextConfig:
    """The config of a text transformer that begins as a BERT; `[DEC]` and `[ENC]` follow its vocabulary.

    Raises:
        ValueError: if it is the config of another architecture.
    """
    if bert.model_type != "bert":
        raise ValueError(f"BLIP's text transformers begin as a BERT, not as a {bert.model_type}: choose another text.")
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
    """Self-attention and the feed-forward layer."""
    qkv = [its.attention.self.query, its.attention.self.key, its.attention.self.value]
    own.self_attention.qkv.weight.copy_(torch.cat([part.weight for part in qkv]))
    own.self_attention.qkv.bias.copy_(torch.cat([part.bias for part in qkv]))
    for name, bert_name in BERT_NAMES:
        if with_mlp or name.startswith("self_attention"):
            own.get_submodule(name).load_state_dict(its.get_submodule(bert_name).state_dict())


def copy_bert(text_model: PreTrainedModel, bert: PreTrainedModel) -> None:
    """Copies the weights of a BERT: without an image, and but for the two new words, the same function.

    Cross-attention stays new.
    """
    if text_model.owner is text_model:
        copy_bert_embeddings(text_model, bert)
    for own, its in zip(text_model.layers, bert.encoder.layer, strict=True):
        copy_bert_layer(own, its, with_mlp=own.owner is own)


def bert_qformer_config(bert: PreTrainedConfig, memory_size: int, dropout: float | None = None, **fields) -> dict:
    """Fields of the config of a Q-Former that begins as a BERT (section 3.1); `[DEC]` follows its vocabulary.

    Raises:
        ValueError: if it is the config of another architecture.
    """
    shared = bert_text_config(bert, dropout).to_dict()
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings hidden_act"
    names += " layer_norm_eps hidden_dropout attention_dropout bos_token_id pad_token_id"
    sizes = {"vocab_size": bert.vocab_size + 1, "memory_size": memory_size}
    return {**{name: shared[name] for name in names.split()}, **sizes, **fields}


def copy_bert_to_qformer(qformer: PreTrainedModel, bert: PreTrainedModel) -> None:
    """Copies the weights of a BERT, its feed-forward layers to queries and text alike (section 3.1).

    Queries and cross-attention stay new.
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
