"""Functions on state dicts: translate names, fuse and split projections, read files.

A name table is a tuple of pairs (one name, the other name). A `*` stands for any text, the same on both sides.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ...checkpoints import check_keys

Names = tuple[tuple[str, str], ...]
StateDict = dict[str, torch.Tensor]


def prefixed(prefix: str, other_prefix: str, names: Names) -> Names:
    """The table with a prefix before every name on each side."""
    return tuple((prefix + one, other_prefix + other) for one, other in names)


def flipped(names: Names) -> Names:
    """The table in the other direction."""
    return tuple((other, one) for one, other in names)


def rename(state_dict: Mapping[str, torch.Tensor], names: Names) -> StateDict:
    """The state dict with names translated from left to right; names that match no row are kept."""
    rows = [(re.compile(re.escape(one).replace(r"\*", "(.+)")), other.replace("*", "{}")) for one, other in names]
    renamed = {}
    for name, tensor in state_dict.items():
        matches = ((pattern.fullmatch(name), template) for pattern, template in rows)
        renamed[next((template.format(*match.groups()) for match, template in matches if match), name)] = tensor
    return renamed


def fuse(state_dict: Mapping[str, torch.Tensor], parts: tuple[str, ...], fused: str) -> StateDict:
    """Concatenates `x.q.weight`, `x.k.weight`, `x.v.weight` to `x.qkv.weight`, for `parts=("q", "k", "v")`.

    A tensor is kept unchanged if one of the other tensors to fuse is missing.
    """
    result = dict(state_dict)
    for name in state_dict:
        together = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if together[0] != together[-1] and all(part in state_dict for part in together):
            result[name.replace(f".{parts[0]}.", f".{fused}.")] = torch.cat([result.pop(part) for part in together])
    return result


def split(state_dict: Mapping[str, torch.Tensor], parts: tuple[str, ...], fused: str) -> StateDict:
    """The inverse of [`fuse`]."""
    result = {}
    for name, tensor in state_dict.items():
        if f".{fused}." in name:
            chunks = zip(parts, tensor.chunk(len(parts)), strict=True)
            result.update({name.replace(f".{fused}.", f".{part}."): chunk for part, chunk in chunks})
        else:
            result[name] = tensor
    return result


def check_state_dict(source: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compares names and shapes of two state dicts.

    Raises:
        ValueError: if names or shapes differ; see [`check_keys`].
    """
    mismatched = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape and not found[name].numel() == tensor.numel() == 1
    ]
    check_keys(source, list(expected.keys() - found.keys()), list(found.keys() - expected.keys()), mismatched)


def with_weights(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The model in eval mode with copies of the given weights in their dtypes; scalars take the model's shape."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in state_dict.items()}
    for name, tensor in model.state_dict().items():
        if tensor.numel() == 1 and name in copies:
            copies[name] = copies[name].reshape(tensor.shape)
    model.load_state_dict(copies, assign=True)
    model.tie_weights()  # assigning breaks the tie between shared weights
    return model.eval()


def read_state_dict(path: str | Path) -> StateDict:
    """Reads the tensors of a `.safetensors`, `.pt`, `.pth` or `.bin` file onto the CPU, without running pickled code.

    From a training checkpoint, only the weights under "state_dict" or "model" are returned.

    Raises:
        ValueError: if the file has another suffix, is damaged, or holds more than plain tensors.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} is not a weights file: pass a .safetensors, .pt, .pth or .bin file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(
            f"{path} cannot be read as plain tensors: the file is damaged, a TorchScript archive, or contains code. "
            "Save the state dict as safetensors with the code that wrote the file."
        ) from error
    if isinstance(loaded, dict):
        loaded = loaded.get("state_dict", loaded.get("model", loaded))
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
    ):
        raise ValueError(f"{path} does not hold a dict of tensors: save only the state dict of the model.")
    return loaded


__all__ = [
    "Names",
    "StateDict",
    "check_state_dict",
    "flipped",
    "fuse",
    "prefixed",
    "read_state_dict",
    "rename",
    "split",
    "with_weights",
]
