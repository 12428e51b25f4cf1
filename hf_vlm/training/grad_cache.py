"""GradCache: exact gradients of a large contrastive batch in the memory of a small one (arXiv 2101.06983).

1. Embed the batch chunk by chunk without gradients, keeping each chunk's RNG state.
2. Compute the loss of all embeddings; its gradients with respect to the embeddings are the cache.
3. Embed each chunk again, with the same RNG state and with gradients, and back-propagate its part of the cache.

Unlike gradient accumulation, every pair of the batch is compared with every other.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch.nn.parallel import DistributedDataParallel

from ..models.modeling_clip import VlmClipModel

Batch = dict[str, torch.Tensor]


class RandomState:
    """The RNG state when this object is created, to replay later: both passes must draw the same dropout masks."""

    def __init__(self, device: torch.device):
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Runs the body from the kept state, then restores the current one."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def split_batch(batch: Batch, chunk_size: int) -> list[Batch]:
    """Splits every tensor of the batch into chunks of `chunk_size` rows, as views."""
    size = len(next(iter(batch.values())))
    starts = range(0, size, chunk_size)
    return [{name: tensor[i : i + chunk_size] for name, tensor in batch.items()} for i in starts]


def grad_cache_backward(
    model: VlmClipModel | DistributedDataParallel,
    batch: Batch,
    chunk_size: int,
    backward: Callable[[torch.Tensor], None],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> torch.Tensor:
    """Adds the gradients of the whole batch's contrastive loss to the model's parameters.

    Args:
        model: A [`VlmClipModel`], or one wrapped in `DistributedDataParallel`.
        batch: Its inputs; `pair_ids` are used by the loss only.
        chunk_size: Rows per chunk; affects memory, not results.
        backward: Runs the backward pass of a scalar (an accelerator's, or `torch.Tensor.backward`).
        autocast: Returns the context manager in which embeddings are computed.

    Returns:
        `torch.Tensor` of shape `()`: the loss.
    """
    wrapped = isinstance(model, DistributedDataParallel)
    core = cast(VlmClipModel, model.module if wrapped else model)
    pair_ids = batch.get("pair_ids")
    chunks = split_batch({name: tensor for name, tensor in batch.items() if name != "pair_ids"}, chunk_size)

    # Allocated first: small tensors between the chunks' large buffers would fragment the heap.
    size = sum(len(next(iter(chunk.values()))) for chunk in chunks)
    image_embeds = torch.empty(size, core.config.projection_dim, device=core.device, requires_grad=True)
    text_embeds = torch.empty_like(image_embeds, requires_grad=True)
    states = []
    for i, chunk in enumerate(chunks):
        states.append(RandomState(core.device))
        with torch.no_grad(), autocast():
            outputs = core(**chunk)
            rows = slice(i * chunk_size, (i + 1) * chunk_size)
            image_embeds[rows], text_embeds[rows] = outputs.image_embeds, outputs.text_embeds

    # The gradients of logit scale and bias are part of the last chunk's backward pass: DDP synchronises only that one,
    # and must see every parameter in it.
    head = core.similarity
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    loss = head.loss(image_embeds, text_embeds, pair_ids)
    cache = torch.autograd.grad(loss, [image_embeds, text_embeds, *parameters])
    image_grads, text_grads = cache[0].split(chunk_size), cache[1].split(chunk_size)

    for i, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        is_last = i == len(chunks) - 1
        no_sync = model.no_sync() if wrapped and not is_last else contextlib.nullcontext()
        with no_sync:
            with state.replay(), autocast():
                outputs = model(**chunk)
            surrogate = (outputs.image_embeds * image_grads[i]).sum() + (outputs.text_embeds * text_grads[i]).sum()
            if is_last:
                surrogate = surrogate + sum(
                    (parameter * grad).sum() for parameter, grad in zip(parameters, cache[2:], strict=True)
                )
            backward(surrogate)
    return loss.detach()


__all__ = ["grad_cache_backward"]
