"""What cached features were computed from, as JSON: weights, architecture, preprocessing and data.

Of a model its weights count, not its name or commit: a folder may move, and a branch may change under its name.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

FORMAT = 1
# For people to read; two keys that differ in these alone are the same.
_SHOWN_ONLY = ("model", "revision")
# Of an image processor's settings, those that change no pixel.
_NO_PIXELS = ("processor_class", "auto_map", "return_tensors", "device", "data_format", "input_data_format")
# Of a config, what changes no output or differs between a tower in memory and the same tower loaded.
_NO_OUTPUT = ("_name_or_path", "architectures", "dtype", "transformers_version", "auto_map", "id2label", "label2id")


def feature_key(
    tower: torch.nn.Module, processor: Any, data: Mapping[str, Any], model: str = "", revision: str | None = None
) -> dict[str, Any]:
    """The key of what a tower makes of a data set.

    Whether it computed in float32 or under autocast is no part of it: that differs by rounding only. Which of the
    tower's states were taken is not seen from here: where that may vary, say it in `data`.

    Args:
        tower: The image tower. The same weights in another precision are another key.
        processor: Its image processor, or a processor that has one.
        data: What names the rows: path, split, seed, number of rows and the like, ready for JSON. A change of files
            under the same name is not seen.
        model: Folder or Hub id, to be read by people; not compared.
        revision: Its commit, the same.
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
    """A key as it is read back from a file: tuples are lists, enumerations their values.

    Raises:
        TypeError: if it holds what JSON cannot.
    """
    return json.loads(json.dumps(dict(key), sort_keys=True))


def compared(key: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a key that makes it another one."""
    return {name: value for name, value in key.items() if name not in _SHOWN_ONLY}


def first_difference(has: Any, asked: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first entry in which two keys differ, by its dotted name, with both values; None if they are the same."""
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
