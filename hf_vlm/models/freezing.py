"""Frozen parts of a model: no gradients, and eval mode even while the model trains.

- `freeze` turns a module's gradients off. A model's `train()` then leaves the part in eval mode, without dropout.
- `train()` and `eval()` never change `requires_grad`.
- `from_pretrained` of transformers turns the gradients of all weights on; `PartlyFrozenModel` freezes again afterwards.
"""

import torch
from torch import nn

from .quantised import PartlyQuantisedModel


def freeze(*targets: nn.Module | torch.Tensor) -> None:
    """Turns off the gradients of modules or parameters; modules change to eval mode.

    Example:
        ```python
        >>> layer = nn.Linear(2, 2)
        >>> freeze(layer)
        >>> is_frozen(layer)
        True
        ```
    """
    for target in targets:
        target.requires_grad_(False)
        if isinstance(target, nn.Module):
            target.eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of the module is trainable."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def keep_frozen_in_eval(*parts: nn.Module | None) -> None:
    """Sets the frozen parts of a model to eval mode; call it last in the model's `train()`.

    Args:
        parts: Modules; None stands for a part that the model does not have.
    """
    for part in parts:
        if part is not None and is_frozen(part):
            part.eval()


class PartlyFrozenModel(PartlyQuantisedModel):
    """A model that freezes some of its parts: subclasses override `freeze_parts` and call it last in `__init__`."""

    def freeze_parts(self) -> None:
        """Freezes the parts that must not be trained; none by default."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """transformers' `from_pretrained`; parts that are frozen after construction are frozen after loading, too."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        model.freeze_parts()
        return loaded


__all__ = ["PartlyFrozenModel", "freeze", "is_frozen", "keep_frozen_in_eval"]
