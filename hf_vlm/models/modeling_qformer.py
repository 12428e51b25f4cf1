"""The Q-Former: a BERT in which learned queries attend to an image and to the text (arXiv 2301.12597, section 3.1).

- Queries and text share self-attention and have separate feed-forward layers. Only the queries attend to the image, in
  every second layer.
- Four passes: queries alone (for the contrastive loss, and for an LLM), text alone, queries and text together
  (matching, or an instruction), and text generated after the queries, reusing their keys and values.
- Keys and values of an image are computed once for all passes (see `modeling_fusion.py`).
- With `keep`, the last layer computes only the first tokens, such as the queries.

Shapes: B rows, Q queries, L tokens, H hidden size, A heads, D = H / A, I images (memories), S positions of a memory.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_qformer import VlmQFormerConfig
from .freezing import freeze
from .modeling_fusion import LayerKeyValues, VlmFusionCrossAttention, VlmFusionMLP, VlmFusionSelfAttention
from .recording import is_recording

# Keys and values of every layer; None for layers without cross-attention.
QFormerKeyValues = tuple[LayerKeyValues | None, ...]
# The queries' own keys and values of every layer, `(B, A, Q, D)` each.
QueryStates = tuple[LayerKeyValues, ...]


@dataclass
class VlmQFormerOutput(ModelOutput):
    """Output of [`VlmQFormerModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, tokens, H)`): Queries, then text.
        query_states: Keys and values of every layer's self-attention, `(B, A, tokens, D)` each. Those of a pass of
            queries alone are the `prefix` of a text.
    """

    last_hidden_state: torch.Tensor | None = None
    query_states: QueryStates | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class VlmQFormerEmbeddings(nn.Module):
    """The queries, and with a text branch the word and position embeddings."""

    def __init__(self, config: VlmQFormerConfig):
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        if config.use_text:
            self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Word and position embeddings `(B, L, H)`, before the norm."""
        length, longest = input_ids.shape[1], self.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"Texts of {length} tokens do not fit {longest} positions: tokenize with truncation=True.")
        positions = self.position_embedding(torch.arange(length, device=input_ids.device))
        return self.word_embedding(input_ids) + positions

    def forward(self, num_rows: int, input_ids: torch.Tensor | None, with_queries: bool) -> torch.Tensor:
        """Embeddings of the queries, the text, or the queries followed by the text."""
        parts = [self.query_tokens.expand(num_rows, -1, -1)] if with_queries else []
        if input_ids is not None:
            parts.append(self.words(input_ids))
        return self.dropout(self.norm(torch.cat(parts, dim=1)))


class VlmQFormerLayer(GradientCheckpointingLayer):
    """Self-attention over all tokens; cross-attention and a feed-forward layer for queries, another for text."""

    def __init__(self, config: VlmQFormerConfig, layer_index: int):
        super().__init__()
        self.self_attention = VlmFusionSelfAttention(config, layer_index)
        looks = layer_index % config.cross_attention_frequency == 0
        self.cross_attention = VlmFusionCrossAttention(config, config.memory_size) if looks else None
        self.query_mlp = VlmFusionMLP(config)
        self.mlp = VlmFusionMLP(config) if config.use_text else None

    def require_cross_attention(self) -> VlmFusionCrossAttention:
        """The queries' cross-attention.

        Raises:
            ValueError: if this is a layer without one.
        """
        if self.cross_attention is None:
            raise ValueError("This Q-Former layer has no cross-attention: see cross_attention_frequency.")
        return self.cross_attention

    def require_text_mlp(self) -> VlmFusionMLP:
        """The text's feed-forward layer.

        Raises:
            ValueError: if the Q-Former has no text branch.
        """
        if self.mlp is None:
            raise ValueError("This Q-Former has no text branch: use a checkpoint with use_text=True.")
        return self.mlp

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_queries: int,
        attention_mask: torch.Tensor | None = None,
        memory_key: torch.Tensor | None = None,
        memory_value: torch.Tensor | None = None,
        memory_index: torch.Tensor | None = None,
        prefix_key: torch.Tensor | None = None,
        prefix_value: torch.Tensor | None = None,
        keep: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, num_queries + L, H)`): Queries, then text.
            num_queries: Number of queries among the tokens; 0 for text alone.
            attention_mask (`torch.BoolTensor` of shape `(B or 1, 1, tokens, positions)`): False at hidden positions.
            memory_key (`torch.Tensor` of shape `(I, A, S, D)`): Keys of the images; None skips cross-attention.
            memory_value: The values.
            memory_index (`torch.LongTensor` of shape `(B,)`): See [`VlmFusionLayer`].
            prefix_key (`torch.Tensor` of shape `(B, A, Q, D)`): Keys of the queries that precede a text.
            prefix_value: The values.
            keep: Compute only the first n tokens.

        Returns:
            The states, and the keys and values of this layer's self-attention.
        """
        hidden_states, _, (key, value) = self.self_attention(
            hidden_states, attention_mask, False, keep, None, prefix_key, prefix_value, **kwargs
        )
        queries, text = hidden_states[:, :num_queries], hidden_states[:, num_queries:]
        parts = []
        if num_queries > 0:
            if memory_key is not None:
                cross_attention = self.require_cross_attention()
                queries, _ = cross_attention(queries, memory_key, memory_value, memory_index, None, **kwargs)
            parts.append(self.query_mlp(queries))
        if text.shape[1] > 0:
            parts.append(self.require_text_mlp()(text))
        return torch.cat(parts, dim=1), key, value


class VlmQFormerModel(PreTrainedModel):
    """The Q-Former; see the top of this file for its four passes."""

    config: VlmQFormerConfig
    base_model_prefix = "qformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VlmQFormerLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(VlmQFormerLayer, index=0),
        "attentions": OutputRecorder(VlmFusionSelfAttention, index=1),
        "cross_attentions": OutputRecorder(VlmFusionCrossAttention, index=1),
    }

    def __init__(self, config: VlmQFormerConfig):
        super().__init__(config)
        self.embeddings = VlmQFormerEmbeddings(config)
        self.layers = nn.ModuleList(VlmQFormerLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VlmQFormerEmbeddings):
            init.normal_(module.query_tokens, std=module.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings.

        Raises:
            NotImplementedError: if the Q-Former has no text branch, as transformers expects it of models without text.
        """
        if not self.config.use_text:
            raise NotImplementedError("This Q-Former has no word embeddings: use a checkpoint with use_text=True.")
        return self.embeddings.word_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embedding = value

    def project_memory(self, states: torch.Tensor) -> QFormerKeyValues:
        """Projects image states `(I, S, memory_size)` to every layer's keys and values; call it once per image."""
        crosses = (cast(VlmQFormerLayer, layer).cross_attention for layer in self.layers)
        return tuple(None if cross is None else cross.project(states) for cross in crosses)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        memory: QFormerKeyValues | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        memory_index: torch.Tensor | None = None,
        num_rows: int | None = None,
        prefix: QueryStates | None = None,
        keep: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmQFormerOutput:
        """Runs queries alone (`memory`), text alone (`input_ids`), both, or text after queries (`prefix`).

        Args:
            memory: Keys and values of the images from [`project_memory`]; None runs without queries.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Token ids; the caller sets the first token.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding of the text.
            memory_index (`torch.LongTensor` of shape `(B,)`): The image of each row; see [`VlmFusionLayer`].
            num_rows: B, for queries alone; by default the number of texts or images.
            prefix: `query_states` of a pass of queries alone. The text attends to them and to its own earlier tokens.
            keep: Return only the first n tokens; the last layer computes no others, unless hidden states or attentions
                are recorded.

        Returns:
            [`VlmQFormerOutput`]: `last_hidden_state` of shape `(B, tokens, H)`, queries first, and `query_states`.
        """
        num_queries = 0 if memory is None else self.config.num_query_tokens
        if num_rows is None and input_ids is not None:
            num_rows = len(input_ids)
        elif num_rows is None:
            num_rows = next((len(layer_memory[0]) for layer_memory in memory or () if layer_memory is not None), None)
            if num_rows is None:
                raise ValueError("The Q-Former got neither texts nor images: pass input_ids, memory or num_rows.")
        hidden_states = self.embeddings(num_rows, input_ids, num_queries > 0)
        mask = self._mask(hidden_states, num_queries, attention_mask, prefix)
        states = []
        records = is_recording(self.config, kwargs)
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            layer_memory = None if memory is None else memory[i]
            memory_key, memory_value = layer_memory or (None, None)
            prefix_key, prefix_value = (None, None) if prefix is None else prefix[i]
            hidden_states, key, value = layer(
                hidden_states,
                num_queries,
                mask,
                memory_key,
                memory_value,
                memory_index,
                prefix_key,
                prefix_value,
                keep if is_last and not records else None,
                **kwargs,
            )
            states.append((key, value))
        return VlmQFormerOutput(last_hidden_state=hidden_states[:, :keep], query_states=tuple(states))

    def _mask(
        self,
        hidden_states: torch.Tensor,
        num_queries: int,
        attention_mask: torch.Tensor | None,
        prefix: QueryStates | None,
    ) -> torch.Tensor | None:
        """The attention mask, True where attention is allowed: it hides padding, and after a prefix later tokens."""
        num_tokens, device = hidden_states.shape[1], hidden_states.device
        if prefix is None:
            if attention_mask is None or bool(attention_mask.all()):
                return None
            seen = nn.functional.pad(attention_mask.bool(), (num_queries, 0), value=True)
            return seen[:, None, None]
        num_seen = prefix[0][0].shape[2]
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()[None, None]
        if attention_mask is not None:
            causal = causal & attention_mask.bool()[:, None, None]
        return nn.functional.pad(causal, (num_seen, 0), value=True)

    def freeze_text(self, all_layers: bool) -> None:
        """Freezes the text branch, or only its last feed-forward layer, which the queries do not depend on.

        DDP raises (or hangs) when a trainable parameter gets no gradient.

        Args:
            all_layers: Freeze the whole text branch; False where the queries attend to texts (InstructBLIP).
        """
        if not self.config.use_text:
            return
        layers = self.layers if all_layers else self.layers[-1:]
        unused: list[nn.Module] = [cast(VlmQFormerLayer, layer).require_text_mlp() for layer in layers]
        if all_layers:
            unused += [self.embeddings.word_embedding, self.embeddings.position_embedding]
        freeze(*unused)


__all__ = ["QFormerKeyValues", "QueryStates", "VlmQFormerModel", "VlmQFormerOutput"]
