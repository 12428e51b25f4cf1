"""The pretraining objectives that BLIP and BLIP-2 share: contrast (ITC), matching (ITM) and language modelling (LM).

- Each objective gives a sum and a count, `(2,)`: a trainer divides the sum by the count of all ranks.
- Candidates and hard negatives come from all ranks; a negative from another rank is the only row that is sent.
- `total_loss` is the one place where several losses become one. Models and trainers call it.

Papers: BLIP (arXiv 2201.12086, section 3.2) and BLIP-2 (arXiv 2301.12597, section 3.2).

Shapes: B pairs of this rank, G = ranks x B pairs, L tokens, H hidden size, E shared embedding size.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .distributed import gather_texts, rank
from .losses import language_modeling_loss, sample_negatives, soft_contrastive_loss


class VlmSimilarity(nn.Module):
    """The projections into the shared embedding space, and the temperature.

    Args:
        config: A config with `projection_dim`, `temperature_init_value`, `min_temperature` and `max_temperature`.
        vision_size: Size of the image states that are projected.
        text_size: Size of the text states that are projected.
    """

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__()
        self.config = config
        self.vision_proj = nn.Linear(vision_size, config.projection_dim)
        self.text_proj = nn.Linear(text_size, config.projection_dim)
        # One dimension, because FSDP2 does not shard scalars.
        self.temperature = nn.Parameter(torch.empty(1))

    def embed_texts(self, states: torch.Tensor) -> torch.Tensor:
        """L2-normalised embeddings `(B, E)` of the first token of text states `(B, L, H)`."""
        return F.normalize(self.text_proj(states[:, 0]).float(), dim=-1)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the temperature within the config's bounds; the trainer calls it after each step."""
        self.temperature.clamp_(self.config.min_temperature, self.config.max_temperature)


class HardNegatives(NamedTuple):
    """One negative image for each text and one negative text for each image.

    Args:
        images (`torch.LongTensor` of shape `(B,)`): Global index of each text's negative image.
        texts (`torch.LongTensor` of shape `(B,)`): Global index of each image's negative text.
        exists (`torch.BoolTensor` of shape `(3 B,)`): True for the pairs, then whether each negative exists.
    """

    images: torch.Tensor
    texts: torch.Tensor
    exists: torch.Tensor


def draw_hard_negatives(
    logits_per_image: torch.Tensor, logits_per_text: torch.Tensor, positives: torch.Tensor, seed: int | None
) -> HardNegatives:
    """Draws hard negatives in both directions; see `sample_negatives`.

    Args:
        logits_per_image (`torch.Tensor` of shape `(B, G)`): Similarities of this rank's images to all texts.
        logits_per_text (`torch.Tensor` of shape `(B, G)`): Similarities of this rank's texts to all images.
        positives (`torch.BoolTensor` of shape `(B, G)`): The pairs that are not negatives.
        seed: Seed of the first draw; the second uses the next one. None uses the process's own generator.
    """
    images, has_image = sample_negatives(logits_per_text, positives, seed)
    texts, has_text = sample_negatives(logits_per_image, positives, None if seed is None else seed + 1)
    return HardNegatives(images, texts, torch.cat([torch.ones_like(has_image), has_image, has_text]))


def contrastive_pair_loss(
    logits_per_image: torch.Tensor,
    logits_per_text: torch.Tensor,
    targets_per_image: torch.Tensor,
    targets_per_text: torch.Tensor,
) -> torch.Tensor:
    """The contrastive loss (ITC): the mean of both directions' cross-entropy against soft targets.

    Args:
        logits_per_image (`torch.Tensor` of shape `(B, candidates)`): Similarities divided by the temperature.
        logits_per_text (`torch.Tensor` of shape `(B, candidates)`): The same for the texts.
        targets_per_image (`torch.Tensor` of shape `(B, candidates)`): One distribution per row.
        targets_per_text (`torch.Tensor` of shape `(B, candidates)`): The same for the texts.
    """
    of_images = soft_contrastive_loss(logits_per_image, targets_per_image)
    return (of_images + soft_contrastive_loss(logits_per_text, targets_per_text)) / 2


def matching_texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, negative_texts: torch.Tensor, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The texts of a matching pass, each with its mask: `(3 B, longest L of any rank)`.

    The pairs come first, then the same texts for negative images, then the negative texts.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Texts of this rank.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
        negative_texts (`torch.LongTensor` of shape `(B,)`): Global index of each image's negative text.
        pad_token_id: Id of the padding token.
    """
    batch = len(input_ids)
    all_ids, all_masks = gather_texts(input_ids, attention_mask, pad_token_id)
    own_ids, own_masks = all_ids[rank() * batch :][:batch], all_masks[rank() * batch :][:batch]
    ids = torch.cat([own_ids, own_ids, all_ids[negative_texts]])
    return ids, torch.cat([own_masks, own_masks, all_masks[negative_texts]])


def matching_part(itm_logits: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Sum and count, `(2,)`, of the matching loss (ITM).

    Args:
        itm_logits (`torch.Tensor` of shape `(3 B, 2)`): Logits of no match and match, in the order of
            `matching_texts`.
        exists (`torch.BoolTensor` of shape `(3 B,)`): False for rows without a negative, which are left out.
    """
    labels = (torch.arange(len(exists), device=itm_logits.device) < len(exists) // 3).long()
    losses = F.cross_entropy(itm_logits.float(), labels, reduction="none")
    return torch.stack([(losses * exists).sum(), exists.sum().float()])


def language_modeling_part(
    states: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    label_smoothing: float = 0.0,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum and count, `(2,)`, of the language-modelling loss (LM); arguments as in `language_modeling_loss`."""
    total, count = language_modeling_loss(states, labels, head, label_smoothing, row_weights)
    return torch.stack([total, count.to(total.dtype)])


def unpadded_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Labels that supervise every unpadded token: the token ids, and -100 at padding."""
    return input_ids.masked_fill(attention_mask == 0, -100)


def with_count(loss: torch.Tensor, count: int) -> torch.Tensor:
    """Sum and count, `(2,)`, of a loss that is a mean over `count` rows."""
    return torch.stack([loss * count, loss.new_tensor(count)])


def mean_of(part: torch.Tensor) -> torch.Tensor:
    """The mean of a sum and count `(2,)`; 0 where the count is 0."""
    return part[0] / part[1].clamp(min=1)


def total_loss(losses: Mapping[str, torch.Tensor | None], weights: Mapping[str, float]) -> torch.Tensor:
    """The weighted sum of several losses.

    Args:
        losses: The losses by name (`"itc"`, `"itm"`, `"lm"`); None for one that was not computed.
        weights: The weight of each.

    Raises:
        ValueError: if no loss was computed.

    Example:
        ```python
        >>> total_loss({"itc": torch.tensor(2.0), "itm": None, "lm": torch.tensor(3.0)}, {"itc": 1.0, "lm": 0.5})
        tensor(3.5000)
        ```
    """
    weighted = [weights[name] * loss for name, loss in losses.items() if loss is not None]
    if not weighted:
        raise ValueError(f"The weights of all losses are 0 ({', '.join(losses)}): give one of them a positive weight.")
    return torch.stack(weighted).sum()


def check_pairs(num_images: int, num_texts: int) -> None:
    """Refuses a loss over unequal numbers of images and texts."""
    if num_images != num_texts:
        raise ValueError(f"The loss needs pairs, not {num_images} images and {num_texts} texts.")


__all__ = [
    "HardNegatives",
    "VlmSimilarity",
    "check_pairs",
    "contrastive_pair_loss",
    "draw_hard_negatives",
    "language_modeling_part",
    "matching_part",
    "matching_texts",
    "mean_of",
    "total_loss",
    "unpadded_labels",
    "with_count",
]
