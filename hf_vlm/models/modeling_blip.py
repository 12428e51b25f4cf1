"""BLIP: an image tower and a text transformer that is used in three ways (arXiv 2201.12086).

- *Unimodal encoder*: text alone, for the contrastive loss (ITC). *Image-grounded encoder*: the same with
  cross-attention, `[ENC]` instead of `[CLS]`, for matching (ITM). *Image-grounded decoder*: causal self-attention,
  `[DEC]` first, for language modelling (LM). Encoder and decoder share everything but self-attention (section 3.2).
- Keys and values of an image are computed once and shared by ITM, its hard negatives, LM, and all beams.
- Momentum encoders provide soft targets and a queue for the contrastive loss. They are not part of the weights. A
  training loop calls `update_momentum()` before the first micro-batch of a step and `enqueue()` after the last.
- Batch and candidates are those of all ranks; a hard negative is the only row fetched from another rank.
- Any other head starts from a pretrained model: `VlmBlipForQuestionAnswering.from_pretraining(model)`.

Shapes: B rows, L tokens, H text width, I images, P patches (with the class token), E shared embedding, Q queue,
G = ranks x B.
"""

import copy
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .bert import VlmBlipLMHead, bert_text_config, copy_bert, require_input_ids, with_first_token
from .casting import cast_for
from .configuration_blip import VlmBlipConfig
from .configuration_tower import VlmTowerConfig
from .distributed import fetch_rows, gather_with_grad
from .freezing import freeze
from .losses import positive_pairs
from .modeling_blip_text import VlmBlipOutput, VlmBlipPreTrainedModel, VlmBlipTextModel
from .modeling_fusion import ImageKeyValues
from .modeling_tower import VlmTowerModel
from .momentum import FeatureQueue, MomentumEncoders
from .pretraining import (
    HardNegatives,
    VlmSimilarity,
    check_pairs,
    contrastive_pair_loss,
    draw_hard_negatives,
    language_modeling_part,
    matching_part,
    matching_texts,
    mean_of,
    total_loss,
    unpadded_labels,
    with_count,
)
from .recording import recording, requested, states_of
from .towers import (
    build_vision_tower,
    check_image_inputs,
    config_without_path,
    copy_vision_tower,
    freeze_unused,
    load_tower,
    pool_tokens,
    resize_tower,
)

logger = logging.get_logger(__name__)


class VlmBlipModel(VlmBlipPreTrainedModel):
    """The image tower, with the text encoder, the text decoder or both, as the config says."""

    def __init__(self, config: VlmBlipConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = build_vision_tower(vision)
        self.text_encoder = VlmBlipTextModel(text, vision.hidden_size) if config.use_text_encoder else None
        self.text_decoder = None
        if config.use_text_decoder:
            memory_size = vision.hidden_size if config.decoder_memory == "image" else text.hidden_size
            shared = self.text_encoder if self.shares_parts else None
            self.text_decoder = VlmBlipTextModel(text, memory_size, is_causal=True, shared=shared)
        self.post_init()
        self.freeze_parts()

    def require_text_encoder(self) -> VlmBlipTextModel:
        """The text encoder.

        Raises:
            ValueError: if the config leaves it out.
        """
        if self.text_encoder is None:
            raise ValueError("This checkpoint has no text encoder: use one with use_text_encoder=True.")
        return self.text_encoder

    def require_text_decoder(self) -> VlmBlipTextModel:
        """The text decoder.

        Raises:
            ValueError: if the config leaves it out.
        """
        if self.text_decoder is None:
            raise ValueError("This checkpoint has no text decoder: use one with use_text_decoder=True.")
        return self.text_decoder

    @property
    def shares_parts(self) -> bool:
        """Whether encoder and decoder share all weights except self-attention, and thus an image's keys and values."""
        has_both = self.config.use_text_encoder and self.config.use_text_decoder
        return has_both and self.config.share_encoder_decoder and self.config.decoder_memory == "image"

    def freeze_parts(self) -> None:
        """Freezes parameters of the image tower that the patch states do not depend on."""
        freeze_unused(self.vision_model, uses_pooled_output=False)

    def get_input_embeddings(self) -> nn.Module:
        return (self.text_encoder or self.require_text_decoder()).get_input_embeddings()

    def encode_images(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """Patch states `(I, P, width)` of images; `vision_features` are returned unchanged.

        Raises:
            ValueError: unless exactly one of `pixel_values` and `vision_features` is given.
        """
        check_image_inputs(pixel_values, vision_features)
        if vision_features is not None:
            return vision_features
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        return self.vision_model(pixel_values=pixel_values, **options).last_hidden_state

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Text states that have attended to the image: the encoder's, or without an encoder the decoder's.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Token ids as the tokenizer returns them; B is a
                multiple of I.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            vision_features (`torch.FloatTensor` of shape `(I, P, width)`): The tower's output instead of images.
            interpolate_pos_encoding: Accept images of another size than the tower's.

        Returns:
            `last_hidden_state` of shape `(B, L, H)`; without texts, the patch states and `pooler_output`.
        """
        with recording(kwargs if input_ids is None else {}, vision=self.vision_model) as recorded:
            states = self.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
        if input_ids is None:
            pooled = pool_tokens(states, self.config.vision_pooling)
            return BaseModelOutputWithPooling(
                last_hidden_state=states, pooler_output=pooled, **states_of(recorded.get("vision"))
            )
        if self.text_encoder is not None:
            text_model, token_id = self.text_encoder, self.config.text_config.enc_token_id
        else:
            text_model, token_id = self.require_text_decoder(), self.config.text_config.bos_token_id
        return text_model(
            with_first_token(input_ids, token_id), attention_mask, text_model.project_memory(states), **kwargs
        )


class VlmBlipSimilarity(VlmSimilarity):
    """The projections of one image token and one text token into the shared space, and the temperature."""

    def __init__(self, config: VlmBlipConfig):
        super().__init__(config, config.vision_config.hidden_size, config.text_config.hidden_size)

    def embed_images(self, states: torch.Tensor) -> torch.Tensor:
        """L2-normalised `(I, E)` of patch states `(I, P, width)`."""
        pooled = pool_tokens(states, self.config.vision_pooling)
        return F.normalize(self.vision_proj(cast_for(self.vision_proj, pooled)).float(), dim=-1)

    def forward(self, embeds: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Similarities `(rows, candidates)` divided by the temperature, in float32 even under autocast."""
        with torch.autocast(embeds.device.type, enabled=False):
            return embeds @ candidates.T / self.temperature.float()


class VlmBlipHead(VlmBlipPreTrainedModel):
    """Base class of BLIP's heads: the body, `from_parts`, and `from_pretraining` from another head.

    `required_parts` are the parts of the body that the head needs. `layout` holds the config fields that
    `from_parts` and `from_pretraining` set for the head.
    """

    required_parts: tuple[str, ...] = ()
    layout: dict = {}

    def __init__(self, config: VlmBlipConfig):
        super().__init__(config)
        missing = [part for part in self.required_parts if not getattr(config, f"use_{part}")]
        if missing:
            part = missing[0].replace("_", " ")
            raise ValueError(f"{type(self).__name__} needs a {part}, but this checkpoint has none.")
        memory = self.layout.get("decoder_memory", config.decoder_memory)
        if config.decoder_memory != memory:
            raise ValueError(f'{type(self).__name__} needs decoder_memory="{memory}": see from_pretraining.')
        self.model = VlmBlipModel(config)
        if config.use_text_decoder:
            owner = "text_encoder" if self.model.shares_parts else "text_decoder"
            self._tied_weights_keys = {"lm_head.decoder.weight": f"model.{owner}.embeddings.word_embedding.weight"}

    def freeze_parts(self) -> None:
        """Freezes the parts that the body freezes."""
        self.model.freeze_parts()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VlmBlipSimilarity):
            init.constant_(module.temperature, module.config.temperature_init_value)

    @classmethod
    def from_parts(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        image_size: int | None = None,
        dropout: float | None = None,
        **config_kwargs,
    ) -> "VlmBlipHead":
        """Builds the head on a pretrained image tower and a BERT (section 4.1); all other weights are new.

        Args:
            vision: Hub id, folder or instance of a vision encoder, or of a model with a vision tower; copied.
            text: The same for a BERT; encoder and decoder are initialised from its weights.
            vision_kwargs: `from_pretrained` options of the vision tower (`dtype`, `device_map`, `revision`).
            text_kwargs: The same for the BERT.
            image_size: Side of the images in pixels; None keeps the tower's. See `resize_tower`.
            dropout: All dropout probabilities of the text transformers; None keeps the BERT's.
            **config_kwargs: Fields of [`VlmBlipConfig`].

        Raises:
            ValueError: if `text` is not a BERT, or a tower of transformers has another image size.
        """
        vision_model = copy_vision_tower(vision, vision_kwargs, image_size)
        bert = load_tower(text, "text", text_kwargs or {})
        if vision_model.config.model_type == VlmTowerConfig.model_type:
            vision_model.config.final_norm = "sequence"  # CLIP normalises only the pooled token; BLIP uses all tokens
        parts = {
            "vision_config": config_without_path(vision_model),
            "text_config": bert_text_config(bert.config, dropout),
        }
        head = cls(VlmBlipConfig(**{**cls.layout, **parts, **config_kwargs}))
        head.model.vision_model = vision_model
        head.freeze_parts()
        for text_model in (head.model.text_encoder, head.model.text_decoder):
            if text_model is not None:
                copy_bert(text_model, bert)
        return head

    @classmethod
    def from_pretraining(cls, model: "VlmBlipHead", image_size: int | None = None, **config_kwargs) -> "VlmBlipHead":
        """Builds this head on the weights of another one, for the next training stage.

        Args:
            model: A trained head, such as [`VlmBlipForPreTraining`]; its weights are copied.
            image_size: New side of the images in pixels; position embeddings are interpolated.
            **config_kwargs: Fields of [`VlmBlipConfig`] that differ.

        Raises:
            ValueError: if the other head lacks a part of the body that this head needs.
        """
        config = VlmBlipConfig.from_dict({**model.config.to_dict(), **cls.layout, **config_kwargs})
        config._attn_implementation = model.config._attn_implementation
        head = cls(config)
        given = model.state_dict()
        if model.model.shares_parts:
            of_encoder = {name: t for name, t in given.items() if name.startswith("model.text_encoder.")}
            given = {name.replace("text_encoder", "text_decoder"): t for name, t in of_encoder.items()} | given
        lacking = [name for name in head.state_dict() if name.startswith("model.") and name not in given]
        if lacking:
            raise ValueError(f"{cls.__name__} needs {lacking[0]}, but this {type(model).__name__} has no such weights.")
        own = head.state_dict()
        fits = {name: t for name, t in given.items() if name in own and own[name].shape == t.shape}
        head.load_state_dict(fits, strict=False)
        if new := sorted(own.keys() - fits.keys()):
            logger.warning(
                "%s: newly initialised weights (not in the source checkpoint): %s.", cls.__name__, ", ".join(new)
            )
        resize_tower(head.model.vision_model, image_size)
        return head.to(dtype=model.dtype, device=model.device)


class VlmBlipForPreTraining(VlmBlipHead):
    """BLIP with its three objectives, each with a weight in the config (section 3.2).

    Example:
        ```python
        >>> model.update_momentum()
        >>> model(pixel_values, input_ids, attention_mask, return_loss=True).loss.backward()
        >>> model.enqueue()
        ```
    """

    required_parts: tuple[str, ...] = ("text_encoder", "text_decoder")
    layout = {"use_text_encoder": True, "use_text_decoder": True, "decoder_memory": "image"}

    def __init__(self, config: VlmBlipConfig):
        super().__init__(config)
        self.similarity = VlmBlipSimilarity(config)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.lm_head = VlmBlipLMHead(config.text_config) if config.use_text_decoder else None
        # A list hides the encoders from state_dict, optimisers and data parallelism.
        self._momentum: list[MomentumEncoders] = []
        self.post_init()
        self.freeze_parts()

    def freeze_parts(self) -> None:
        """Also freezes parameters that only losses of weight 0 depend on."""
        super().freeze_parts()
        config = self.config
        unused: list[nn.Module | torch.Tensor] = []
        if not config.itc_weight:
            unused.append(self.similarity)
        if not config.itm_weight:
            unused.append(self.itm_head)
        if self.lm_head is not None and not config.lm_weight:
            head = self.lm_head
            unused += [head.dense, head.norm, head.decoder.bias, self.model.require_text_decoder()]
            if not config.tie_word_embeddings:  # a tied weight is the word embedding, which the other losses train
                unused.append(head.decoder.weight)
        if not (config.itm_weight or (config.lm_weight and self.model.shares_parts)):
            unused += self.model.require_text_encoder().cross_attentions()
        freeze(*unused)

    def averaged_modules(self) -> dict[str, nn.Module]:
        """The modules that the momentum encoders average."""
        return {
            "vision_model": self.model.vision_model,
            "text_encoder": self.model.require_text_encoder(),
            "similarity": self.similarity,
        }

    @property
    def momentum(self) -> MomentumEncoders:
        """Momentum encoders and queue, created from the current weights at the first access."""
        if not self._momentum:
            queue = FeatureQueue(self.config.queue_size, self.config.projection_dim)
            averages = MomentumEncoders(self.averaged_modules(), self.config.momentum, queue)
            for layer in averages.encoders["text_encoder"].layers:
                layer.cross_attention = None  # the contrastive loss encodes text without an image
            self._momentum.append(averages)
        return self._momentum[0].to(self.device)

    def update_momentum(self) -> None:
        """Updates the momentum encoders; call it once per step, before the first micro-batch."""
        self.momentum.update(self.averaged_modules())

    def enqueue(self) -> None:
        """Adds the step's features to the queue; call it once per step, after the last micro-batch."""
        self.momentum.enqueue()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: L2-normalised embeddings `(I, E)`; `last_hidden_state`: patch states `(I, P, width)`."""
        with recording(kwargs, vision=self.model.vision_model) as recorded:
            states = self.model.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
        embeds = self.similarity.embed_images(states)
        return BaseModelOutputWithPooling(
            last_hidden_state=states, pooler_output=embeds, **states_of(recorded.get("vision"))
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: L2-normalised embeddings `(B, E)` of texts as the tokenizer returns them."""
        encoder = self.model.require_text_encoder()
        output = encoder(input_ids, attention_mask, first_only=True, return_dict=True, **requested(kwargs))
        output.pooler_output = self.similarity.embed_texts(output.last_hidden_state)
        return output

    def project_memory(self, states: torch.Tensor) -> ImageKeyValues:
        """Projects patch states `(I, P, width)` to the images' keys and values for `match`."""
        return self.model.require_text_encoder().project_memory(states)

    def match(
        self,
        memory: ImageKeyValues,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `(B, 2)` of no match and match, of texts with the images of `project_memory`."""
        input_ids = with_first_token(input_ids, self.config.text_config.enc_token_id)
        encoder = self.model.require_text_encoder()
        states = encoder(input_ids, attention_mask, memory, memory_index, first_only=True).last_hidden_state
        return self.itm_head(cast_for(self.itm_head, states[:, 0]))

    @torch.no_grad()
    def _momentum_features(self, pixel_values, vision_features, input_ids, attention_mask, interpolate_pos_encoding):
        """Embeddings of this rank's images and texts, computed by the momentum encoders."""
        encoders = self.momentum.encoders
        if vision_features is None:
            pooled_only = self.config.vision_pooling == "class" and isinstance(self.model.vision_model, VlmTowerModel)
            options = {"pooled_only": True} if pooled_only else {}
            options |= {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
            vision_features = encoders["vision_model"](pixel_values=pixel_values, **options).last_hidden_state
        texts = encoders["text_encoder"](input_ids, attention_mask, first_only=True).last_hidden_state
        similarity = cast(VlmBlipSimilarity, encoders["similarity"])
        return similarity.embed_images(vision_features), similarity.embed_texts(texts)

    def _contrast(self, output: VlmBlipOutput, momentum_features, pair_ids, soft_target_weight: float) -> torch.Tensor:
        """Section 3.2, ITC: fills logits and targets, and returns the loss."""
        images_m, texts_m = momentum_features
        queued_images, queued_texts, queued_ids = self.momentum.queue.filled()
        all_images = torch.cat([gather_with_grad(images_m), queued_images])
        all_texts = torch.cat([gather_with_grad(texts_m), queued_texts])
        positives = positive_pairs(pair_ids, len(images_m), images_m.device)
        if pair_ids is None:
            positives = F.pad(positives, (0, len(queued_ids)))
            pair_ids = images_m.new_full((len(images_m),), -1, dtype=torch.long)
        else:
            positives = torch.cat([positives, pair_ids[:, None] == queued_ids], dim=1)
        hard = positives / positives.sum(dim=-1, keepdim=True)
        with torch.no_grad():
            soft_images = self.similarity(images_m, all_texts).softmax(dim=-1)
            soft_texts = self.similarity(texts_m, all_images).softmax(dim=-1)
        targets_per_image = soft_target_weight * soft_images + (1 - soft_target_weight) * hard
        targets_per_text = soft_target_weight * soft_texts + (1 - soft_target_weight) * hard
        logits_per_image = self.similarity(output.image_embeds, all_texts)
        logits_per_text = self.similarity(output.text_embeds, all_images)
        output.logits_per_image, output.logits_per_text = logits_per_image, logits_per_text
        output.targets_per_image, output.targets_per_text = targets_per_image, targets_per_text
        if self.training and torch.is_grad_enabled():
            self.momentum.keep(images_m, texts_m, pair_ids)
        return contrastive_pair_loss(logits_per_image, logits_per_text, targets_per_image, targets_per_text)

    def _hard_negatives(self, output: VlmBlipOutput, pair_ids: torch.Tensor | None, seed: int | None) -> HardNegatives:
        """Draws negatives by the similarities of ITC if they were computed; candidates of the queue are excluded."""
        images, texts = output.image_embeds, output.text_embeds
        positives = positive_pairs(pair_ids, images.shape[0], images.device)
        per_image, per_text = output.logits_per_image, output.logits_per_text
        if per_image is None or per_text is None:
            per_image = self.similarity(images, gather_with_grad(texts.detach()))
            per_text = self.similarity(texts, gather_with_grad(images.detach()))
        candidates = positives.shape[1]
        return draw_hard_negatives(per_image[:, :candidates], per_text[:, :candidates], positives, seed)

    def _match_pairs(
        self,
        output: VlmBlipOutput,
        states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pair_ids: torch.Tensor | None,
        seed: int | None,
    ) -> tuple[torch.Tensor, ImageKeyValues]:
        """Section 3.2, ITM: fills logits; returns the loss's sum and count, and this rank's keys and values."""
        batch = len(states)
        own = torch.arange(batch, device=states.device)
        negatives = self._hard_negatives(output, pair_ids, seed)
        states, image_places = fetch_rows(states, negatives.images)
        memory = self.model.require_text_encoder().project_memory(states)
        texts = matching_texts(input_ids, attention_mask, negatives.texts, self.config.text_config.pad_token_id)
        output.itm_logits = itm_logits = self.match(memory, *texts, torch.cat([own, image_places, own]))
        return matching_part(itm_logits, negatives.exists), tuple((key[:batch], value[:batch]) for key, value in memory)

    def _losses(self, output, states, momentum_features, inputs, pair_ids, soft_target_weight, seed) -> None:
        """Fills the losses of non-zero weight, and their total."""
        config = self.config
        input_ids, attention_mask, labels = inputs
        parts, memory = {}, None
        if config.itc_weight:
            weight = config.soft_target_weight if soft_target_weight is None else soft_target_weight
            output.loss_itc = loss_itc = self._contrast(output, momentum_features, pair_ids, weight)
            parts["itc"] = with_count(loss_itc, len(states))
        if config.itm_weight:
            parts["itm"], memory = self._match_pairs(output, states, input_ids, attention_mask, pair_ids, seed)
            output.loss_itm = mean_of(parts["itm"])
        if config.lm_weight and self.lm_head is not None:
            decoder = self.model.require_text_decoder()
            if memory is None or not self.model.shares_parts:
                memory = decoder.project_memory(states)
            if labels is None:
                labels = unpadded_labels(input_ids, attention_mask)
            decoder_ids = with_first_token(input_ids, config.text_config.bos_token_id)
            text_states = decoder(decoder_ids, attention_mask, memory).last_hidden_state
            parts["lm"] = language_modeling_part(text_states, labels, self.lm_head, config.label_smoothing)
            output.loss_lm = mean_of(parts["lm"])
        output.parts = parts
        losses = {"itc": output.loss_itc, "itm": output.loss_itm, "lm": output.loss_lm}
        output.loss = total_loss(losses, config.loss_weights)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pair_ids: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        soft_target_weight: float | None = None,
        sample_seed: int | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmBlipOutput:
        """Compares images with texts; with `return_loss`, computes the objectives of non-zero weight.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Texts as the tokenizer returns them, `[CLS]` first and
                padded on the right; row i belongs to image i. `[ENC]` and `[DEC]` are inserted here.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            labels (`torch.LongTensor` of shape `(B, L)`): Token ids to learn, -100 elsewhere; by default all
                unpadded ones.
            pair_ids (`torch.LongTensor` of shape `(B,)`): Pairs of equal id are positives of each other.
            vision_features (`torch.FloatTensor` of shape `(B, P, width)`): The tower's output instead of images.
            soft_target_weight: Share of the momentum encoders in the contrastive targets; None uses the config's. The
                trainer increases it from 0.
            sample_seed: Seed of the hard negatives; must be the same on all ranks.
            interpolate_pos_encoding: Accept images of another size than the tower's.
            return_loss: Whether to compute the losses; otherwise only matching logits and embeddings are computed.
            **kwargs: `output_hidden_states` and `output_attentions`: record them in the image tower.

        Returns:
            [`VlmBlipOutput`] with `itm_logits`, embeddings and, with `return_loss`, losses, logits and targets.

        Raises:
            ValueError: if images or texts are missing, or if their numbers differ with `return_loss`.
        """
        input_ids = require_input_ids(input_ids)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        images = self.get_image_features(
            pixel_values, vision_features, interpolate_pos_encoding, return_dict=True, **requested(kwargs)
        )
        output = VlmBlipOutput(image_embeds=images.pooler_output, **states_of(images))
        output.text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        if not return_loss:
            memory = self.project_memory(images.last_hidden_state)
            output.itm_logits = self.match(memory, input_ids, attention_mask)
            return output
        check_pairs(len(images.last_hidden_state), len(input_ids))
        momentum_features = None
        if self.config.itc_weight:
            momentum_features = self._momentum_features(
                pixel_values, vision_features, input_ids, attention_mask, interpolate_pos_encoding
            )
        inputs = (input_ids, attention_mask, labels)
        self._losses(
            output, images.last_hidden_state, momentum_features, inputs, pair_ids, soft_target_weight, sample_seed
        )
        return output


class VlmBlipForImageTextRetrieval(VlmBlipForPreTraining):
    """Image-text retrieval in both directions: ranking by embeddings (ITC), then re-ranking by matching (ITM).

    It is trained by the same two objectives; with `pair_ids`, all captions of an image are positives (section 5.1).

    Example:
        ```python
        >>> model = VlmBlipForImageTextRetrieval.from_pretrained("org/blip-small")
        >>> image_embeds = model.get_image_features(pixel_values).pooler_output
        >>> text_embeds = model.get_text_features(input_ids, attention_mask).pooler_output
        >>> similarities = image_embeds @ text_embeds.T
        ```
    """

    required_parts = ("text_encoder",)
    layout = {"use_text_encoder": True, "use_text_decoder": False, "tie_word_embeddings": False}

    def __init__(self, config: VlmBlipConfig):
        config = copy.deepcopy(config)  # a pretraining checkpoint's config has a decoder, which retrieval does not need
        config.update(self.layout)
        super().__init__(config)


__all__ = [
    "VlmBlipForImageTextRetrieval",
    "VlmBlipForPreTraining",
    "VlmBlipHead",
    "VlmBlipModel",
]
