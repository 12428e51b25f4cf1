"""BLIP's generating heads: captions, and answers to questions (arXiv 2201.12086, sections 5.2 and 5.3).

- The keys and values of the decoder's cross-attention are computed once per image (or question), for all tokens and
  beams.
- Every text starts with `[DEC]`, in training and generation, and every question with `[ENC]`. Both are inserted here,
  so texts are passed as the tokenizer returns them.

Shapes: B rows, L tokens, I images, P patches (with the class token), N answers.
"""

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .bert import VlmBlipLMHead, require_input_ids, with_first_token
from .configuration_blip import VlmBlipConfig
from .modeling_blip import VlmBlipHead
from .modeling_blip_text import VlmBlipOutput, prompts, text_generation_config
from .modeling_fusion import ImageKeyValues
from .pretraining import language_modeling_part
from .recording import recording, requested, states_of


def unrecorded(options: dict) -> dict:
    """Options of a `forward` that record nothing: with an image, transformers' BLIP returns the tower's states only."""
    return {name: value for name, value in options.items() if name not in requested(options)}


class VlmBlipForConditionalGeneration(VlmBlipHead, GenerationMixin):
    """Generates captions, after a prompt if one is given (section 5.2).

    Example:
        ```python
        >>> model = VlmBlipForConditionalGeneration.from_pretrained("org/blip-small")
        >>> processor.batch_decode(model.generate(pixel_values, max_new_tokens=20), skip_special_tokens=True)
        ```
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = True

    required_parts = ("text_decoder",)
    layout = {"use_text_encoder": False, "use_text_decoder": True, "decoder_memory": "image"}

    def __init__(self, config: VlmBlipConfig):
        super().__init__(config)
        self.lm_head = VlmBlipLMHead(config.text_config)
        self.post_init()
        self.generation_config = text_generation_config(config.text_config)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        memory: ImageKeyValues | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmBlipOutput:
        """Language modelling of captions.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Captions as the tokenizer returns them; `[DEC]` replaces
                their first token. B is a multiple of I.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            labels (`torch.LongTensor` of shape `(B, L)`): Token ids to learn, -100 elsewhere (padding,
                prompt).
            vision_features (`torch.FloatTensor` of shape `(I, P, width)`): The tower's output instead of images.
            memory: Instead of either, the images' keys and values from `model.text_decoder.project_memory`. The token
                ids are then used unchanged.
            position_ids: See [`VlmBlipTextModel`]; set by generation.
            past_key_values: Key/value cache of the decoder.
            num_items_in_batch: Divisor of the summed loss; by default the number of supervised tokens.
            interpolate_pos_encoding: Accept images of another size than the tower's.
            logits_to_keep: Compute logits for the last n positions only (0 = all).

        Returns:
            [`VlmBlipOutput`] with `loss`, or, without labels, `logits`.
        """
        vision = None
        if memory is None:
            with recording(kwargs, vision=self.model.vision_model) as recorded:
                states = self.model.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
            vision, kwargs = recorded.get("vision"), unrecorded(kwargs)
            memory = self.model.require_text_decoder().project_memory(states)
            input_ids = with_first_token(input_ids, self.config.text_config.bos_token_id)
        output = self.model.require_text_decoder()(
            input_ids, attention_mask, memory, None, None, position_ids, past_key_values, return_dict=True, **kwargs
        )
        states, seen = output.last_hidden_state, states_of(vision or output)
        if labels is None:
            logits = self.lm_head(states[:, -logits_to_keep:])
            return VlmBlipOutput(logits=logits, last_hidden_state=states, past_key_values=past_key_values, **seen)
        part = language_modeling_part(states, labels, self.lm_head, self.config.label_smoothing)
        divisor = torch.as_tensor(part[1] if num_items_in_batch is None else num_items_in_batch)
        loss = part[0] / divisor.clamp(min=1)
        return VlmBlipOutput(loss=loss, parts={"lm": part}, last_hidden_state=states, **seen)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Generates a caption for each image.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Prompts as the tokenizer returns them, padded on either
                side; B is a multiple of I.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            vision_features (`torch.FloatTensor` of shape `(I, P, width)`): The tower's output instead of images.
            interpolate_pos_encoding: Accept images of another size than the tower's.
            **kwargs: Options of transformers' `generate`: `num_beams`, `do_sample`, `top_p`, `max_new_tokens`, ...

        Returns:
            `torch.LongTensor` of shape `(B, length)`: `[DEC]`, the prompt (padded on the left) and the caption.
        """
        states = self.model.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
        memory = self.model.require_text_decoder().project_memory(states)
        input_ids, attention_mask = prompts(self.config.text_config, input_ids, attention_mask, states)
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, memory=memory, **kwargs)


class VlmBlipForQuestionAnswering(VlmBlipHead, GenerationMixin):
    """Answers questions: the encoder reads image and question, and the decoder reads its states (section 5.3).

    Example:
        ```python
        >>> model = VlmBlipForQuestionAnswering.from_pretraining(pretrained)
        >>> processor.batch_decode(model.generate(pixel_values, input_ids, attention_mask), skip_special_tokens=True)
        ```
    """

    main_input_name = "input_ids"
    required_parts = ("text_encoder", "text_decoder")
    layout = {
        "use_text_encoder": True,
        "use_text_decoder": True,
        "share_encoder_decoder": False,
        "decoder_memory": "question",
    }

    def __init__(self, config: VlmBlipConfig):
        super().__init__(config)
        self.lm_head = VlmBlipLMHead(config.text_config)
        self.post_init()
        self.generation_config = text_generation_config(config.text_config)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def read(
        self,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[ImageKeyValues, torch.Tensor | None]:
        """Keys and values of the questions' states for the decoder, and a mask that is False at padding."""
        states = self.model.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
        encoder = self.model.require_text_encoder()
        input_ids = with_first_token(input_ids, self.config.text_config.enc_token_id)
        questions = encoder(input_ids, attention_mask, encoder.project_memory(states)).last_hidden_state
        mask = None if attention_mask is None else attention_mask.bool()
        return self.model.require_text_decoder().project_memory(questions), mask

    def decoder_inputs(self, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids that start with `[DEC]` and their mask, from answers padded with -100 or the padding token."""
        pad_token_id = self.config.text_config.pad_token_id
        mask = (answers != -100) & (answers != pad_token_id)
        return with_first_token(answers.masked_fill(~mask, pad_token_id), self.config.text_config.bos_token_id), mask

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        answer_index: torch.Tensor | None = None,
        answer_weights: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        question_memory: tuple[ImageKeyValues, torch.Tensor | None] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmBlipOutput:
        """Language modelling of answers.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Questions as the tokenizer returns them; B is a
                multiple of I. `[ENC]` is inserted here.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            labels (`torch.LongTensor` of shape `(N, length)`): Answers as the tokenizer returns them, -100 at padding;
                `[DEC]` is inserted here.
            answer_index (`torch.LongTensor` of shape `(N,)`): The question of each answer; by default N / B each, in
                order.
            answer_weights (`torch.FloatTensor` of shape `(N,)`): Weight of each answer's loss; 1 by default.
            vision_features (`torch.FloatTensor` of shape `(I, P, width)`): The tower's output instead of images.
            decoder_input_ids (`torch.LongTensor` of shape `(N, length)`): The answers so far, without labels.
            question_memory: Instead of images and questions, the result of [`read`], as `generate` passes it.
                `input_ids` are then the answers so far.
            position_ids: See [`VlmBlipTextModel`]; set by generation.
            past_key_values: Key/value cache of the decoder.
            interpolate_pos_encoding: Accept images of another size than the tower's.
            logits_to_keep: Compute logits for the last n positions only (0 = all).

        Returns:
            [`VlmBlipOutput`] with `loss`: the weighted sum over answers of their negative log-likelihood, divided by
            the number of questions; or, without labels, `logits`.
        """
        input_ids = require_input_ids(input_ids)
        vision = None
        if question_memory is not None:
            answer_ids, answer_mask = input_ids, attention_mask
        else:
            with recording(kwargs, vision=self.model.vision_model) as recorded:
                question_memory = self.read(
                    pixel_values, input_ids, attention_mask, vision_features, interpolate_pos_encoding
                )
            vision, kwargs = recorded.get("vision"), unrecorded(kwargs)
            answers = decoder_input_ids if labels is None else labels
            if answers is None:
                raise ValueError("Pass the answers as labels, or as decoder_input_ids, or call generate().")
            answer_ids, answer_mask = self.decoder_inputs(answers)
        memory, memory_mask = question_memory
        where = (memory, answer_index, memory_mask, position_ids, past_key_values)
        output = self.model.require_text_decoder()(answer_ids, answer_mask, *where, return_dict=True, **kwargs)
        states, seen = output.last_hidden_state, states_of(vision or output)
        if labels is None:
            logits = self.lm_head(states[:, -logits_to_keep:])
            return VlmBlipOutput(logits=logits, last_hidden_state=states, past_key_values=past_key_values, **seen)
        smoothing = self.config.label_smoothing
        total, _ = language_modeling_part(states, labels, self.lm_head, smoothing, answer_weights)
        part = torch.stack([total, total.new_tensor(len(input_ids))])
        return VlmBlipOutput(loss=part[0] / part[1], parts={"lm": part}, last_hidden_state=states, **seen)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Generates an answer to each question; arguments as in [`forward`], `**kwargs` as in transformers' `generate`.

        Returns:
            `torch.LongTensor` of shape `(B, length)`: `[DEC]` and the answers.
        """
        input_ids = require_input_ids(input_ids)
        memory = self.read(pixel_values, input_ids, attention_mask, vision_features, interpolate_pos_encoding)
        start = torch.full((len(input_ids), 1), self.config.text_config.bos_token_id, device=input_ids.device)
        return super().generate(
            input_ids=start, attention_mask=torch.ones_like(start), question_memory=memory, **kwargs
        )

    @torch.no_grad()
    def rank_answers(
        self,
        answer_ids: torch.Tensor,
        answer_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        num_candidates: int = 128,
    ) -> torch.Tensor:
        """The most likely of a closed list of answers (section 5.3).

        The answers with the most likely first tokens are compared by the log-likelihood of the whole answer.

        Args:
            answer_ids (`torch.LongTensor` of shape `(A, length)`): All answers as the tokenizer returns them.
            answer_mask (`torch.LongTensor` of shape `(A, length)`): 0 at padding.
            num_candidates: Number of answers per question that are compared in full.

        Returns:
            `torch.LongTensor` of shape `(B,)`: rows of `answer_ids`.
        """
        input_ids = require_input_ids(input_ids)
        batch, decoder = len(input_ids), self.model.require_text_decoder()
        memory, memory_mask = self.read(pixel_values, input_ids, attention_mask, vision_features)
        count = min(num_candidates, len(answer_ids))
        answer_ids = with_first_token(answer_ids, self.config.text_config.bos_token_id)
        start = answer_ids[:1, :1].expand(batch, 1)
        first = self.lm_head(decoder(start, None, memory, None, memory_mask).last_hidden_state[:, 0])
        candidates = first.log_softmax(dim=-1)[:, answer_ids[:, 1]].topk(count).indices  # (B, count)
        ids, mask = answer_ids[candidates.flatten()], answer_mask[candidates.flatten()]
        states = decoder(ids, mask, memory, None, memory_mask).last_hidden_state
        log_probs = self.lm_head(states[:, :-1]).float().log_softmax(dim=-1)
        likelihood = log_probs.gather(2, ids[:, 1:, None])[..., 0].masked_fill(mask[:, 1:] == 0, 0.0).sum(dim=1)
        return candidates.gather(1, likelihood.view(batch, count).argmax(dim=1, keepdim=True))[:, 0]


__all__ = ["VlmBlipForConditionalGeneration", "VlmBlipForQuestionAnswering"]
