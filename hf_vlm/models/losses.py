"""Losses as pure functions: embeddings in, scalar out.

- The batch is the *global* one: every rank compares its own rows with the columns of all ranks ("local loss" of
  open_clip), so memory is O(local x global), and averaging the ranks' gradients gives exactly one process's gradient.
- Rows with equal ids are positives of each other: a caption that fits two images of the batch is not a negative.
- Rows are taken in blocks that are recomputed in the backward pass, so a batch of many thousands needs no full matrix.

Shapes: B local rows, G = ranks x B global rows, E embedding size.
"""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROWS_PER_BLOCK = 128


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates the ranks' tensors along the first dimension, letting gradients flow back to every rank.

    Args:
        tensor (`torch.Tensor` of shape `(B, ...)`): The same shape on every rank.

    Returns:
        `torch.Tensor` of shape `(G, ...)`; the tensor itself without a process group.
    """
    if world_size() == 1:
        return tensor
    if not tensor.is_floating_point():
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(all_gather(tensor.contiguous()))


def positive_pairs(pair_ids: torch.Tensor | None, num_rows: int, device: torch.device) -> torch.Tensor:
    """Which global columns are positives of which local rows, `(B, G)`: equal ids, or only the own pair without ids."""
    if pair_ids is None:
        own = torch.arange(num_rows, device=device) + rank() * num_rows
        return own[:, None] == torch.arange(num_rows * world_size(), device=device)
    return pair_ids[:, None] == gather_with_grad(pair_ids)


def _softmax_block(rows, columns, logit_scale, logit_bias, positives):
    """Sum over rows of the cross-entropy against the mean over each row's positives."""
    logits = (logit_scale * rows @ columns.T).float()
    # Written with logsumexp, which makes no matrix of probabilities or targets.
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
    """
    positives = positive_pairs(pair_ids, len(image_embeds), image_embeds.device)
    all_texts = gather_with_grad(text_embeds)
    return _sum_over_blocks(_sigmoid_block, image_embeds, all_texts, logit_scale, logit_bias, positives) / len(
        image_embeds
    )


__all__ = ["contrastive_loss", "gather_with_grad", "positive_pairs", "rank", "sigmoid_loss", "world_size"]
