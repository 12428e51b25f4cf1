"""Checkpoints that can be loaded as they say: a config that can be built, and exactly the weights of the model.

- transformers initialises missing weights anew and only logs a warning. The numbers of such a model mean nothing.
- A config of others may ask for 10**8 layers or zero heads. It is refused before anything is built.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .terminal import printable, quoted

NUM_SHOWN = 3
# Entries of configs that count layers: ours and those of transformers' models.
LAYERS = re.compile(r"(^|_)(layers|depth|n_layer)$")
MOST_LAYERS = 1000
# Errors of code on values of other types.
_IMPOSSIBLE = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, yaml.YAMLError)


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


def check_config(config: Mapping[str, Any], source: str | Path) -> None:
    """Refuses a config of more layers than any model has, before they are built one by one, or of no class.

    Raises:
        ValueError: if a number of layers is too large, or `architectures` is no list of names; one line.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source}: config.json has the architectures {quoted(names)}; write a list of class names.")
    for name, value in _entries(config):
        if LAYERS.search(name) and isinstance(value, int | float) and not value <= MOST_LAYERS:
            said = f"{printable(name)} = {quoted(value)}"
            raise ValueError(f"{source}: config.json says {said}; at most {MOST_LAYERS} layers are possible.")


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the value of every entry, nested ones too; of a list, each item under the list's name."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _entries(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _entries(value, prefix)
    else:
        yield prefix, config


@contextmanager
def file_errors(place: str) -> Iterator[None]:
    """Turns the errors of code that meets impossible values in a file into a ValueError of one line.

    Args:
        place: The file, such as "my-clip: config.json".
    """
    try:
        yield
    except _IMPOSSIBLE as error:
        said = printable(" ".join(str(error).split()), 300)
        raise ValueError(f"{place} holds impossible values ({type(error).__name__}: {said}); correct it.") from error


def read_config(source: str | Path, **options: Any) -> PreTrainedConfig:
    """The config of a checkpoint; one that no model can be built from is refused.

    Args:
        source: Folder or Hub id.
        options: Options of `from_pretrained`.

    Raises:
        ValueError: if a value of the config is impossible; one line.
    """
    with file_errors(f"{source}: config.json"):
        check_config(PreTrainedConfig.get_config_dict(source, **options)[0], source)
        return AutoConfig.from_pretrained(source, **options)


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
    config_dict, _ = PreTrainedConfig.get_config_dict(path, revision=options.get("revision"))
    check_config(config_dict, path)
    with file_errors(f"{path}: config.json"):
        model, info = model_class.from_pretrained(path, **options)
    mismatched = {
        name: f"{name} {tuple(found)} instead of {tuple(expected)}" for name, found, expected in info["mismatched_keys"]
    }

    def checked(names: Iterable[str]) -> list[str]:
        return [name for name in names if name.startswith(part) and not name.startswith(unread)]

    missing = checked(set(info["missing_keys"]) - set(mismatched))
    check_keys(str(path), missing, checked(info["unexpected_keys"]), [mismatched[name] for name in checked(mismatched)])
    return model


__all__ = ["check_config", "check_keys", "file_errors", "load_complete", "read_config"]
