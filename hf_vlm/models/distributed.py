"""Collectives with gradients; each is a no-op without a process group.

Shapes: B rows of this rank, G = ranks x B rows, L tokens, N requested rows.
"""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates all ranks' tensors along the first dimension; gradients flow back to every rank.

    Args:
        tensor (`torch.Tensor` of shape `(B, ...)`): Must have the same shape on every rank.

    Returns:
        `torch.Tensor` of shape `(G, ...)`; without a process group, the tensor itself.
    """
    if world_size() == 1:
        return tensor
    if not tensor.is_floating_point():
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(all_gather(tensor.contiguous()))


class _Exchange(torch.autograd.Function):
    """Sends rows to every rank and receives rows from every rank, ordered by rank; gradients travel back."""

    @staticmethod
    def forward(ctx, rows, num_sent, num_received):
        ctx.counts = num_sent, num_received
        received = rows.new_empty(sum(num_received), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), num_received, num_sent)
        return received

    @staticmethod
    def backward(ctx, *gradients):
        num_sent, num_received = ctx.counts
        returned = gradients[0].new_empty(sum(num_sent), *gradients[0].shape[1:])
        dist.all_to_all_single(returned, gradients[0].contiguous(), num_sent, num_received)
        return returned, None, None


def fetch_rows(tensor: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fetches the requested rows from other ranks; only these are sent. Gradients flow back to their owners.

    Args:
        tensor (`torch.Tensor` of shape `(B, ...)`): This rank's rows; must have the same shape on every rank.
        index (`torch.LongTensor` of shape `(N,)`): Requested rows of the global batch; the same N on every rank.

    Returns:
        This rank's rows followed by the fetched ones, `(B + fetched, ...)`, and the positions in that tensor of the
        requested rows, `(N,)`. Without a process group, the two arguments.
    """
    if world_size() == 1:
        return tensor, index
    num_rows = len(tensor)
    wanted = gather_with_grad(index).view(world_size(), -1)  # by rank
    owner = wanted // num_rows
    travels = owner != torch.arange(world_size(), device=index.device)[:, None]
    sent = travels & (owner == rank())
    remote, its_owner = travels[rank()], owner[rank()]
    num_received = torch.bincount(its_owner[remote], minlength=world_size()).tolist()
    fetched = _Exchange.apply(tensor[wanted[sent] - rank() * num_rows], sent.sum(dim=1).tolist(), num_received)
    # Rows arrive sorted by owner, and within an owner in the order of the request.
    arrival = its_owner[remote].argsort(stable=True).argsort()
    places = index - rank() * num_rows
    places[remote] = num_rows + arrival
    return torch.cat([tensor, fetched]), places


def gather_texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and masks `(G, L)` of all ranks, padded to the longest text of any rank."""
    longest = int(gather_with_grad(torch.tensor([input_ids.shape[1]], device=input_ids.device)).max())
    padding = (0, longest - input_ids.shape[1])
    input_ids = F.pad(input_ids, padding, value=pad_token_id)
    return gather_with_grad(input_ids), gather_with_grad(F.pad(attention_mask, padding))


__all__ = ["fetch_rows", "gather_texts", "gather_with_grad", "rank", "world_size"]
