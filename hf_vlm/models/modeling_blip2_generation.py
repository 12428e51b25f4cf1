"""BLIP-2's second stage: a frozen LLM generates text from the Q-Former's queries (arXiv 2301.12597, section 3.3).

- The processor puts one placeholder token per query before the text. A linear layer maps the queries to the LLM's
  width, and they replace the placeholders. A wrong number of placeholders raises an error.
- Decoder-only LLMs are trained on the text after the image. Encoder-decoder LLMs read the image and a prefix, and are
  trained on the suffix.
- Only the Q-Former's query branch, the LayerNorm after the tower and the linear layer are trained.
- Generation is the LLM's own `generate`; images are encoded once, whatever the number of beams.

Shapes: B rows, L tokens, I images, P patches, Q queries.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .configuration_blip2 import VlmBlip2Config
from .language_head import generate_from_embeds, language_loss, mean_loss, prompt_mask
from .language_model import commit_of, hidden_states, load_language_model, reader
from .losses import token_cross_entropy
from .modeling_blip2 import VlmBlip2Model, VlmBlip2PreTrainedModel
from .recording import NestedOutput, recording, states_of
from .towers import config_without_path

logger = logging.get_logger(__name__)


@dataclass
class VlmBlip2GenerationOutput(NestedOutput):
    """Output of BLIP-2 with an LLM.

    Args:
        loss (`torch.FloatTensor` of shape `()`): Language-modelling loss.
        logits (`torch.FloatTensor` of shape `(B, L, vocabulary)`): The LLM's logits; None with labels, since training
            computes logits at supervised positions only.
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, width)`): The LLM's hidden states.
        past_key_values: The LLM's key/value cache.
        vision_outputs: Output of the image tower, if hidden states or attentions were asked for.
        qformer_outputs: The same of the Q-Former.
        language_model_outputs: The same of the LLM.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    vision_outputs: ModelOutput | None = None
    qformer_outputs: ModelOutput | None = None
    language_model_outputs: ModelOutput | None = None


class VlmBlip2ForConditionalGeneration(VlmBlip2PreTrainedModel, GenerationMixin):
    """BLIP-2 with a frozen LLM: generates text about images.

    Example:
        ```python
        >>> model = VlmBlip2ForConditionalGeneration.from_parts("org/blip2-stage1", "facebook/opt-2.7b", 50265)
        >>> model.generate(**processor(images=images, text=["<image>"] * len(images)), max_new_tokens=20)
        ```
    """

    accepts_loss_kwargs = True
    body_class = VlmBlip2Model

    def __init__(self, config: VlmBlip2Config, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        if config.text_config is None:
            raise ValueError(f"{type(self).__name__} needs an LLM, but this checkpoint has none: use from_parts.")
        self.model = self.body_class(config, language_model)
        self.post_init()
        self.freeze_parts()
        self.generation_config = self.model.language_model.generation_config

    @classmethod
    def from_parts(
        cls,
        blip2: str | PreTrainedModel,
        language_model: str | PreTrainedModel,
        image_token_id: int,
        language_model_kwargs: dict | None = None,
    ) -> "VlmBlip2ForConditionalGeneration":
        """Build the head on the tower and Q-Former of an earlier stage and an LLM.

        The linear layer between Q-Former and LLM is newly initialised.

        Args:
            blip2: Id, folder or instance of a BLIP-2 model, such as [`VlmBlip2ForPreTraining`]. Its weights are copied.
            language_model: Id, folder or instance of a causal or encoder-decoder LLM. An instance is not copied.
            image_token_id: Id of the placeholder in the LLM's tokenizer; it may lie past the LLM's vocabulary.
            language_model_kwargs: `from_pretrained` options of the LLM (`dtype`, `device_map`, `revision`,
                `quantization_config`). A frozen LLM may be in bfloat16 while the other parts are in float32.

        Raises:
            ValueError: if the LLM's logits cannot be reproduced from its hidden states.
        """
        body = VlmBlip2Model.from_pretrained(blip2) if isinstance(blip2, str) else blip2.base_model
        llm = load_language_model(language_model, language_model_kwargs)
        fields = {
            "text_config": config_without_path(llm),
            "image_token_id": image_token_id,
            "language_model_source": None,
        }
        name = language_model if isinstance(language_model, str) else llm.config._name_or_path
        if name and (commit := commit_of(name, language_model_kwargs or {})):  # compared when the LLM is left out
            fields["language_model_source"] = {"id": name, "revision": commit}
        return cls._on(body, fields, llm)

    @classmethod
    def _on(cls, body: VlmBlip2Model, fields: dict, llm: PreTrainedModel) -> "VlmBlip2ForConditionalGeneration":
        """A head of this class with a copy of the body's weights and the LLM instance itself."""
        config = cls.config_class.from_dict(
            {**body.config.to_dict(), **fields, "model_type": cls.config_class.model_type}
        )
        config._attn_implementation = body.config._attn_implementation
        head = cls(config, llm)
        given = {name: t for name, t in body.state_dict().items() if not name.startswith("language_model.")}
        missing, unexpected = head.model.load_state_dict(given, strict=False)
        if new := [name for name in missing if not name.startswith("language_model.")]:
            logger.warning(
                "%s: newly initialised weights (not in the source checkpoint): %s", cls.__name__, ", ".join(new)
            )
        assert not unexpected, unexpected
        return head.to(body.device)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.language_model.get_output_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmBlip2GenerationOutput:
        """Logits, or with `labels` the loss, of texts after an image.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Texts with Q placeholders per image, from the processor.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            labels (`torch.LongTensor` of shape `(B, L)`): Target token ids, -100 elsewhere (images, prompt, padding);
                for an encoder-decoder LLM the target texts `(B, length)`.
            vision_features (`torch.FloatTensor` of shape `(I, P, width)`): The tower's output, in place of images.
            qformer_input_ids (`torch.LongTensor` of shape `(I, length)`): InstructBLIP's instructions, tokenised by the
                Q-Former's tokenizer.
            qformer_attention_mask (`torch.LongTensor` of shape `(I, length)`): 0 at padding.
            decoder_input_ids (`torch.LongTensor` of shape `(B, length)`): Decoder inputs of an encoder-decoder LLM,
                without labels.
            num_items_in_batch: Divisor of the summed loss; by default the number of supervised tokens.
            interpolate_pos_encoding: Accept images of a size other than the tower's.

        Returns:
            [`VlmBlip2GenerationOutput`] with `loss`, or, without labels, `logits`.

        Raises:
            ValueError: if the texts are missing, or an image is truncated, missing or surplus.
        """
        if input_ids is None:
            raise ValueError("The texts are missing: pass input_ids with the placeholders of the images.")
        inputs = (pixel_values, vision_features, qformer_input_ids, qformer_attention_mask, interpolate_pos_encoding)
        llm, body = self.model.require_language_model(), self.model
        called = llm if labels is None or llm.config.is_encoder_decoder else reader(llm)
        parts = {"vision_outputs": body.vision_model, "qformer_outputs": body.qformer, "language_model_outputs": called}
        with recording(kwargs, **parts) as recorded:
            output = self._answer(
                self._embed(input_ids, *inputs), attention_mask, labels, decoder_input_ids, num_items_in_batch, **kwargs
            )
        for name, part_output in recorded.items():
            output[name] = part_output
        if (queries := output.qformer_outputs) is not None:  # without the keys and values
            output.qformer_outputs = BaseModelOutputWithCrossAttentions(
                last_hidden_state=queries.last_hidden_state,
                cross_attentions=queries.cross_attentions,
                **states_of(queries),
            )
        return output

    def _answer(
        self, embeds, attention_mask, labels, decoder_input_ids, num_items_in_batch, **kwargs
    ) -> VlmBlip2GenerationOutput:
        """Logits, or with `labels` the loss, of the LLM's inputs `(B, L, width)`."""
        llm = self.model.require_language_model()
        kwargs["return_dict"] = True
        if labels is None:
            decoder = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
            output = llm(inputs_embeds=embeds, attention_mask=attention_mask, **decoder, **kwargs)
            return VlmBlip2GenerationOutput(logits=output.logits, past_key_values=output.past_key_values)
        kwargs["use_cache"] = False
        if llm.config.is_encoder_decoder:
            logits = llm(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                decoder_input_ids=llm.prepare_decoder_input_ids_from_labels(labels),
                **kwargs,
            ).logits
            supervised = labels != -100
            total = token_cross_entropy(logits[supervised], labels[supervised]).sum()
            return VlmBlip2GenerationOutput(loss=mean_loss(total, supervised.sum(), num_items_in_batch))
        states = hidden_states(llm, inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        loss = language_loss(llm, states, labels, num_items_in_batch)
        return VlmBlip2GenerationOutput(loss=loss, last_hidden_state=states)

    def _embed(
        self, input_ids, pixel_values, vision_features, qformer_input_ids, qformer_attention_mask, interpolate
    ) -> torch.Tensor:
        """Inputs of the LLM, `(B, L, width)`."""
        states = self.model.encode_images(pixel_values, vision_features, interpolate)
        return self.model.embed(input_ids, self.model.read_images(states, qformer_input_ids, qformer_attention_mask))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Generate a text about each image.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Prompts with placeholders, padded on the left; by default
                only the placeholders.
            **kwargs: Options of transformers' `generate`: `num_beams`, `do_sample`, `max_new_tokens`, ... All other
                arguments are those of `forward`.

        Returns:
            `torch.LongTensor` of shape `(B, length)`: the generated tokens, without the prompts.

        Raises:
            ValueError: if prompts of a decoder-only LLM are padded on the right.
        """
        if input_ids is None:
            images = vision_features if pixel_values is None else pixel_values
            if images is None:
                raise ValueError("Pass either pixel_values or vision_features.")
            shape = (len(images), self.config.qformer_config.num_query_tokens)
            input_ids = torch.full(shape, self.config.image_token_id, device=self.device)  # type: ignore[arg-type]
        llm = self.model.require_language_model()
        attention_mask = prompt_mask(input_ids, attention_mask, llm.config.is_encoder_decoder)
        inputs = (pixel_values, vision_features, qformer_input_ids, qformer_attention_mask, interpolate_pos_encoding)
        embeds = self._embed(input_ids, *inputs)
        return generate_from_embeds(llm, self.generation_config, embeds, attention_mask, **kwargs)


__all__ = ["VlmBlip2ForConditionalGeneration", "VlmBlip2GenerationOutput"]
