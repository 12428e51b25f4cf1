"""Cross-entropy over a vocabulary in little more memory than its logits.

PyTorch's makes fp32 logits and log-probabilities of all tokens and keeps the latter, then makes two gradients of that
size; where a small LLM has a large vocabulary this is the highest peak of a training step. Here only the logits are
kept, in their own type, and fp32 exists for a block of tokens at a time. Arithmetic is in fp32 all the same.

`F.linear_cross_entropy` would not even make the logits, but takes the bare weights of a head: past its hooks, by which
FSDP and ZeRO-3 gather them, past LoRA, and past the scaling or capping of logits that some LLMs have.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

LOGITS_PER_BLOCK = 2**22  # 16 MB of fp32


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each token, equal to PyTorch's of fp32 logits. It can be differentiated once.

    Args:
        logits (`torch.Tensor` of shape `(tokens, vocabulary)`): Of any floating-point type.
        targets (`torch.LongTensor` of shape `(tokens,)`): Indices of the vocabulary.
        label_smoothing: Share of the target spread evenly over the vocabulary.

    Returns:
        `torch.FloatTensor` of shape `(tokens,)`.

    Raises:
        RuntimeError: if a target is not of the vocabulary; there is no index to ignore.
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


__all__ = ["token_cross_entropy"]
