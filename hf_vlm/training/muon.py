"""Muon for the matrices of transformer layers, AdamW for everything else, as one optimiser.

Muon (Jordan, 2024; arXiv 2502.16982 for its scaling to AdamW's step size) replaces the momentum of a matrix by the
nearest orthogonal matrix, so that all directions get the same step size. All other parameters (embeddings, output
projections, gains, biases) use AdamW.
"""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix in a list of layers (`layers.3.mlp.fc1.weight`, `encoder.layer.0...`)."""
    return parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))


class MuonAdamW(Optimizer):
    """Muon and AdamW as one optimiser, as the Trainer, its schedule and its checkpoints need it.

    Args:
        named_parameters: Trainable parameters by name.
        muon_learning_rate: Learning rate of the layers' matrices, scaled so that a step's root mean square is AdamW's.
        learning_rate: Learning rate of everything else.
        weight_decay: Weight decay of parameters with two or more dimensions; 0 for all others.
        betas: Betas of AdamW.
        eps: Epsilon of AdamW.
    """

    def __init__(
        self,
        named_parameters: dict[str, nn.Parameter],
        muon_learning_rate: float,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ):
        matrices = [p for name, p in named_parameters.items() if is_layer_matrix(name, p)]
        others = [p for name, p in named_parameters.items() if not is_layer_matrix(name, p)]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        muon = Muon(matrices, muon_learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, AdamW(groups, learning_rate, betas, eps, fused=True))
        super().__init__([*matrices, *others], {})
        self._share()

    def _share(self) -> None:
        # The same dicts: a schedule that sets a learning rate here sets it in both optimisers.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """Steps both optimisers; a closure is not supported."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers."""
        return {"state": {}, "param_groups": [], "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


__all__ = ["MuonAdamW"]
