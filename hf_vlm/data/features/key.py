"""The key of a feature cache, as JSON: weights, architecture, preprocessing and data.

The weights of a model identify it, not its name or commit: a folder may move, and a branch may change.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

FORMAT = 1
# For information only; keys that differ only in these entries are equal.
_SHOWN_ONLY = ("model", "revision")
# Settings of an image processor that change no pixel.
_NO_PIXELS = ("processor_class", "auto_map", "return_tensors", "device", "data_format", "input_data_format")
# Entries of a config that change no output, or that loading changes.
_NO_OUTPUT = ("_name_or_path", "architectures", "dtype", "transformers_version", "auto_map", "id2label", "label2id")


def feature_key(
    tower: torch.nn.Module, processor: Any, data: Mapping[str, Any], model: str = "", revision: str | None = None
) -> dict[str, Any]:
    """The key of a tower's features of a dataset.

    Precision (float32 or autocast) is not part of the key: results differ by rounding only. The layer of the hidden
    states is not known here: if it can vary, add it to `data`.

    Args:
        tower: The image tower. The same weights in another dtype give another key.
        processor: Its image processor, or a processor that has one.
        data: What identifies the rows: path, split, seed, number of rows and the like, ready for JSON. A change of
            files under the same name is not detected.
        model: Folder or Hub id, for information; not compared.
        revision: Commit of the model, for information; not compared.
    """
    images = processor.image_processor if isinstance(processor, ProcessorMixin) else processor
    settings = {name: value for name, value in images.to_dict().items() if name not in _NO_PIXELS and value is not None}
    config = tower.config.to_diff_dict() if isinstance(tower, PreTrainedModel) else {}
    key = {
        "format": FORMAT,
        "model": model,
        "revision": revision,
        "weights": _weights_hash(tower),
        "architecture": {name: value for name, value in config.items() if name not in _NO_OUTPUT},
        "preprocessing": {name: value for name, value in settings.items() if not name.startswith("_")},
        "data": dict(data),
    }
    return plain_json(key)


def plain_json(key: Mapping[str, Any]) -> dict[str, Any]:
    """A key as read back from a file: tuples become lists, enumerations their values.

    Raises:
        TypeError: if it holds a value that JSON cannot represent.
    """
    return json.loads(json.dumps(dict(key), sort_keys=True))


def compared(key: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a key that are compared."""
    return {name: value for name, value in key.items() if name not in _SHOWN_ONLY}


def first_difference(has: Any, asked: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first entry that differs between two keys; None if they are equal."""
    if isinstance(has, dict) and isinstance(asked, dict):
        for entry in sorted({*has, *asked}):
            path = f"{name}.{entry}" if name else entry
            if found := first_difference(has.get(entry), asked.get(entry), path):
                return found
        return None
    return None if has == asked else (name, has, asked)


def _weights_hash(tower: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = ["compared", "feature_key", "first_difference", "plain_json"]
