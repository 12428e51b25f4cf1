"""The tower: a pre-LayerNorm transformer, used as a vision transformer and as CLIP's causal text encoder.

Papers: ViT (arXiv 2010.11929, section 3.1) and CLIP (arXiv 2103.00020, section 2.4).

- Image and text encoder share one layer class; the layouts of CLIP, BLIP and EVA are options of the config.
- One matrix product computes queries, keys and values; another embeds all patches.
- Modules are called, and their weights are not read: adapters, quantisation and offloading wrap modules.
- With `pooled_only`, the last layer computes the pooled token only, with keys and values of all tokens. The result is
  the same, and about 9/12 of that layer's work is saved.
- `stop_at_layer` returns an earlier hidden state and does not run the later layers.
- The text encoder needs no padding mask: texts are padded on the right, and the causal mask hides later tokens.

Shapes: B images or texts, N tokens (patches, plus the class token), H hidden size, A heads, D = H / A, S positions.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .casting import cast_for
from .configuration_tower import VlmTextTowerConfig, VlmTowerConfig
from .recording import is_recording


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as plain matrix products; also returns the attention weights `(B, A, N, S)`."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is None and is_causal:
        num_queries, num_keys = weights.shape[-2:]  # cached keys come before the queries
        attention_mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=weights.device)
        attention_mask = attention_mask.tril(num_keys - num_queries)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attention_function(implementation: str, query: torch.Tensor) -> Callable:
    """transformers' attention function of a name, with one exception for SDPA in bfloat16 on a CPU.

    There, plain matrix products are several times faster in the backward pass, and for a single query. They replace
    SDPA in training and when there is one query.
    """
    is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if implementation == "sdpa" and is_slow and (query.requires_grad or query.shape[2] == 1):
        return eager_attention
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)


def quick_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 x)`, written so that the backward pass needs one stored tensor instead of two."""
    return F.silu(1.702 * hidden_states) / 1.702


class VlmTowerAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, config: VlmTowerConfig | VlmTextTowerConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.model_type == "vlm_text_tower"
        has_bias = self.is_causal or config.qkv_bias
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=has_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from every token, or with `query_index` `(B,)` from one token of each row."""
        batch, _, hidden = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, -1, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, A, N, D)
        if query_index is not None:
            query = query[torch.arange(batch, device=query.device), :, query_index].unsqueeze(2)  # (B, A, 1, D)

        attend = attention_function(self.config._attn_implementation, query)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=self.is_causal and query_index is None,
            **kwargs,
        )
        return self.proj(output.reshape(batch, -1, hidden)), weights


class VlmTowerMLP(nn.Module):
    """Feed-forward layer."""

    def __init__(self, config: VlmTowerConfig | VlmTextTowerConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = quick_gelu if config.hidden_act == "quick_gelu" else ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class VlmDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops the residual branch of random samples in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * keep.to(branch.dtype) / (1.0 - self.rate)


class VlmTowerLayer(GradientCheckpointingLayer):
    """A pre-LayerNorm transformer layer."""

    def __init__(self, config: VlmTowerConfig | VlmTextTowerConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VlmTowerAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VlmTowerMLP(config)
        self.drop_path = VlmDropPath(drop_path)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_index: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.attn(self.norm1(hidden_states), attention_mask, query_index, **kwargs)
        if query_index is not None:
            hidden_states = select_tokens(hidden_states, query_index)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))


def select_tokens(hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The token at `index` of shape `(B,)` of each row of `(B, N, H)`, as `(B, 1, H)`."""
    return hidden_states[torch.arange(len(index), device=index.device), index].unsqueeze(1)


class VlmPatchEmbedding(nn.Conv2d):
    """A convolution whose stride equals its kernel size, as one matrix product: 1.2 to 6 times as fast on a CPU."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = pixel_values.shape
        side, other_side = self.kernel_size
        patches = pixel_values.reshape(batch, channels, height // side, side, width // other_side, other_side)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, channels * pixels)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)  # (B, H, rows, columns)


class VlmTowerEmbeddings(nn.Module):
    """Patches, class token and positions."""

    def __init__(self, config: VlmTowerConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = VlmPatchEmbedding(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.use_patch_bias,
        )
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.use_class_token else None
        self.position_embedding = nn.Embedding(config.num_patches + int(config.use_class_token), config.hidden_size)

    def positions(self, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
        """Position embeddings for an image of `height` x `width` pixels; other sizes are interpolated (bicubic)."""
        positions = self.position_embedding(torch.arange(self.position_embedding.num_embeddings, device=device))
        if height == width == self.config.image_size:
            return positions
        num_class = int(self.config.use_class_token)
        side = self.config.image_size // self.config.patch_size
        grid = positions[num_class:].T.reshape(1, -1, side, side).float()
        target = (height // self.config.patch_size, width // self.config.patch_size)
        grid = F.interpolate(grid, size=target, mode="bicubic", align_corners=False)
        return torch.cat([positions[:num_class], grid.flatten(2)[0].T.to(positions.dtype)])

    def drop_patches(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Keeps a random subset of the patches of each image, in training only."""
        if not self.training or self.config.patch_dropout == 0.0:
            return hidden_states
        num_class = int(self.config.use_class_token)
        batch, num_tokens, hidden = hidden_states.shape
        num_kept = max(1, round((num_tokens - num_class) * (1.0 - self.config.patch_dropout)))
        order = torch.rand(batch, num_tokens - num_class, device=hidden_states.device).argsort(dim=-1)
        kept = order[:, :num_kept].unsqueeze(-1).expand(-1, -1, hidden)
        return torch.cat([hidden_states[:, :num_class], hidden_states[:, num_class:].gather(1, kept)], dim=1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        side, expected = self.config.patch_size, self.config.image_size
        if (height, width) != (expected, expected) and not interpolate_pos_encoding:
            raise ValueError(
                f"Images of {height}x{width} pixels do not fit a tower of {expected}x{expected}: resize them with the "
                "processor or pass interpolate_pos_encoding=True."
            )
        if height % side or width % side:
            raise ValueError(f"Image sides {height}x{width} must be multiples of the patch size {side}.")
        hidden_states = self.patch_embedding(cast_for(self.patch_embedding, pixel_values)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            class_tokens = self.class_embedding.expand(len(hidden_states), 1, -1).to(hidden_states.dtype)
            hidden_states = torch.cat([class_tokens, hidden_states], dim=1)
        return self.drop_patches(hidden_states + self.positions(height, width, hidden_states.device))


class VlmTowerPreTrainedModel(PreTrainedModel):
    """Initialisation and capabilities shared by the two towers."""

    config: VlmTowerConfig
    base_model_prefix = "tower"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VlmTowerLayer", "VlmTowerEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": VlmTowerLayer, "attentions": VlmTowerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """CLIP's initialisation (section 2.4; residual branches scaled by depth)."""
        super()._init_weights(module)
        if isinstance(module, VlmTowerEmbeddings):
            std = module.config.initializer_range
            init.normal_(module.patch_embedding.weight, std=std)
            init.normal_(module.position_embedding.weight, std=std)
            if module.class_embedding is not None:
                init.normal_(module.class_embedding, std=module.config.hidden_size**-0.5)
        elif isinstance(module, VlmTowerAttention | VlmTowerMLP):
            hidden = module.config.hidden_size
            residual_std = hidden**-0.5 * (2 * module.config.num_hidden_layers) ** -0.5
            if isinstance(module, VlmTowerAttention):
                init.normal_(module.qkv.weight, std=hidden**-0.5)
                init.normal_(module.proj.weight, std=residual_std)
            else:
                init.normal_(module.fc1.weight, std=(2 * hidden) ** -0.5)
                init.normal_(module.fc2.weight, std=residual_std)


def resolve_layer(stop_at_layer: int | None, num_layers: int) -> int:
    """The number of layers that a hidden state depends on.

    Args:
        stop_at_layer: Index into the hidden states: 0 for the embeddings, -1 for the last layer; None for all layers.
        num_layers: Number of layers of the tower.

    Raises:
        ValueError: if there is no such hidden state.
    """
    if stop_at_layer is None:
        return num_layers
    count = stop_at_layer if stop_at_layer >= 0 else num_layers + 1 + stop_at_layer
    if not 0 <= count <= num_layers:
        raise ValueError(f"stop_at_layer={stop_at_layer} is outside the {num_layers + 1} hidden states of this tower.")
    return count


class VlmTowerModel(VlmTowerPreTrainedModel):
    """A vision transformer in the layout that its [`VlmTowerConfig`] describes."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: VlmTowerConfig):
        super().__init__(config)
        self.embeddings = VlmTowerEmbeddings(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_pre_norm else None
        rates = torch.linspace(0.0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(VlmTowerLayer(config, drop_path=rate) for rate in rates)
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def resize_images(self, image_size: int) -> None:
        """Changes the image size: interpolates the position embeddings and updates the config.

        Args:
            image_size: Side of the images in pixels; a multiple of the patch size.

        Raises:
            ValueError: if `image_size` is not a multiple of the patch size.
        """
        if image_size % self.config.patch_size:
            raise ValueError(f"Image side {image_size} must be a multiple of the patch size {self.config.patch_size}.")
        positions = self.embeddings.positions(image_size, image_size, self.device)
        self.embeddings.position_embedding = nn.Embedding.from_pretrained(
            positions, freeze=not self.embeddings.position_embedding.weight.requires_grad
        )
        self.config.image_size = image_size

    def pool(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """The pooled output `(B, H)` of a last hidden state `(B, N, H)`."""
        if self.config.pooling == "class":
            pooled = last_hidden_state[:, 0]
        else:
            pooled = last_hidden_state[:, int(self.config.use_class_token) :].mean(dim=1)
        return self.post_norm(pooled) if self.config.final_norm == "pooled" else pooled

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        stop_at_layer: int | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): The images.
            interpolate_pos_encoding: Accept another image size and interpolate the position embeddings.
            stop_at_layer: Index into the hidden states: 0 for the embeddings, -1 for the last layer, -2 for LLaVA's
                choice. The state is returned as `last_hidden_state`, without final norm and pooled output. Later
                layers are not run.
            pooled_only: Compute only the pooled output. Ignored for `pooling="mean"`, which needs every token, and if
                hidden states or attentions are recorded.

        Returns:
            `last_hidden_state` of shape `(batch, tokens, hidden)` (one token with `pooled_only`) and `pooler_output` of
            shape `(batch, hidden)`.

        Raises:
            ValueError: if the image size or the layer does not fit the tower.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        if self.pre_norm is not None:
            hidden_states = self.pre_norm(hidden_states)
        num_layers = resolve_layer(stop_at_layer, len(self.layers))
        last_query = None
        pooled_only = pooled_only and not is_recording(self.config, kwargs)
        if pooled_only and stop_at_layer is None and self.config.pooling == "class":
            last_query = torch.zeros(len(hidden_states), dtype=torch.long, device=hidden_states.device)
        for i, layer in enumerate(self.layers[:num_layers]):
            is_last = i == num_layers - 1
            hidden_states = layer(hidden_states, None, last_query if is_last else None, **kwargs)
        if stop_at_layer is not None:
            return BaseModelOutputWithPooling(last_hidden_state=hidden_states)
        if self.config.final_norm == "sequence":
            hidden_states = self.post_norm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.pool(hidden_states))


class VlmTextTowerModel(VlmTowerPreTrainedModel):
    """CLIP's causal text encoder; its pooled output is the hidden state of the first end-of-text token."""

    config: VlmTextTowerConfig
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"

    def __init__(self, config: VlmTextTowerConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(VlmTowerLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes texts that are padded on the right.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, each row with an end-of-text token.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`): Accepted but not used: with a causal mask,
                padding on the right cannot change the pooled output.
            pooled_only: Compute only the pooled output. Ignored if hidden states or attentions are recorded.

        Returns:
            `last_hidden_state` of shape `(batch, length, hidden)` (one token with `pooled_only`) and `pooler_output` of
            shape `(batch, hidden)`.

        Raises:
            ValueError: if the texts are longer than the position embeddings.
        """
        length, longest = input_ids.shape[1], self.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"Texts of {length} tokens do not fit {longest} positions: tokenize with truncation=True.")
        positions = self.position_embedding(torch.arange(length, device=input_ids.device))
        hidden_states = self.token_embedding(input_ids) + positions
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
        )
        end = self.feature_positions(input_ids)
        # Flash attention accepts no mask for the single query.
        pooled_only = pooled_only and self.config._attn_implementation in ("sdpa", "eager")
        pooled_only = pooled_only and not is_recording(self.config, kwargs)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, mask, **kwargs)
        if pooled_only:
            visible = torch.arange(length, device=end.device) <= end[:, None]  # (B, N)
            hidden_states = self.layers[-1](hidden_states, visible[:, None, None], end, **kwargs)
        else:
            hidden_states = self.layers[-1](hidden_states, mask, **kwargs)
        hidden_states = self.post_norm(hidden_states)
        pooled = hidden_states[:, 0] if pooled_only else select_tokens(hidden_states, end)[:, 0]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def feature_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Position of each text's first end-of-text token, of shape `(B,)`.

        OpenAI's first checkpoints have `eos_token_id=2`, a token that their texts do not contain. Their end-of-text
        token has the largest id.
        """
        if self.config.eos_token_id == 2:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)


__all__ = ["VlmTextTowerModel", "VlmTowerModel", "VlmTowerPreTrainedModel", "attention_function"]
