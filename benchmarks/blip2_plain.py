"""A plain implementation of BLIP-2's first stage, for comparison: same modules, weights, negatives and losses.

It does more work than the model itself in three places:

- Matching has one image per row (3 B rows for B images) and projects keys and values for each, as in LAVIS. The
  query-only pass has already projected them once.
- Generation computes the queries again, with its own keys and values. LAVIS does not: `recomputes_queries = False`.
- The last layer computes all tokens even if only queries or only the first token are read, as in LAVIS.

Attention, sampling of negatives and the vocabulary logits (at supervised positions only) are the model's own.
"""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_vlm import VlmBlip2ForPreTraining
from hf_vlm.models.losses import positive_pairs
from hf_vlm.models.modeling_blip2_pretraining import VlmBlip2Output
from hf_vlm.models.pretraining import draw_hard_negatives, mean_of, total_loss, unpadded_labels, with_count


class PlainBlip2(VlmBlip2ForPreTraining):
    """Computes what [`VlmBlip2ForPreTraining`] computes, on one rank; see the top of this file."""

    recomputes_queries = True

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Embeddings of texts, from a last layer over all tokens."""
        states = self.model.qformer(None, input_ids, attention_mask).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.similarity.embed_texts(states))

    def match(self, memory, input_ids, attention_mask=None, memory_index=None) -> torch.Tensor:
        """Logits `(B, 2)`; `memory` holds the images' patch states; every row gets its own copy."""
        memory = self.project_memory(memory[memory_index])
        states = self.model.qformer(memory, input_ids, attention_mask).last_hidden_state
        return self.itm_head(states[:, : self.config.qformer_config.num_query_tokens]).mean(dim=1)

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None, vision_features=None, sample_seed=None):
        """The three losses of pairs."""
        states = self.model.encode_images(pixel_values, vision_features)
        queries = self.model.qformer(self.project_memory(states))
        image_embeds = self.similarity.embed_queries(queries.last_hidden_state)
        text_embeds = self.get_text_features(input_ids, attention_mask).pooler_output
        positives = positive_pairs(None, len(states), states.device)
        per_image, per_text, loss_itc = self._contrast(image_embeds, text_embeds, positives)
        parts = {"itc": with_count(loss_itc, len(states))}
        negatives = draw_hard_negatives(per_image, per_text, positives, sample_seed)
        itm_logits, parts["itm"] = self._match_pairs(states, states, negatives, input_ids, attention_mask)
        if self.recomputes_queries:
            queries = self.model.qformer(self.project_memory(states))
        labels = unpadded_labels(input_ids, attention_mask)
        parts["lm"] = self.write(queries.query_states, input_ids, attention_mask, labels)
        losses = {"itc": loss_itc, "itm": mean_of(parts["itm"]), "lm": mean_of(parts["lm"])}
        return VlmBlip2Output(
            loss=total_loss(losses, self.config.loss_weights),
            loss_itc=losses["itc"],
            loss_itm=losses["itm"],
            loss_lm=losses["lm"],
            parts=parts,
            itm_logits=itm_logits,
            logits_per_image=per_image,
            logits_per_text=per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            query_output=queries.last_hidden_state,
        )
