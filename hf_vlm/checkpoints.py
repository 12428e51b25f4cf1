"""Checkpoints that are complete: a model for inference has the weights of its file and none that were made up.

transformers initialises missing weights anew and only logs a warning. The numbers of such a model mean nothing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

NUM_SHOWN = 3


def check_keys(
    source: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (), mismatched: Sequence[str] = ()
) -> None:
    """Raises if weights do not fit a model.

    Raises:
        ValueError: if any list is not empty; one line with the first few names of each kind.
    """
    problems = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", mismatched)):
        if names:
            more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
            problems.append(f"{kind}: {', '.join(sorted(names)[:NUM_SHOWN])}{more}")
    if problems:
        raise ValueError(f"The weights of {source} do not match the model; {'; '.join(problems)}.")


def load_complete(
    model_class: Any, path: str | Path, part: str = "", unread: tuple[str, ...] = (), **options: Any
) -> PreTrainedModel:
    """`from_pretrained` that accepts only a checkpoint with exactly the weights of the model.

    Tied weights and buffers that are not saved are not missing.

    Args:
        model_class: A model class or an Auto class.
        path: Folder or Hub id.
        part: Check only the weights whose name begins with this, such as `"vision_model."`.
        unread: Beginnings of names of weights that the caller does not use; they may be missing or left over.
        options: Options of `from_pretrained`.

    Raises:
        ValueError: if weights are missing, unexpected or of another shape; one line with the first few names.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = model_class.from_pretrained(path, **options)
    mismatched = {
        name: f"{name} {tuple(found)} instead of {tuple(expected)}" for name, found, expected in info["mismatched_keys"]
    }

    def checked(names: Iterable[str]) -> list[str]:
        return [name for name in names if name.startswith(part) and not name.startswith(unread)]

    missing = checked(set(info["missing_keys"]) - set(mismatched))
    check_keys(str(path), missing, checked(info["unexpected_keys"]), [mismatched[name] for name in checked(mismatched)])
    return model


__all__ = ["check_keys", "load_complete"]
