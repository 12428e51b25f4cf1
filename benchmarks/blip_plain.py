"""A plain implementation of BLIP's pretraining step, for comparison: same modules, weights, negatives and losses.

It does more work than the model itself in two places:

- Matching uses one pass for the pairs and one with twice as many rows for the negatives; language modelling uses a
  third. Each pass projects its own keys and values, one image per row: 4 B projections for B images.
- The last layer computes all tokens even if only the first is read: in the text encoder (except for language
  modelling), in the momentum text encoder and in the momentum image tower.

Captions are given padded to a fixed length. Attention, queue, sampling of negatives and the vocabulary logits (at
supervised positions only) are the model's own.
"""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_vlm import VlmBlipForPreTraining
from hf_vlm.models.bert import with_first_token
from hf_vlm.models.modeling_fusion import ImageKeyValues
from hf_vlm.models.pretraining import matching_part


class PlainBlip(VlmBlipForPreTraining):
    """Computes what [`VlmBlipForPreTraining`] computes, on one rank; see the top of this file."""

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Embeddings of texts, from a last layer over all tokens."""
        states = self.model.text_encoder(input_ids, attention_mask).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.similarity.embed_texts(states))

    @torch.no_grad()
    def _momentum_features(self, pixel_values, vision_features, input_ids, attention_mask, interpolate_pos_encoding):
        encoders = self.momentum.encoders
        if vision_features is None:
            vision_features = encoders["vision_model"](pixel_values=pixel_values).last_hidden_state
        texts = encoders["text_encoder"](input_ids, attention_mask).last_hidden_state
        similarity = encoders["similarity"]
        return similarity.embed_images(vision_features), similarity.embed_texts(texts)

    def _match_pass(self, states: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Matching logits `(rows, 2)` of one pass, with one image `(P, width)` per row."""
        encoder = self.model.text_encoder
        input_ids = with_first_token(input_ids, self.config.text_config.enc_token_id)
        states = encoder(input_ids, attention_mask, encoder.project_memory(states)).last_hidden_state
        return self.itm_head(states[:, 0])

    def _match_pairs(
        self, output, states, input_ids, attention_mask, pair_ids, seed
    ) -> tuple[torch.Tensor, ImageKeyValues]:
        """Fills logits; returns the loss's sum and count, and newly computed keys and values for language modelling."""
        negative_images, negative_texts, exists = self._hard_negatives(output, pair_ids, seed)
        of_pairs = self._match_pass(states, input_ids, attention_mask)
        of_negatives = self._match_pass(
            torch.cat([states[negative_images], states]),
            torch.cat([input_ids, input_ids[negative_texts]]),
            torch.cat([attention_mask, attention_mask[negative_texts]]),
        )
        output.itm_logits = torch.cat([of_pairs, of_negatives])
        return matching_part(output.itm_logits, exists), self.model.text_decoder.project_memory(states)
