"""The fusion layer: BERT's post-LayerNorm layer with cross-attention to an image (or to a question).

Papers: BERT (arXiv 1810.04805) for the layer, BLIP (arXiv 2201.12086, section 3.1) for its cross-attention.

- The input of cross-attention is called *memory*: keys and values, projected once per image and passed as tensors. All
  passes over an image (matching, its hard negatives, language modelling, every beam) share them.
- `memory_index` gives the image of each row. Without it, image i belongs to the i-th group of consecutive rows. All
  rows of an image are then concatenated into one query sequence, so its keys and values are not repeated.
- With `keep`, a layer computes only the first tokens; their keys and values still come from every token.
- Self-attention can attend to the keys and values of earlier tokens (`prefix_key`, `prefix_value`), and returns its
  own.

Shapes: B rows, L tokens, H hidden size, A heads, D = H / A, I images (memories), S positions of a memory.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .casting import cast_for
from .modeling_tower import attention_function

# Keys and values of one layer, each (I, A, S, D); and those of all layers.
LayerKeyValues = tuple[torch.Tensor, torch.Tensor]
ImageKeyValues = tuple[LayerKeyValues, ...]


class VlmFusionSelfAttention(nn.Module):
    """Self-attention, residual and LayerNorm."""

    def __init__(self, config: PreTrainedConfig, layer_index: int):
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def _project(
        self, hidden_states: torch.Tensor, keep: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of the first `keep` tokens, keys and values of all, each `(B, A, tokens, D)`."""
        qkv = self.qkv(hidden_states).unflatten(2, (3, self.config.num_attention_heads, self.head_dim))
        query, key, value = qkv.unbind(2)  # 3 x (B, L, A, D)
        return query[:, :keep].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        is_causal: bool,
        keep: int | None,
        past_key_values: Cache | None,
        prefix_key: torch.Tensor | None = None,
        prefix_value: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, LayerKeyValues]:
        """Attends from all tokens, or from the first `keep`; also returns this layer's keys and values."""
        batch, _, hidden = hidden_states.shape
        query, key, value = self._project(hidden_states, keep)
        if keep is not None:
            hidden_states = hidden_states[:, :keep]
            attention_mask = None if attention_mask is None else attention_mask[:, :, :keep]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        own = (key, value)
        if prefix_key is not None and prefix_value is not None:
            key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        attend = attention_function(self.config._attn_implementation, query)
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=is_causal,
            **kwargs,
        )
        attended = self.proj(attended.reshape(batch, -1, hidden))
        return self.norm(hidden_states + self.dropout(attended)), weights, own


class VlmFusionCrossAttention(nn.Module):
    """Cross-attention to a memory, residual and LayerNorm."""

    def __init__(self, config: PreTrainedConfig, memory_size: int):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_value = nn.Linear(memory_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def project(self, states: torch.Tensor) -> LayerKeyValues:
        """Projects states `(I, S, memory_size)` to keys and values, each `(I, A, S, D)`."""
        key_value = self.key_value(cast_for(self.key_value, states))
        key_value = key_value.view(*states.shape[:2], 2, self.config.num_attention_heads, self.head_dim)
        key, value = key_value.permute(2, 0, 3, 1, 4)
        if not torch.is_grad_enabled():  # generation reads them for every token
            key, value = key.contiguous(), value.contiguous()
        return key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        memory_index: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, hidden = hidden_states.shape
        if memory_index is not None:
            key, value = key[memory_index], value[memory_index]
            memory_mask = None if memory_mask is None else memory_mask[memory_index]
        images = len(key)
        if batch % images:
            raise ValueError(f"{batch} texts cannot be divided among {images} images: pass a multiple of {images}.")
        query = self.query(hidden_states).view(images, -1, self.config.num_attention_heads, self.head_dim)
        attend = attention_function(self.config._attn_implementation, query)
        attended, weights = attend(
            self,
            query.transpose(1, 2),  # (I, A, B / I * L, D)
            key,
            value,
            None if memory_mask is None else memory_mask[:, None, None],
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
            **kwargs,
        )
        attended = self.proj(attended.reshape(batch, length, hidden))
        return self.norm(hidden_states + self.dropout(attended)), weights


class VlmFusionMLP(nn.Module):
    """Feed-forward layer, residual and LayerNorm."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states + self.dropout(self.fc2(self.act(self.fc1(hidden_states)))))


class VlmFusionLayer(GradientCheckpointingLayer):
    """A BERT layer with optional cross-attention.

    Args:
        config: Config of the model, with the fields `hidden_size`, `intermediate_size`, `num_attention_heads`,
            `hidden_act`, `layer_norm_eps`, `hidden_dropout` and `attention_dropout`.
        layer_index: Index of the layer, by which the key/value cache is addressed.
        memory_size: Width of the states that cross-attention projects; None for no cross-attention.
        shared: A layer whose cross-attention and feed-forward layer are used; only self-attention is then new.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_index: int,
        memory_size: int | None,
        shared: "VlmFusionLayer | None" = None,
    ):
        super().__init__()
        self.self_attention = VlmFusionSelfAttention(config, layer_index)
        # A tuple keeps the other layer out of this module's parameters: they must not be saved or moved twice.
        self._shared = (shared,)
        if shared is None:
            self.cross_attention = None if memory_size is None else VlmFusionCrossAttention(config, memory_size)
            self.mlp = VlmFusionMLP(config)

    @property
    def owner(self) -> "VlmFusionLayer":
        """The layer that owns the cross-attention and the feed-forward layer: this one or the shared one."""
        return self if self._shared[0] is None else self._shared[0]

    def require_cross_attention(self) -> VlmFusionCrossAttention:
        """The cross-attention of the owner.

        Raises:
            ValueError: if the owner was built without `memory_size`.
        """
        if self.owner.cross_attention is None:
            raise ValueError("This layer has no cross-attention: build it with memory_size, or pass no memory.")
        return self.owner.cross_attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory_key: torch.Tensor | None = None,
        memory_value: torch.Tensor | None = None,
        memory_index: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        first_only: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """One layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, H)`): The tokens.
            attention_mask (`torch.Tensor` of shape `(B, 1, L, positions)`): Mask as the attention function expects it.
            memory_key (`torch.Tensor` of shape `(I, A, S, D)`): Keys of the memory; None skips cross-attention.
            memory_value: The values.
            memory_index (`torch.LongTensor` of shape `(B,)`): The memory of each row. Without it, B must be a multiple
                of I, and each memory belongs to B / I consecutive rows.
            memory_mask (`torch.BoolTensor` of shape `(I, S)`): False at padding of the memory.
            is_causal: Whether tokens attend only to earlier tokens.
            first_only: Return only the first token, `(B, 1, H)`.
            past_key_values: Key/value cache of the self-attention.
        """
        hidden_states, _, _ = self.self_attention(
            hidden_states, attention_mask, is_causal, 1 if first_only else None, past_key_values, **kwargs
        )
        if memory_key is not None:
            hidden_states, _ = self.require_cross_attention()(
                hidden_states, memory_key, memory_value, memory_index, memory_mask, **kwargs
            )
        return self.owner.mlp(hidden_states)


__all__ = [
    "ImageKeyValues",
    "LayerKeyValues",
    "VlmFusionCrossAttention",
    "VlmFusionLayer",
    "VlmFusionMLP",
    "VlmFusionSelfAttention",
]
