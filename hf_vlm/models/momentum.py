"""Momentum encoders and the queue of their features (MoCo, arXiv 1911.05722; ALBEF, arXiv 2107.07651).

- Neither is part of a model's weights: both are created from the weights when training first needs them, and only
  resume checkpoints contain them.
- `forward` does not change them: the trainer updates the averages before the first micro-batch of a step and the queue
  after the last.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from .casting import is_packed
from .distributed import gather_with_grad
from .freezing import freeze


class FeatureQueue(nn.Module):
    """The image and text embeddings of the latest pairs of all ranks, and the pairs' ids.

    Args:
        size: Capacity in pairs.
        dim: Size of an embedding.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.size = size
        self.images = nn.Buffer(torch.zeros(size, dim))
        self.texts = nn.Buffer(torch.zeros(size, dim))
        self.ids = nn.Buffer(torch.zeros(size, dtype=torch.long))
        self.end = nn.Buffer(torch.zeros((), dtype=torch.long))  # index of the next free row
        self.count = nn.Buffer(torch.zeros((), dtype=torch.long))  # number of filled rows

    def filled(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The filled rows: images and texts `(count, dim)` and ids `(count,)`."""
        count = int(self.count)
        return self.images[:count], self.texts[:count], self.ids[:count]

    @torch.no_grad()
    def add(self, images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor) -> None:
        """Replaces the oldest rows by any number of new ones."""
        if self.size == 0:
            return
        images, texts, ids = images[-self.size :], texts[-self.size :], ids[-self.size :]
        places = (self.end + torch.arange(len(ids), device=self.ids.device)) % self.size
        self.images[places], self.texts[places], self.ids[places] = images.float(), texts.float(), ids
        self.end.copy_((self.end + len(ids)) % self.size)
        self.count.add_(len(ids)).clamp_(max=self.size)


class MomentumEncoders(nn.Module):
    """Exponential moving averages of modules, and the queue of the features that the averages computed.

    Args:
        modules: The modules to average, by name; the copies are frozen and in eval mode.
        decay: Share of the old average that an update keeps.
        queue: The queue that [`enqueue`] fills.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float, queue: FeatureQueue):
        super().__init__()
        self.encoders = nn.ModuleDict({name: copy.deepcopy(module) for name, module in modules.items()})
        freeze(self.encoders)
        self.decay = decay
        self.queue = queue
        self.waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module]) -> None:
        """Moves the averages towards the current weights."""
        for name, module in modules.items():
            averages = {key: p for key, p in self.encoders[name].named_parameters() if not is_packed(p)}
            weights = dict(module.named_parameters())
            current = [weights[key].to(average.dtype) for key, average in averages.items()]
            torch._foreach_lerp_(list(averages.values()), current, 1 - self.decay)

    def keep(self, images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor) -> None:
        """Stores a micro-batch's features for [`enqueue`]; at most the latest `queue.size` rows and one batch wait."""
        rows = sum(len(kept[2]) for kept in self.waiting)
        while self.waiting and rows > self.queue.size:
            rows -= len(self.waiting.pop(0)[2])
        self.waiting.append((images.detach(), texts.detach(), ids))

    def enqueue(self) -> None:
        """Adds to the queue the features of all ranks' micro-batches since the last call."""
        if self.waiting:
            images, texts, ids = (gather_with_grad(torch.cat(kept)) for kept in zip(*self.waiting, strict=True))
            self.queue.add(images, texts, ids)
        self.waiting.clear()


__all__ = ["FeatureQueue", "MomentumEncoders"]
