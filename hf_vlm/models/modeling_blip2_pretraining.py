"""BLIP-2's first stage: pretraining of the Q-Former on a frozen image tower (arXiv 2301.12597, section 3.2).

- One step computes three objectives. ITC contrasts the nearest of an image's queries with the text. ITM classifies the
  mean over queries that have attended to the text. ITG generates the text after the queries.
- The queries are computed once, and ITG reuses their keys and values. Those of an image are computed once for all.
- Batch and candidates are those of all ranks; a hard negative is the only row fetched from another rank.
- The candidates of ITC carry no gradient: each side learns from its own rows, as in the paper's code.

Shapes: B rows, Q queries, L tokens, H width of the Q-Former, I images, P patches, E shared embedding, G = ranks x B.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .bert import VlmBlipLMHead, bert_qformer_config, copy_bert_to_qformer, require_input_ids, with_first_token
from .casting import cast_for
from .configuration_blip2 import VlmBlip2Config
from .distributed import fetch_rows, gather_with_grad
from .freezing import freeze
from .losses import positive_pairs
from .modeling_blip2 import VlmBlip2Model, VlmBlip2PreTrainedModel
from .modeling_qformer import QFormerKeyValues, QueryStates
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
from .recording import NestedOutput, recording, requested, states_of
from .towers import config_without_path, copy_vision_tower, load_tower


@dataclass
class VlmBlip2Output(NestedOutput):
    """Output of BLIP-2's pretraining heads.

    Args:
        loss (`torch.FloatTensor` of shape `()`): The weighted sum of the parts.
        loss_itc (`torch.FloatTensor` of shape `()`): Image-text contrastive loss.
        loss_itm (`torch.FloatTensor` of shape `()`): Image-text matching loss.
        loss_lm (`torch.FloatTensor` of shape `()`): Image-grounded text generation loss.
        parts: Sum and count of each part, `torch.FloatTensor` of shape `(2,)`, for a trainer that divides by
            the count of all ranks and micro-batches.
        itm_logits (`torch.FloatTensor` of shape `(pairs, 2)`): Logits of no match and match. With the losses:
            the pairs, then texts with a hard negative image, then images with a hard negative text.
        logits_per_image (`torch.FloatTensor` of shape `(B, G)`): Similarities divided by the temperature.
        logits_per_text (`torch.FloatTensor` of shape `(B, G)`): The same for the texts.
        image_embeds (`torch.FloatTensor` of shape `(images, Q, projection_dim)`): L2-normalised, one per query.
        text_embeds (`torch.FloatTensor` of shape `(texts, projection_dim)`): L2-normalised.
        query_output (`torch.FloatTensor` of shape `(images, Q, H)`): The Q-Former's outputs of the queries.
        text_model_output: The Q-Former's output of the texts, if hidden states or attentions were asked for.
        vision_model_output: The image tower's output, if hidden states or attentions were asked for.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_lm: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] | None = None
    itm_logits: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    query_output: torch.Tensor | None = None
    text_model_output: ModelOutput | None = None
    vision_model_output: ModelOutput | None = None


class VlmBlip2Similarity(VlmSimilarity):
    """The projections of every query and of one text token into the shared space, and the temperature."""

    def __init__(self, config: VlmBlip2Config):
        hidden_size = config.qformer_config.hidden_size
        super().__init__(config, vision_size=hidden_size, text_size=hidden_size)

    def embed_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """L2-normalised `(I, Q, E)` of queries `(I, Q, H)`."""
        return F.normalize(self.vision_proj(queries).float(), dim=-1)

    def forward(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Similarities `(I, B)` divided by the temperature, each of an image's nearest query (section 3.2)."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            similarities = image_embeds.flatten(0, 1) @ text_embeds.T  # (I * Q, B)
            return similarities.unflatten(0, image_embeds.shape[:2]).amax(dim=1) / self.temperature.float()


class VlmBlip2ForPreTraining(VlmBlip2PreTrainedModel):
    """BLIP-2's first stage: pretraining of the Q-Former on a frozen tower (section 3.2).

    Example:
        ```python
        >>> model(pixel_values, input_ids, attention_mask, return_loss=True).loss.backward()
        ```
    """

    writes = True

    def __init__(self, config: VlmBlip2Config):
        super().__init__(config)
        qformer = config.qformer_config
        if not qformer.use_text:
            raise ValueError(f"{type(self).__name__} needs the Q-Former's text branch, but this checkpoint has none.")
        if config.text_config is not None:  # a later stage's config has an LLM, which pretraining does not need
            config = copy.deepcopy(config)
            config.update({"text_config": None, "excludes_language_model": False})
            self.config = config
        self.model = VlmBlip2Model(config)
        self.similarity = VlmBlip2Similarity(config)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        if self.writes:
            self.lm_head = VlmBlipLMHead(qformer)
            self._tied_weights_keys = {"lm_head.decoder.weight": "model.qformer.embeddings.word_embedding.weight"}
        self.post_init()
        self.freeze_parts()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VlmBlip2Similarity):
            init.constant_(module.temperature, module.config.temperature_init_value)
        elif isinstance(module, VlmBlipLMHead):
            init.zeros_(module.decoder.bias)

    def freeze_parts(self) -> None:
        """Also freezes parameters that only losses of weight 0 depend on."""
        super().freeze_parts()
        unused: list[nn.Module] = [] if self.config.itm_weight else [self.itm_head]
        if self.writes and not self.config.lm_weight:
            unused += [self.lm_head.dense, self.lm_head.norm]
            freeze(self.lm_head.decoder.bias)  # the weight is the word embedding
        freeze(*unused)

    @classmethod
    def from_parts(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        image_size: int | None = None,
        dropout: float | None = None,
        num_query_tokens: int = 32,
        cross_attention_frequency: int = 2,
        **config_kwargs,
    ) -> "VlmBlip2ForPreTraining":
        """Builds the head on a pretrained image tower and a BERT (section 3.1); all other weights are new.

        Args:
            vision: Hub id, folder or instance of a vision encoder, or of a model with a vision tower; copied.
            text: The same for a BERT; the Q-Former is initialised from its weights.
            vision_kwargs: `from_pretrained` options of the vision tower (`dtype`, `device_map`, `revision`).
            text_kwargs: The same for the BERT.
            image_size: Side of the images in pixels; None keeps the tower's. See `resize_tower`.
            dropout: All dropout probabilities of the Q-Former; None keeps the BERT's.
            num_query_tokens: Number of queries.
            cross_attention_frequency: Every n-th layer, starting with the first, attends to the image.
            **config_kwargs: Fields of [`VlmBlip2Config`].

        Raises:
            ValueError: if `text` is not a BERT, or a tower of transformers has another image size.
        """
        tower = copy_vision_tower(vision, vision_kwargs, image_size)
        bert = load_tower(text, "text", text_kwargs or {})
        fields = {"num_query_tokens": num_query_tokens, "cross_attention_frequency": cross_attention_frequency}
        qformer = bert_qformer_config(bert.config, tower.config.hidden_size, dropout, **fields)
        parts = {"vision_config": config_without_path(tower), "qformer_config": qformer}
        head = cls(VlmBlip2Config(**{**parts, **config_kwargs}))
        head.model.vision_model = tower
        copy_bert_to_qformer(head.model.qformer, bert)
        head.freeze_parts()
        return head

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: L2-normalised `(I, Q, E)`, one per query; `last_hidden_state`: queries `(I, Q, H)`."""
        states = self.model.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
        with recording(kwargs, qformer=self.model.qformer) as recorded:
            queries = self.model.read_images(states)
        embeds = self.similarity.embed_queries(queries)
        return BaseModelOutputWithPooling(
            last_hidden_state=queries, pooler_output=embeds, **states_of(recorded.get("qformer"))
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: L2-normalised embeddings `(B, E)` of texts as the tokenizer returns them."""
        output = self.model.qformer(None, input_ids, attention_mask, keep=1, return_dict=True, **requested(kwargs))
        states = output.last_hidden_state
        embeds = self.similarity.embed_texts(states)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=embeds, **states_of(output))

    def project_memory(self, states: torch.Tensor) -> QFormerKeyValues:
        """Projects normalised patch states `(I, P, width)` to the images' keys and values for `match`."""
        return self.model.qformer.project_memory(states)

    def match(
        self,
        memory: QFormerKeyValues,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `(B, 2)` of no match and match, of texts with the images of `project_memory`."""
        keep = self.config.qformer_config.num_query_tokens
        queries = self.model.qformer(memory, input_ids, attention_mask, memory_index, keep=keep).last_hidden_state
        return self.itm_head(cast_for(self.itm_head, queries)).mean(dim=1)

    def _contrast(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, positives: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Section 3.2, ITC: the logits `(B, G)` of both directions, and the loss."""
        per_image = self.similarity(image_embeds, gather_with_grad(text_embeds).detach())
        per_text = self.similarity(gather_with_grad(image_embeds).detach(), text_embeds).T
        smoothing = self.config.label_smoothing
        targets = (1 - smoothing) * positives / positives.sum(dim=-1, keepdim=True) + smoothing / positives.shape[1]
        return per_image, per_text, contrastive_pair_loss(per_image, per_text, targets, targets)

    def _match_pairs(
        self,
        states: torch.Tensor,
        memory: QFormerKeyValues,
        negatives: HardNegatives,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Section 3.2, ITM: the logits `(3 B, 2)`, and the loss's sum and count."""
        batch, qformer = len(states), self.model.qformer
        own = torch.arange(batch, device=states.device)
        pool, image_places = fetch_rows(states, negatives.images)
        if len(pool) > batch:
            fetched = qformer.project_memory(pool[batch:])
            pairs = zip(memory, fetched, strict=True)
            memory = tuple(a and (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs)
        texts = matching_texts(input_ids, attention_mask, negatives.texts, qformer.config.pad_token_id)
        logits = self.match(memory, *texts, torch.cat([own, image_places, own]))
        return logits, matching_part(logits, negatives.exists)

    def write(self, query_states: QueryStates, input_ids, attention_mask, labels) -> torch.Tensor:
        """Section 3.2, ITG: sum and count `(2,)` of the loss of texts generated after the queries."""
        qformer = self.model.qformer
        input_ids = with_first_token(input_ids, qformer.config.bos_token_id)
        states = qformer(None, input_ids, attention_mask, prefix=query_states).last_hidden_state
        return language_modeling_part(states, labels, self.lm_head, self.config.label_smoothing)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pair_ids: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        sample_seed: int | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VlmBlip2Output:
        """Compares images with texts; with `return_loss`, computes the objectives of non-zero weight.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, channels, height, width)`): The images.
            input_ids (`torch.LongTensor` of shape `(B, L)`): Texts as the tokenizer returns them, `[CLS]` first and
                padded on the right; row i belongs to image i. `[DEC]` is inserted here.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
            labels (`torch.LongTensor` of shape `(B, L)`): Token ids to learn, -100 elsewhere; by default all
                unpadded ones.
            pair_ids (`torch.LongTensor` of shape `(B,)`): Pairs of equal id are positives of each other.
            vision_features (`torch.FloatTensor` of shape `(B, P, width)`): The tower's output instead of images.
            sample_seed: Seed of the hard negatives; must be the same on all ranks.
            interpolate_pos_encoding: Accept images of another size than the tower's.
            return_loss: Whether to compute the losses; otherwise only matching logits and embeddings are computed.
            **kwargs: `output_hidden_states` and `output_attentions`: record them in the image tower and of the texts.

        Raises:
            ValueError: if images or texts are missing, or if their numbers differ with `return_loss`.
        """
        input_ids = require_input_ids(input_ids)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with recording(kwargs, vision_model_output=self.model.vision_model) as recorded:
            states = self.model.encode_images(pixel_values, vision_features, interpolate_pos_encoding)
        memory = self.model.qformer.project_memory(states)
        queries = self.model.qformer(memory)
        image_embeds = self.similarity.embed_queries(queries.last_hidden_state)
        texts = self.get_text_features(input_ids, attention_mask, return_dict=True, **requested(kwargs))
        text_embeds = texts.pooler_output
        output = VlmBlip2Output(
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            query_output=queries.last_hidden_state,
            text_model_output=texts if requested(kwargs) else None,
            vision_model_output=recorded.get("vision_model_output"),
        )
        if not return_loss:
            output.itm_logits = self.match(memory, input_ids, attention_mask)
            return output
        check_pairs(len(states), len(input_ids))
        positives = positive_pairs(pair_ids, len(states), states.device)
        per_image, per_text, output.loss_itc = self._contrast(image_embeds, text_embeds, positives)
        output.logits_per_image, output.logits_per_text = per_image, per_text
        parts = {"itc": with_count(output.loss_itc, len(states))}
        if self.config.itm_weight:
            negatives = draw_hard_negatives(per_image, per_text, positives, sample_seed)
            output.itm_logits, parts["itm"] = self._match_pairs(states, memory, negatives, input_ids, attention_mask)
            output.loss_itm = mean_of(parts["itm"])
        if self.config.lm_weight and self.writes:
            labels = unpadded_labels(input_ids, attention_mask) if labels is None else labels
            parts["lm"] = self.write(queries.query_states, input_ids, attention_mask, labels)
            output.loss_lm = mean_of(parts["lm"])
        output.parts = parts
        losses = {"itc": output.loss_itc, "itm": output.loss_itm, "lm": output.loss_lm}
        output.loss = total_loss(losses, self.config.loss_weights)
        return output


class VlmBlip2ForImageTextRetrieval(VlmBlip2ForPreTraining):
    """Image-text retrieval in both directions: ranking by embeddings (ITC), then re-ranking by matching (ITM).

    Example:
        ```python
        >>> model = VlmBlip2ForImageTextRetrieval.from_pretrained("org/blip2-small")
        >>> image_embeds = model.get_image_features(pixel_values).pooler_output
        >>> text_embeds = model.get_text_features(input_ids, attention_mask).pooler_output
        >>> similarities = model.similarity(image_embeds, text_embeds)
        ```
    """

    writes = False


__all__ = ["VlmBlip2ForImageTextRetrieval", "VlmBlip2ForPreTraining", "VlmBlip2Output"]
