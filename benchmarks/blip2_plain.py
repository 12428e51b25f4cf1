"""BLIP-2's first stage the plain way, for comparison: the same modules, weights, negatives and losses, more work.

What it does that the model itself does not, and nothing else:

- Matching has an image a row, 3 B of them for B images, and projects keys and values of each, as LAVIS does; the pass
  of queries alone has projected them before.
- Generation computes the queries again, with keys and values of its own. LAVIS does not: `recomputes_queries = False`.
- The last layer computes every token, also where only queries or only the first token are read, as LAVIS does.

Attention, the sampling of negatives and the vocabulary logits, at supervised positions only, are the model's own.
"""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_vlm import VlmBlip2ForPreTraining
from hf_vlm.models.losses import positive_pairs
from hf_vlm.models.modeling_blip2_pretraining import VlmBlip2Output


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
        """Logits `(B, 2)`; `memory` are the patch states of images, of which every row gets those of its own."""
        memory = self.project_memory(memory[memory_index])
        states = self.model.qformer(memory, input_ids, attention_mask).last_hidden_state
        return self.itm_head(states[:, : self.config.qformer_config.num_query_tokens]).mean(dim=1)

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None, vision_features=None, sample_seed=None):
        """The three losses of pairs."""
        states = self.model.encode_images(pixel_values, vision_features)
        queries = self.model.qformer(self.project_memory(states))
        parts: dict[str, torch.Tensor] = {}
        output = VlmBlip2Output(query_output=queries.last_hidden_state, parts=parts)
        output.image_embeds = self.similarity.embed_queries(queries.last_hidden_state)
        output.text_embeds = self.get_text_features(input_ids, attention_mask).pooler_output
        positives = positive_pairs(None, len(states), states.device)
        self._contrast(output, positives)
        self._match_pairs(output, states, states, input_ids, attention_mask, positives, sample_seed)
        if self.recomputes_queries:
            queries = self.model.qformer(self.project_memory(states))
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        parts["lm"] = self.write(queries.query_states, input_ids, attention_mask, labels)
        output.loss_itm, output.loss_lm = (total / count for total, count in (parts["itm"], parts["lm"]))
        losses = {"itc": output.loss_itc, "itm": output.loss_itm, "lm": output.loss_lm}
        output.loss = torch.stack([self.config.loss_weights[name] * each for name, each in losses.items()]).sum()
        return output
