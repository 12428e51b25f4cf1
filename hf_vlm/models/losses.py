"""Losses as pure functions: embeddings, similarities or hidden states in, scalar out.

- The batch is the *global* one: every rank compares its own rows with the columns of all ranks ("local loss" of
  open_clip), so memory is O(local x global), and averaging the ranks' gradients gives exactly one process's gradient.
- Pairs with equal ids are positives of each other: a caption that fits two images of the batch is not a negative.
- Large batches are computed in blocks of rows that are recomputed in the backward pass, so no full matrix is stored.

Shapes: B local rows, G = ranks x B global rows, E embedding size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .distributed import gather_with_grad, rank, world_size

ROWS_PER_BLOCK = 128


def positive_pairs(pair_ids: torch.Tensor | None, num_rows: int, device: torch.device) -> torch.Tensor:
    """The positives among all pairs, `(B, G)`: equal ids, or without ids only each row's own pair."""
    if pair_ids is None:
        own = torch.arange(num_rows, device=device) + rank() * num_rows
        return own[:, None] == torch.arange(num_rows * world_size(), device=device)
    return pair_ids[:, None] == gather_with_grad(pair_ids)


def _softmax_block(rows, columns, logit_scale, logit_bias, positives):
    """Sum over rows of the cross-entropy against the mean over each row's positives."""
    logits = (logit_scale * rows @ columns.T).float()
    # logsumexp avoids a matrix of probabilities and one of targets.
    positive_logits = torch.where(positives, logits, 0.0).sum(dim=-1) / positives.sum(dim=-1)
    return (logits.logsumexp(dim=-1) - positive_logits).sum()


def _sigmoid_block(rows, columns, logit_scale, logit_bias, positives):
    """Sum over all pairs of the binary cross-entropy."""
    logits = (logit_scale * rows @ columns.T).float() + logit_bias
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum()


def _sum_over_blocks(block_loss, rows, columns, logit_scale, logit_bias, positives) -> torch.Tensor:
    if len(rows) <= ROWS_PER_BLOCK:
        return block_loss(rows, columns, logit_scale, logit_bias, positives)
    blocks = zip(rows.split(ROWS_PER_BLOCK), positives.split(ROWS_PER_BLOCK), strict=True)
    return sum(
        checkpoint(block_loss, block, columns, logit_scale, logit_bias, block_positives, use_reentrant=False)
        for block, block_positives in blocks
    )


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    pair_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric softmax loss over the global batch (CLIP, arXiv 2103.00020, figure 3).

    Args:
        image_embeds (`torch.Tensor` of shape `(B, E)`): L2-normalised image embeddings of this rank.
        text_embeds (`torch.Tensor` of shape `(B, E)`): L2-normalised text embeddings of this rank.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`): Factor on the similarities: the inverse temperature, not
            its log.
        pair_ids (`torch.LongTensor` of shape `(B,)`, *optional*): Pairs of equal id are positives of each other; the
            target is uniform over a row's positives.

    Returns:
        `torch.Tensor` of shape `()`: the mean over this rank's rows; the mean over ranks is the global loss.

    Example:
        ```python
        >>> images, texts = torch.eye(3), torch.eye(3)
        >>> round(contrastive_loss(images, texts, torch.tensor(10.0)).item(), 4)
        0.0001
        ```
    """
    positives = positive_pairs(pair_ids, len(image_embeds), image_embeds.device)
    all_images, all_texts = gather_with_grad(image_embeds), gather_with_grad(text_embeds)
    images = _sum_over_blocks(_softmax_block, image_embeds, all_texts, logit_scale, None, positives)
    texts = _sum_over_blocks(_softmax_block, text_embeds, all_images, logit_scale, None, positives)
    return (images + texts) / (2 * len(image_embeds))


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    pair_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pairwise sigmoid loss over the global batch (SigLIP, arXiv 2303.15343, equation 1).

    Args:
        image_embeds (`torch.Tensor` of shape `(B, E)`): L2-normalised image embeddings of this rank.
        text_embeds (`torch.Tensor` of shape `(B, E)`): L2-normalised text embeddings of this rank.
        logit_scale (`torch.Tensor` of shape `()` or `(1,)`): Factor on the similarities.
        logit_bias (`torch.Tensor` of shape `()` or `(1,)`): Added to the scaled similarities.
        pair_ids (`torch.LongTensor` of shape `(B,)`, *optional*): Pairs of equal id are positives of each other.

    Returns:
        `torch.Tensor` of shape `()`: the sum over pairs divided by this rank's rows; the mean over ranks is the global
        loss.

    Example:
        ```python
        >>> images, texts = torch.eye(3), torch.eye(3)
        >>> round(sigmoid_loss(images, texts, torch.tensor(10.0), torch.tensor(-5.0)).item(), 4)
        0.0201
        ```
    """
    positives = positive_pairs(pair_ids, len(image_embeds), image_embeds.device)
    all_texts = gather_with_grad(text_embeds)
    return _sum_over_blocks(_sigmoid_block, image_embeds, all_texts, logit_scale, logit_bias, positives) / len(
        image_embeds
    )


def soft_contrastive_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against soft targets (BLIP, arXiv 2201.12086, section 3.2, after ALBEF, arXiv 2107.07651).

    Args:
        logits (`torch.Tensor` of shape `(B, candidates)`): Similarities divided by the temperature.
        targets (`torch.Tensor` of shape `(B, candidates)`): One distribution per row.

    Returns:
        `torch.Tensor` of shape `()`: the mean over rows.

    Example:
        ```python
        >>> round(soft_contrastive_loss(torch.zeros(2, 4), torch.full((2, 4), 0.25)).item(), 4)
        1.3863
        ```
    """
    return -(logits.log_softmax(dim=-1) * targets).sum(dim=-1).mean()


@torch.no_grad()
def sample_negatives(
    logits: torch.Tensor, positives: torch.Tensor, seed: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one hard negative for each row; more similar candidates are more likely.

    With a seed, row i of the global batch gets the same negative for any number of ranks.

    Args:
        logits (`torch.Tensor` of shape `(B, G)`): Similarities of this rank's rows to all ranks' candidates.
        positives (`torch.BoolTensor` of shape `(B, G)`): Candidates that must not be drawn.
        seed: Seed of the draw, the same on all ranks; None uses the process's own generator.

    Returns:
        `torch.LongTensor` of shape `(B,)`, global indices; and `torch.BoolTensor` of shape `(B,)`, False where there is
        no negative (a batch of one pair, or of positives only).

    Example:
        ```python
        >>> negatives, exists = sample_negatives(torch.zeros(2, 2), torch.eye(2, dtype=torch.bool))
        >>> negatives.tolist(), exists.tolist()
        ([1, 0], [True, True])
        ```
    """
    rows, candidates = logits.shape
    weights = (logits.float().softmax(dim=-1) + 1e-4).masked_fill(positives, 0.0)
    if seed is None:
        uniform = torch.rand(rows, device=logits.device)
    else:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(rows * world_size(), generator=generator)[rank() * rows :][:rows].to(logits.device)
    cumulative = weights.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    # Rounding may select an index past the last candidate, or a candidate of weight zero.
    last = candidates - 1 - (weights > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(drawn, last), (weights > 0).any(dim=-1)


def language_modeling_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    label_smoothing: float = 0.0,
    row_weights: torch.Tensor | None = None,
    tokens_per_block: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy; logits are computed at supervised positions only, one block at a time.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, H)`): Hidden states of the last layer.
        labels (`torch.LongTensor` of shape `(B, L)`): Token ids at the positions of the inputs, -100 at unsupervised
            positions. They are shifted here.
        head: Computes logits `(tokens, vocabulary)` from states `(tokens, H)`.
        label_smoothing: Share of the target spread evenly over the vocabulary.
        row_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factor on each row's loss.
        tokens_per_block: The logits of more tokens than this are recomputed in the backward pass.

    Returns:
        The sum over supervised tokens and their number, both `torch.Tensor` of shape `()`. If nothing is supervised,
        the sum is 0 and still differentiable.

    Example:
        ```python
        >>> states, head = torch.zeros(1, 3, 8), torch.nn.Linear(8, 4, bias=False)
        >>> total, count = language_modeling_loss(states, torch.tensor([[0, 1, -100]]), head)
        >>> round(total.item(), 4), count.item()
        (1.3863, 1)
        ```
    """
    targets = labels[:, 1:]
    supervised = targets != -100
    states, targets = hidden_states[:, :-1][supervised], targets[supervised]
    weights = (
        torch.ones_like(labels[:, 1:], dtype=torch.float32) if row_weights is None else row_weights[:, None].float()
    )
    weights = weights.expand(supervised.shape)[supervised]

    def block_loss(states, targets, weights):
        return (token_cross_entropy(head(states), targets, label_smoothing) * weights).sum()

    if len(targets) <= tokens_per_block:
        return block_loss(states, targets, weights), supervised.sum()
    blocks = zip(*(tensor.split(tokens_per_block) for tensor in (states, targets, weights)), strict=True)
    total = sum(checkpoint(block_loss, *block, use_reentrant=False) for block in blocks)
    return total, supervised.sum()


LOGITS_PER_BLOCK = 2**22  # 16 MB in float32


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each token, equal to PyTorch's for float32 logits. It can be differentiated once.

    The backward pass recomputes the probabilities, so that only the logits are kept in memory.

    Args:
        logits (`torch.Tensor` of shape `(tokens, vocabulary)`): Logits of any floating-point type.
        targets (`torch.LongTensor` of shape `(tokens,)`): Indices into the vocabulary.
        label_smoothing: Share of the target spread evenly over the vocabulary.

    Returns:
        `torch.FloatTensor` of shape `(tokens,)`.

    Raises:
        RuntimeError: if a target is outside the vocabulary; `ignore_index` is not supported.
    """
    return _TokenCrossEntropy.apply(logits, targets, label_smoothing)


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        losses = logits.new_empty(len(targets), dtype=torch.float32)
        for rows in _blocks(logits):
            block = logits[rows].float().log_softmax(dim=-1)
            losses[rows] = block.gather(1, targets[rows, None])[:, 0].mul_(label_smoothing - 1)
            if label_smoothing:
                losses[rows] -= label_smoothing * block.mean(dim=-1)
        ctx.save_for_backward(logits, targets)
        ctx.label_smoothing = label_smoothing
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _blocks(logits):
            block = logits[rows].float().softmax(dim=-1)
            if ctx.label_smoothing:
                block -= ctx.label_smoothing / block.shape[1]
            block.scatter_add_(1, targets[rows, None], block.new_full((len(block), 1), ctx.label_smoothing - 1))
            result[rows] = block.mul_(gradient[rows, None])
        return result, None, None


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    size = max(1, LOGITS_PER_BLOCK // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


__all__ = [
    "contrastive_loss",
    "language_modeling_loss",
    "positive_pairs",
    "sample_negatives",
    "sigmoid_loss",
    "soft_contrastive_loss",
    "token_cross_entropy",
]
