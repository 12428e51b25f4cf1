"""LLaVA: an image tower's patch features, projected to the width of an LLM and put at its placeholder tokens.

Papers: LLaVA-1.0 (arXiv 2304.08485), 1.5 (arXiv 2310.03744), and the blog post on 1.6 (LLaVA-NeXT).

- The tower's hidden states at one layer (-2 by default, without the class token) go through a linear layer (1.0) or an
  MLP (1.5, 1.6). Later layers are not run.
- 1.6 splits an image into an overview and tiles: see `anyres.py`.
- Placeholders are counted image by image: a truncated, missing or surplus image raises an error.
- Rows without images cost no vision pass. In training, an *empty* batch goes through the projector, so that every rank
  has a (zero) gradient. If the tower is trainable or sharded, a blank view goes through the tower.
- The LLM keeps its head. Training computes logits at supervised positions only; generation is the LLM's own `generate`.
- Packed rows have `position_ids` that restart and no `attention_mask`.

Shapes: B rows, L tokens, I images, T views, P patches, H width of the LLM. A view is an overview or a tile; without
"anyres" an image has one view.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested

from .anyres import anyres_layout, join_views
from .casting import cast_for
from .configuration_llava import VlmLlavaConfig
from .freezing import freeze, is_frozen, keep_frozen_in_eval
from .language_head import check_placeholders, generate_from_embeds, language_loss, place_images, prompt_mask
from .language_model import AdapterNames, build_language_model, keep_names, load_language_model, logits_of
from .recording import is_recording
from .towers import (
    build_vision_tower,
    config_without_path,
    count_extra_tokens,
    has_class_token,
    layer_states,
    load_tower,
    read_parameters,
    resize_tower,
)

Features = dict[str, ModelOutput]


@dataclass
class VlmLlavaOutput(ModelOutput):
    """Output of [`VlmLlavaForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`): Language-modelling loss.
        logits (`torch.FloatTensor` of shape `(B, L, vocabulary)`): None with labels, since training computes logits at
            supervised positions only.
        past_key_values: The LLM's key/value cache.
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, H)`): The LLM's last hidden states.
        hidden_states: The LLM's hidden states of every layer, with `output_hidden_states=True`.
        attentions: The LLM's attention weights of every layer, with `output_attentions=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class VlmLlavaProjector(nn.Module):
    """Maps the tower's width to the LLM's; with "anyres", also joins the views of each image."""

    def __init__(self, config: VlmLlavaConfig):
        super().__init__()
        self.config = config
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1 = nn.Linear(width, hidden, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = self.newline = None
        if config.projector_type == "mlp":
            self.linear_2 = nn.Linear(hidden, hidden, bias=config.projector_bias)
        if config.image_grid_pinpoints is not None:
            self.newline = nn.Parameter(torch.empty(hidden))

    def forward(self, states: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Tokens `(tokens, H)` of each image, from the hidden states `(T, P, width)` of its views.

        Raises:
            ValueError: if the number of views does not match the image sizes.
        """
        projected = self.linear_1(states)
        if self.linear_2 is not None:
            projected = self.linear_2(self.act(projected))
        if not len(projected):  # no image: no tokens, but every trainable parameter gets a gradient
            return [projected.flatten(0, 1) + (0.0 if self.newline is None else 0.0 * self.newline)]
        if self.newline is None:
            return list(projected)
        if image_sizes is None:
            raise ValueError("This model splits images into tiles: pass image_sizes, which the processor returns.")
        grids, vision = self.config.image_grid_pinpoints or [], self.config.vision_config
        layouts = [anyres_layout(size, grids, vision.image_size, vision.patch_size) for size in image_sizes.tolist()]
        counts = [layout.num_views for layout in layouts]
        if sum(counts) != len(projected):
            raise ValueError(
                f"Images of these sizes have {counts} views, but there are {len(projected)}: pass the pixel_values and "
                "image_sizes of the same processor call."
            )
        views = projected.split(counts)
        return [join_views(view, layout, self.newline) for view, layout in zip(views, layouts, strict=True)]


class VlmLlavaPreTrainedModel(AdapterNames):
    """Initialisation and capabilities shared by LLaVA's models."""

    config: VlmLlavaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VlmTowerLayer", "VlmTowerEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VlmLlavaProjector) and module.newline is not None:
            init.normal_(module.newline, std=module.newline.shape[0] ** -0.5)

    @property
    def body(self) -> "VlmLlavaModel":
        """The model without its head."""
        return self.base_model

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """transformers' `from_pretrained`; the image tower is frozen until a stage unfreezes it."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        keep_names(model)
        model.body.freeze_tower()
        model.eval()
        return loaded


class VlmLlavaModel(VlmLlavaPreTrainedModel):
    """The image tower, the projector and the LLM."""

    def __init__(self, config: VlmLlavaConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.vision_model = build_vision_tower(config.vision_config)
        if config.vision_feature_select_strategy == "default" and not has_class_token(self.vision_model):
            raise ValueError(
                f'A {config.vision_config.model_type} tower has no class token, so "default" would drop a patch: '
                'set vision_feature_select_strategy="full".'
            )
        self.projector = VlmLlavaProjector(config)
        self.language_model = language_model or build_language_model(config.text_config)
        self.post_init()
        self.freeze_tower()

    def freeze_tower(self) -> None:
        """Freezes the image tower, which then stays in eval mode, also after `train()`."""
        freeze(self.vision_model)

    def unfreeze_tower(self) -> None:
        """Unfreezes the image tower up to the layer that the projector reads; later layers stay frozen."""
        for parameter in read_parameters(self.vision_model, self.config.vision_feature_layer):
            parameter.requires_grad_(True)

    @property
    def num_additional_image_tokens(self) -> int:
        """Number of tokens that the image tower puts before the patches: a class token, registers."""
        return count_extra_tokens(self.vision_model)

    @property
    def trains_tower(self) -> bool:
        """Whether any parameter of the image tower is trainable."""
        return not is_frozen(self.vision_model)

    def train(self, mode: bool = True) -> "VlmLlavaModel":
        """Sets training mode, except in a fully frozen tower or LLM."""
        super().train(mode)
        keep_frozen_in_eval(self.vision_model, self.language_model)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The projector's input `(T, P, width)` for views `(T, channels, height, width)`; it can be cached."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_tower):
            states = layer_states(self.vision_model, pixel_values, self.config.vision_feature_layer)
        return self._without_class_token(states)

    def _without_class_token(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, 1:] if self.config.vision_feature_select_strategy == "default" else states

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """The tokens of each image, ready for the LLM.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(T, channels, height, width)`): The views of the images.
            image_sizes (`torch.LongTensor` of shape `(I, 2)`): Height and width of each image, with "anyres".
            vision_features (`torch.FloatTensor` of shape `(T, P, width)`): Output of `get_vision_features`, in place
                of the views.
            **kwargs: `output_hidden_states` and `output_attentions`: record them in the tower, which then runs all
                layers.

        Returns:
            `last_hidden_state` (the tower's) and `pooler_output` (a list with the tokens `(tokens, H)` of each image).
            Pass it to `forward` or `generate` as `mm_encoder_outputs={"image": ...}` to reuse it in later turns.

        Raises:
            ValueError: unless exactly one of `pixel_values` and `vision_features` is given.
        """
        return self._project_images(pixel_values, image_sizes, vision_features, **kwargs)

    def _project_images(
        self,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        tower = None
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Pass either pixel_values or vision_features.")
        if pixel_values is not None and is_recording(self.vision_model.config, kwargs):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_tower):
                tower = self.vision_model(
                    pixel_values=pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True}
                )
            vision_features = self._without_class_token(tower.hidden_states[self.config.vision_feature_layer])
        elif pixel_values is not None:
            vision_features = self.get_vision_features(pixel_values)
        assert vision_features is not None  # one of the two is given
        states = cast_for(self.projector, vision_features)
        wants_states = kwargs.get("output_hidden_states", self.vision_model.config.output_hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=self.projector(states, image_sizes),
            hidden_states=tower.hidden_states if tower is not None and wants_states else None,
            attentions=None if tower is None else tower.get("attentions"),
        )

    def _no_images(self, device: torch.device) -> list[torch.Tensor]:
        """Zero image tokens, connected to every trainable parameter and to every module that all ranks must run."""
        vision = self.config.vision_config
        sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.vision_model)
        if not sharded and not (self.training and torch.is_grad_enabled()):
            return []
        if sharded or self.trains_tower:  # a blank view, since towers reject an empty batch
            shape = (1, vision.num_channels, vision.image_size, vision.image_size)
            states = self.get_vision_features(torch.zeros(shape, device=device))[:0]
        else:
            states = torch.zeros(0, 1, vision.hidden_size, device=device)
        return self.projector(cast_for(self.projector, states))

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        mm_encoder_outputs: Features | None = None,
    ) -> torch.Tensor:
        """Inputs `(B, L, H)` of the LLM: token embeddings, with image tokens at the placeholders.

        Raises:
            ValueError: if an image is truncated, missing or surplus.
        """
        if mm_encoder_outputs is not None:
            images = mm_encoder_outputs["image"].pooler_output
        elif _any_rows(pixel_values) or _any_rows(vision_features):
            images = self._project_images(pixel_values, image_sizes, vision_features).pooler_output
        else:
            images = None
        check_placeholders(input_ids == self.config.image_token_id, images or [])
        # Before the embeddings, as with images: all ranks must gather sharded modules in the same order.
        tokens = self._no_images(input_ids.device) if images is None else images
        return place_images(self.get_input_embeddings(), input_ids, tokens, self.config.image_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        mm_encoder_outputs: Features | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """The LLM's hidden states; arguments are those of [`VlmLlavaForConditionalGeneration.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes, vision_features, mm_encoder_outputs)
        shape = inputs_embeds.shape
        is_packed = position_ids is not None and attention_mask is None and kwargs.get("use_cache") is False
        if is_packed and is_flash_attention_requested(self.language_model.config):
            # Flash attention finds restarting positions only in a batch of one row.
            position_ids = position_ids.expand(shape[:2]).reshape(1, -1)
            inputs_embeds = inputs_embeds.flatten(0, 1)[None]
        output = self.language_model.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        output.last_hidden_state = output.last_hidden_state.view(*shape[:2], -1)
        if output.hidden_states is not None:
            output.hidden_states = tuple(states.view(*shape[:2], -1) for states in output.hidden_states)
        return output


def _any_rows(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and len(tensor) > 0


class VlmLlavaForConditionalGeneration(VlmLlavaPreTrainedModel, GenerationMixin):
    """LLaVA with its language-modelling head: answers about images in a conversation.

    Example:
        ```python
        >>> model = VlmLlavaForConditionalGeneration.from_parts("org/clip-small", "HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model.generate(**processor(images=images, text=["<image>\nWhat is this?"]), max_new_tokens=20)
        ```
    """

    def __init__(self, config: VlmLlavaConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = VlmLlavaModel(config, language_model)
        self.post_init()
        self.model.freeze_tower()
        self.generation_config = self.model.language_model.generation_config

    @classmethod
    def from_parts(
        cls,
        vision: str | PreTrainedModel,
        language_model: str | PreTrainedModel,
        image_token_id: int | None = None,
        image_size: int | None = None,
        language_model_kwargs: dict | None = None,
        **config,
    ) -> "VlmLlavaForConditionalGeneration":
        """Build LLaVA on an image tower and an LLM; the projector is newly initialised.

        Args:
            vision: Id, folder or instance of an image tower, or of a two-tower model that contains one. Its weights
                are copied.
            language_model: Id, folder or instance of a causal LLM with its head. An instance is modified in place.
            image_token_id: Id of the placeholder in the LLM's tokenizer; by default the first id after its vocabulary.
                If the LLM has no such row, its embeddings grow to a multiple of 64 rows; tied heads stay tied.
            image_size: Side of an image or tile in pixels, for a [`VlmTowerModel`]: its positions are interpolated.
            language_model_kwargs: `from_pretrained` options of the LLM (`dtype`, `revision`, ...).
            **config: Fields of [`VlmLlavaConfig`], such as `projector_type`.

        Raises:
            ValueError: if the tower or the LLM is unsupported, or a field of the config is invalid.
        """
        tower = load_tower(vision, "vision", {})
        if image_size is not None:
            tower = copy.deepcopy(tower)
            resize_tower(tower, image_size)
        llm = load_language_model(language_model, language_model_kwargs)
        vocabulary = llm.get_input_embeddings().num_embeddings
        image_token_id = vocabulary if image_token_id is None else image_token_id
        if image_token_id >= vocabulary:
            llm.resize_token_embeddings(image_token_id + 1, pad_to_multiple_of=64)
        fields = {"vision_config": config_without_path(tower), "text_config": config_without_path(llm)}
        model = cls(VlmLlavaConfig(**fields, image_token_id=image_token_id, **config), llm)
        model.model.vision_model.load_state_dict(tower.state_dict())
        model.model.freeze_tower()
        return model.to(llm.device).eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`VlmLlavaModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        mm_encoder_outputs: Features | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmLlavaOutput:
        """Logits, or with `labels` the loss, of texts with images in them.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Texts with the placeholders of each image, from the
                processor. Images come in the order of the rows.
            pixel_values (`torch.FloatTensor` of shape `(T, channels, height, width)`): The views of the images.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding; None for packed rows.
            position_ids (`torch.LongTensor` of shape `(B, L)`): Positions; in packed rows they restart at each sample.
                Packed rows need `labels` or `use_cache=False`: with a cache, samples of a row attend to each other.
            past_key_values: The LLM's key/value cache.
            inputs_embeds (`torch.FloatTensor` of shape `(B, L, H)`): In place of `input_ids` and images.
            image_sizes (`torch.LongTensor` of shape `(I, 2)`): Height and width of each image, with "anyres".
            vision_features (`torch.FloatTensor` of shape `(T, P, width)`): Output of `get_vision_features`, in place
                of `pixel_values`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, in place of both.
            labels (`torch.LongTensor` of shape `(B, L)`): Target token ids, -100 elsewhere.
            num_items_in_batch: Divisor of the summed loss; by default the number of supervised tokens.
            logits_to_keep: Compute logits for the last n positions only (0 = all).

        Returns:
            [`VlmLlavaOutput`] with `loss`, or, without labels, `logits`.

        Raises:
            ValueError: if an image is truncated, missing or surplus.
        """
        if labels is not None:
            kwargs["use_cache"] = False  # with a cache, packed samples would attend to each other
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            vision_features=vision_features,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        llm, states = self.model.language_model, output.last_hidden_state
        recorded = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        if labels is None:
            logits = logits_of(llm, slice_logits_to_keep(states, logits_to_keep))
            return VlmLlavaOutput(
                logits=logits, past_key_values=output.past_key_values, last_hidden_state=states, **recorded
            )
        loss = language_loss(llm, states, labels, num_items_in_batch)
        return VlmLlavaOutput(loss=loss, last_hidden_state=states, **recorded)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        mm_encoder_outputs: Features | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Generate a continuation of each prompt. Images are encoded once, whatever the number of beams.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Prompts with placeholders, padded on the left.
            **kwargs: Options of transformers' `generate`: `num_beams`, `max_new_tokens`, `past_key_values`, ... All
                other arguments are those of `forward`.

        Returns:
            `torch.LongTensor` of shape `(B, L + length)`: the prompts and their continuations.

        Raises:
            ValueError: for prompts padded on the right, or a truncated, missing or surplus image.
        """
        mask = prompt_mask(input_ids, attention_mask)
        embeds = self.model.embed(input_ids, pixel_values, image_sizes, vision_features, mm_encoder_outputs)
        llm, options = self.model.language_model, {"input_ids": input_ids, **kwargs}
        return generate_from_embeds(llm, self.generation_config, embeds, mask, **options)


__all__ = ["VlmLlavaForConditionalGeneration", "VlmLlavaModel", "VlmLlavaOutput", "VlmLlavaPreTrainedModel"]
