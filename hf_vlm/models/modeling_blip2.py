"""BLIP-2: a frozen image tower, a trained Q-Former, and optionally a frozen LLM (arXiv 2301.12597).

- The first stage (section 3.2) trains the Q-Former with three objectives: see `modeling_blip2_pretraining.py`.
- The second stage (section 3.3) replaces placeholder tokens of an LLM by the queries, projected by one linear layer:
  see `modeling_blip2_generation.py`.
- Tower and LLM are frozen and in eval mode; the LayerNorm after the tower (`ln_vision` in the paper's code) is trained.

Shapes: B rows, Q queries, L tokens, H width of the Q-Former, I images, P patches.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .casting import cast_for
from .configuration_blip2 import VlmBlip2Config
from .freezing import freeze, keep_frozen_in_eval
from .language_head import check_placeholders, place_images
from .language_model import (
    AdapterNames,
    adapter_base,
    build_language_model,
    cast_weights,
    hidden_states,
    keep_names,
    load_language_model,
    reader,
)
from .modeling_qformer import VlmQFormerModel
from .recording import recording, states_of
from .towers import build_vision_tower, check_image_inputs, freeze_unused, tower_states

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "trust_remote_code")


class VlmBlip2PreTrainedModel(AdapterNames):
    """Initialisation, freezing and loading shared by BLIP-2's models."""

    config: VlmBlip2Config
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VlmTowerLayer", "VlmTowerEmbeddings", "VlmQFormerLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # Two outputs: not worth quantising, and too few for bitsandbytes on a CPU.
    _keep_in_fp32_modules = ["itm_head"]
    # Losses are already means over the batch: the Trainer must not divide them by a token count.
    accepts_loss_kwargs = False

    @property
    def body(self) -> "VlmBlip2Model":
        """The model without a head's own layers."""
        return self.base_model

    def freeze_parts(self) -> None:
        """Freezes the tower, the LLM, and the parameters of the Q-Former that no loss depends on."""
        self.body.freeze()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, language_model=None, **kwargs):
        """transformers' `from_pretrained`; frozen parts are frozen again, and an LLM keeps its own precision.

        Args:
            pretrained_model_name_or_path: Id or folder of a checkpoint, or of an adapter, which names its base.
            language_model: Id, folder or instance of the LLM for a checkpoint without the LLM's weights. By default the
                LLM that the checkpoint names is loaded.

        Raises:
            ValueError: if the LLM cannot be loaded, or if an adapter's base is stored without its LLM.
        """
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        of_adapter = {name: kept for name, kept in (kwargs.get("adapter_kwargs") or {}).items() if name in HUB_OPTIONS}
        base = adapter_base(pretrained_model_name_or_path, **{**hub_options, **of_adapter})
        stored = kwargs.get("config") or cls.config_class.from_pretrained(
            base or pretrained_model_name_or_path, **hub_options
        )
        if base is not None and stored.excludes_language_model:
            raise ValueError(
                f"{base}, the base of the adapter {pretrained_model_name_or_path}, is stored without its LLM: load the "
                "base first, then the adapter by load_adapter."
            )
        dtype = None if stored.text_config is None or "dtype" in kwargs else stored.text_config.dtype
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if dtype is not None and model.body.language_model is not None:  # transformers loads all parts in one precision
            cast_weights(model.body.language_model, dtype)
            model.config.text_config.dtype = dtype
        if model.config.excludes_language_model:
            model.body.fetch_language_model(language_model)
        keep_names(model)
        model.freeze_parts()
        model.eval()
        return loaded

    def save_pretrained(self, save_directory, exclude_frozen: bool = False, state_dict: dict | None = None, **kwargs):
        """transformers' `save_pretrained`.

        Args:
            save_directory: Folder.
            exclude_frozen: Omit the LLM's weights. The config then names the LLM's id and commit on the Hub, and
                `from_pretrained` loads the weights from there.
            state_dict: Weights to save instead of the model's own.

        Raises:
            ValueError: with `exclude_frozen`, if the LLM was not loaded from the Hub or its weights have changed.
        """
        if not exclude_frozen:
            return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        self.body.check_source()
        weights = self.state_dict() if state_dict is None else state_dict
        kept = {name: tensor for name, tensor in weights.items() if "language_model." not in name}
        self.config.excludes_language_model = True
        try:
            super().save_pretrained(save_directory, state_dict=kept, **kwargs)
        finally:
            self.config.excludes_language_model = False


class VlmBlip2Model(VlmBlip2PreTrainedModel):
    """The frozen image tower, the LayerNorm after it, the Q-Former, and the LLM if the config has one."""

    reads_instruction = False

    def __init__(self, config: VlmBlip2Config, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        vision, qformer = config.vision_config, config.qformer_config
        self.vision_model = build_vision_tower(vision)
        self.vision_norm = nn.LayerNorm(vision.hidden_size, eps=config.vision_norm_eps)
        self.qformer = VlmQFormerModel._from_config(qformer)
        self.language_model = None
        if config.text_config is not None:
            self.language_projection = nn.Linear(qformer.hidden_size, config.text_config.hidden_size)
            self.language_model = language_model or build_language_model(config.text_config)
        if config.excludes_language_model:
            self._keys_to_ignore_on_load_missing = [r"language_model\."]
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Freezes the tower and the LLM. An LLM uses only the queries, so the unused text branch is frozen, too."""
        freeze_unused(self.vision_model, uses_pooled_output=False)
        freeze(self.vision_model)
        if self.language_model is not None:
            freeze(self.language_model)
            self.qformer.freeze_text(all_layers=not self.reads_instruction)

    def train(self, mode: bool = True) -> "VlmBlip2Model":
        """Sets training mode everywhere except in a frozen tower and a frozen LLM."""
        super().train(mode)
        keep_frozen_in_eval(self.vision_model, self.language_model)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return (self.qformer if self.language_model is None else self.language_model).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        (self.qformer if self.language_model is None else self.language_model).set_input_embeddings(value)

    def require_language_model(self) -> PreTrainedModel:
        """The LLM.

        Raises:
            ValueError: if the checkpoint has none.
        """
        if self.language_model is None:
            raise ValueError("This BLIP-2 has no LLM: load a second-stage checkpoint.")
        return self.language_model

    def encode_images(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """Normalised patch states `(I, P, width)`, from images or from the tower's cached output.

        Raises:
            ValueError: unless exactly one of `pixel_values` and `vision_features` is given.
        """
        check_image_inputs(pixel_values, vision_features)
        if pixel_values is not None:
            vision_features = tower_states(self.vision_model, pixel_values, interpolate_pos_encoding)
        assert vision_features is not None  # check_image_inputs
        return self.vision_norm(cast_for(self.vision_norm, vision_features))

    def read_images(
        self,
        states: torch.Tensor,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Q-Former outputs `(I, Q, H)` of the queries for patch states `(I, P, width)`.

        Raises:
            ValueError: if InstructBLIP gets no instruction, or if BLIP-2 gets one.
        """
        if self.reads_instruction and qformer_input_ids is None:
            raise ValueError("The Q-Former reads the instruction: pass qformer_input_ids, which the processor makes.")
        if not self.reads_instruction and qformer_input_ids is not None:
            raise ValueError("BLIP-2's Q-Former reads images alone: leave out qformer_input_ids.")
        num_queries = self.config.qformer_config.num_query_tokens
        memory = self.qformer.project_memory(states)
        return self.qformer(memory, qformer_input_ids, qformer_attention_mask, keep=num_queries).last_hidden_state

    def embed(self, input_ids: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Inputs `(B, L, width)` of the LLM: token embeddings, with queries `(I, Q, H)` at the placeholders.

        Raises:
            ValueError: if a row's placeholders do not fit its images.
        """
        image_token_id = self.config.image_token_id
        assert image_token_id is not None  # VlmBlip2Config.validate_parts
        check_placeholders(input_ids == image_token_id, queries)
        images = self.language_projection(queries)
        return place_images(self.language_model.get_input_embeddings(), input_ids, images, image_token_id)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Q-Former outputs of the queries; with an LLM and texts, the LLM's hidden states.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Texts for the LLM, with Q placeholders per image.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            vision_features (`torch.FloatTensor` of shape `(I, P, width)`): The tower's output instead of images, from
                [`tower_states`].
            qformer_input_ids (`torch.LongTensor` of shape `(I, length)`): InstructBLIP's instructions.
            qformer_attention_mask (`torch.LongTensor` of shape `(I, length)`): 0 at padding.
            interpolate_pos_encoding: Accept images of another size than the tower's.

        Returns:
            `last_hidden_state` of shape `(B, L, width of the LLM)` (the encoder's for an encoder-decoder LLM), or
            `(I, Q, H)` without texts; and `pooler_output`, the mean of the queries. Recorded `hidden_states` and
            `attentions` are those of the LLM, or of the Q-Former without texts.
        """
        states = self.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
        llm = None if input_ids is None else self.language_model
        with recording(kwargs, last=self.qformer if llm is None else reader(llm)) as recorded:
            last = queries = self.read_images(states, qformer_input_ids, qformer_attention_mask)
            if input_ids is not None and llm is not None:
                embeds = self.embed(input_ids, queries)
                last = hidden_states(llm, inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=queries.mean(dim=1), **states_of(recorded.get("last"))
        )

    def fetch_language_model(self, source: str | PreTrainedModel | None = None) -> None:
        """Loads the LLM that a checkpoint leaves out.

        Args:
            source: Id, folder or instance; by default the LLM that the config names.

        Raises:
            ValueError: if the LLM cannot be loaded.
        """
        named = self.config.language_model_source or {}
        revision = {} if source is not None else {"revision": named.get("revision")}
        try:
            loaded = load_language_model(source or named["id"], {"dtype": self.language_model.dtype, **revision})
        except OSError as error:
            raise ValueError(
                f"The checkpoint leaves out its LLM, {named.get('id')}, which cannot be loaded: connect to the Hub, or "
                "pass a local copy as language_model=."
            ) from error
        self.language_model = loaded.to(self.device)
        self.config.excludes_language_model = False

    def check_source(self) -> None:
        """Checks that the LLM has the weights of the LLM that the config names.

        Raises:
            ValueError: if the config names none, or the weights differ.
        """
        source = self.config.language_model_source
        if source is None or self.language_model is None:
            raise ValueError("There is no LLM from the Hub to leave out: save without exclude_frozen.")
        there = load_language_model(source["id"], {"revision": source["revision"], "dtype": self.language_model.dtype})
        own = self.language_model.state_dict()
        if any(name not in own or not torch.equal(own[name].cpu(), t) for name, t in there.state_dict().items()):
            raise ValueError(f"The LLM's weights differ from those of {source['id']}: save without exclude_frozen.")


__all__ = ["VlmBlip2Model", "VlmBlip2PreTrainedModel"]
