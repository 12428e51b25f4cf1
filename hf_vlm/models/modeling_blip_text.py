"""BLIP's text transformers: BERTs with cross-attention to an image, as encoder or decoder (arXiv 2201.12086).

- The encoder reads text with or without an image; the decoder's self-attention is causal.
- The decoder can use the encoder's modules for everything except self-attention (section 3.2).
- Keys and values of cross-attention are computed once per image: see `modeling_fusion.py`.

Shapes: B rows, L tokens, H text width, I images, P patches (with the class token), S positions of a memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .bert import VlmBlipLMHead
from .configuration_blip import VlmBlipConfig, VlmBlipTextConfig
from .freezing import PartlyFrozenModel
from .modeling_fusion import ImageKeyValues, VlmFusionCrossAttention, VlmFusionLayer, VlmFusionSelfAttention
from .recording import is_recording


@dataclass
class VlmBlipOutput(ModelOutput):
    """Output of BLIP's heads; each head fills the fields that it computes.

    Args:
        loss (`torch.FloatTensor` of shape `()`): The weighted sum of the parts.
        loss_itc (`torch.FloatTensor` of shape `()`): Image-text contrastive loss.
        loss_itm (`torch.FloatTensor` of shape `()`): Image-text matching loss.
        loss_lm (`torch.FloatTensor` of shape `()`): Language-modelling loss.
        parts: Sum and count of each part, `torch.FloatTensor` of shape `(2,)`, for a trainer that divides by
            the count of all ranks and micro-batches.
        logits (`torch.FloatTensor` of shape `(batch, length, vocabulary)`): The decoder's logits.
        itm_logits (`torch.FloatTensor` of shape `(pairs, 2)`): Logits of no match and match. With the losses:
            the pairs, then texts with a hard negative image, then images with a hard negative text.
        logits_per_image (`torch.FloatTensor` of shape `(B, G + Q)`): Similarities divided by the temperature.
        logits_per_text (`torch.FloatTensor` of shape `(B, G + Q)`): The same for the texts.
        targets_per_image (`torch.FloatTensor` of shape `(B, G + Q)`): Targets of the contrastive loss.
        targets_per_text (`torch.FloatTensor` of shape `(B, G + Q)`): The same for the texts.
        image_embeds (`torch.FloatTensor` of shape `(images, projection_dim)`): L2-normalised.
        text_embeds (`torch.FloatTensor` of shape `(texts, projection_dim)`): L2-normalised.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, H)`): Text states.
        past_key_values: Key/value cache of the decoder's self-attention.
        hidden_states: Hidden states of the image tower, with `output_hidden_states=True`, as in transformers' BLIP. In
            generation, where the image's keys and values are given, those of the decoder.
        attentions: The same of attention weights, with `output_attentions=True`.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_lm: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    targets_per_image: torch.Tensor | None = None
    targets_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class VlmBlipTextEmbeddings(nn.Module):
    """Word and position embeddings."""

    def __init__(self, config: VlmBlipTextConfig):
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        num_before = 0 if past_key_values is None else past_key_values.get_seq_length()
        length, longest = num_before + input_ids.shape[1], self.position_embedding.num_embeddings
        if length > longest:
            raise ValueError(
                f"Texts of {length} tokens do not fit {longest} positions: tokenize with truncation=True or generate "
                "fewer tokens."
            )
        if position_ids is None:
            position_ids = torch.arange(num_before, length, device=input_ids.device)
        return self.dropout(self.norm(self.word_embedding(input_ids) + self.position_embedding(position_ids)))


class VlmBlipPreTrainedModel(PartlyFrozenModel):
    """Initialisation and capabilities shared by all of BLIP's models."""

    config: VlmBlipConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VlmTowerLayer", "VlmTowerEmbeddings", "VlmFusionLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # Two outputs: not worth quantising, and too few for bitsandbytes on a CPU.
    _keep_in_fp32_modules = ["itm_head"]
    _can_record_outputs = {
        "hidden_states": VlmFusionLayer,
        "attentions": OutputRecorder(VlmFusionSelfAttention, index=1),
        "cross_attentions": OutputRecorder(VlmFusionCrossAttention, index=1),
    }
    # Losses are already means over the batch: the Trainer must not divide them by a token count.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VlmBlipLMHead):
            init.zeros_(module.decoder.bias)


class VlmBlipTextModel(VlmBlipPreTrainedModel):
    """A text transformer: the encoder, or with `is_causal` the decoder without its head."""

    config: VlmBlipTextConfig
    main_input_name = "input_ids"

    def __init__(
        self,
        config: PreTrainedConfig,
        memory_size: int = 768,
        is_causal: bool = False,
        shared: "VlmBlipTextModel | None" = None,
    ):
        super().__init__(config)
        self.is_causal = is_causal
        self._shared = (shared,)  # see VlmFusionLayer
        if shared is None:
            self.embeddings = VlmBlipTextEmbeddings(config)
        others: Iterable = [None] * config.num_hidden_layers if shared is None else shared.layers
        self.layers: nn.ModuleList = nn.ModuleList(
            VlmFusionLayer(config, i, memory_size, other) for i, other in enumerate(others)
        )
        self.post_init()

    @property
    def owner(self) -> "VlmBlipTextModel":
        """The model that owns the embeddings: this one or the shared one."""
        return self if self._shared[0] is None else self._shared[0]

    def get_input_embeddings(self) -> nn.Module:
        return self.owner.embeddings.word_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.owner.embeddings.word_embedding = value

    def cross_attentions(self) -> list[VlmFusionCrossAttention]:
        """The cross-attention of every layer, shared or not."""
        return [cast(VlmFusionLayer, layer).require_cross_attention() for layer in self.layers]

    def project_memory(self, states: torch.Tensor) -> ImageKeyValues:
        """Projects states `(I, S, memory_size)` to every layer's keys and values; call it once per image."""
        return tuple(cross_attention.project(states) for cross_attention in self.cross_attentions())

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: ImageKeyValues | None = None,
        memory_index: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        first_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes texts.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Token ids; the caller sets the first token.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            memory: Keys and values from [`project_memory`]; None skips cross-attention.
            memory_index (`torch.LongTensor` of shape `(B,)`): See [`VlmFusionLayer`].
            memory_mask (`torch.BoolTensor` of shape `(I, S)`): False at padding of the memory.
            position_ids (`torch.LongTensor` of shape `(B, L)`): 0, 1, 2, ... by default.
            past_key_values: Key/value cache of a decoder.
            first_only: Return only the first token's state; the last layer computes no other, unless hidden states or
                attentions are recorded.

        Returns:
            `last_hidden_state` of shape `(B, L, H)`, or `(B, 1, H)` with `first_only`.
        """
        hidden_states = self.owner.embeddings(input_ids, position_ids, past_key_values)
        if self.is_causal:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        else:
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        records = is_recording(self.config, kwargs)
        for i, layer in enumerate(self.layers):
            key, value = (None, None) if memory is None else memory[i]
            is_last = i == len(self.layers) - 1
            hidden_states = layer(
                hidden_states,
                mask,
                key,
                value,
                memory_index,
                memory_mask,
                self.is_causal,
                first_only and is_last and not records,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states[:, :1] if first_only else hidden_states)


def text_generation_config(config: PreTrainedConfig) -> GenerationConfig:
    """Generation settings: texts start with `[DEC]` and end with `[SEP]`."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.sep_token_id, pad_token_id=config.pad_token_id
    )


def prompts(
    config: PreTrainedConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts for generation and their mask: `[DEC]` first, `[SEP]` removed, padded on the left."""
    if input_ids is None:
        input_ids = torch.full((len(states), 1), config.bos_token_id, device=states.device)
        return input_ids, torch.ones_like(input_ids)
    kept = (input_ids != config.pad_token_id).long() if attention_mask is None else attention_mask
    kept = kept * (input_ids != config.sep_token_id)
    order = kept.argsort(dim=1, stable=True)  # padding first
    kept = kept.gather(1, order)
    input_ids = input_ids.gather(1, order).masked_fill(kept == 0, config.pad_token_id)
    width = int(kept.sum(dim=1).max())
    input_ids, kept = input_ids[:, -width:], kept[:, -width:]
    first = kept.argmax(dim=1, keepdim=True)
    return input_ids.scatter(1, first, config.bos_token_id), kept


__all__ = [
    "VlmBlipOutput",
    "VlmBlipPreTrainedModel",
    "VlmBlipTextModel",
    "prompts",
    "text_generation_config",
]
