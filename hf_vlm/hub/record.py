"""The record of a run, `training_record.json` next to the weights: all that a model card says about the training.

- It holds the arguments, versions, steps, time, parameters, and the sources of data and pretrained parts.
- It can be published: no tokens, no absolute paths, no credentials in addresses.
- An interrupted and resumed run has one record. Its minutes are summed from the throughput in the Trainer's log, which
  checkpoints keep. Steps that were lost when the process was killed do not count.
"""

import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..files import write_text
from .secrets import is_secret, without_secrets

RECORD_NAME = "training_record.json"
CARD_HASH = "card_sha256"  # key of the hash of the model card as it was written
PACKAGES = ("hf_vlm", "torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors", "huggingface_hub")
ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://\S*", re.IGNORECASE)
ABSOLUTE_PATH = re.compile(r"[/~\\]|[A-Za-z]:[\\/]|file:")
SECTIONS = {"arguments": dict, "versions": dict, "training": dict, "parameters": dict, "data": list, "parts": list}

Record = dict[str, Any]


def run_record(
    trainer: Trainer, recipe: str, arguments: dict[str, dict[str, Any]], data: list[Record], parts: list[Record]
) -> Record:
    """The record of a finished training.

    Args:
        trainer: The trainer, after `train()`.
        recipe: Name of the recipe.
        arguments: Its arguments by group, such as `model` and `data`; the trainer's own are added as `training`.
        data: The data sources: dicts with `name` and, where known, `licence`, `credit`, `source` (an address),
            `hub_id`, `use`, `split`, `revision` and `rows` (by split).
        parts: The pretrained parts: dicts with `part`, `id` and, where known, `hub_id`, `revision`, `version`,
            `licence`.

    Returns:
        The record, ready for JSON; [`published`] says what is left out.
    """
    training = trainer.args.to_dict()
    if trainer.args.max_steps > 0:
        del training["num_train_epochs"]  # ignored when max_steps is set
    return published(
        {
            "recipe": recipe,
            "arguments": {**arguments, "training": training},
            "versions": versions(),
            "training": training_facts(trainer),
            "parameters": count_parameters(trainer.model),
            "data": data,
            "parts": parts,
        }
    )


def training_facts(trainer: Trainer) -> Record:
    """Steps, batch size, time and device of a training; unknown facts are left out."""
    state, args = trainer.state, trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts: Record = {"steps": state.global_step, "global_batch_size": batch}
    if isinstance(trainer.train_dataset, Sized):  # an endless stream has no epochs
        facts |= {"epochs": state.epoch, "rows": len(trainer.train_dataset)}
    facts |= training_time(state.log_history, batch)
    is_cuda = args.device.type == "cuda"
    facts |= {"device": torch.cuda.get_device_name(args.device) if is_cuda else args.device.type}
    facts |= {"ranks": args.world_size, "weights_of_step": state.global_step}
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        facts |= {"weights_of_step": state.best_global_step}
        facts |= {"chosen_by": args.metric_for_best_model, "chosen_at": state.best_metric}
    return facts


def training_time(log_history: Sequence[dict[str, float]], samples_per_step: int) -> Record:
    """Minutes of training (evaluation and saving in between included) and the number of steps that they cover.

    Args:
        log_history: The Trainer's log; lines of [`VlmTrainer`] have the `samples_per_second` since the previous line.
        samples_per_step: The global batch size.

    Returns:
        `minutes` and `timed_steps`; empty if no line has a throughput.
    """
    lines = [line for line in log_history if line.get("samples_per_second")]
    seconds, last = 0.0, 0.0
    for line in lines:
        seconds += (line["step"] - last) * samples_per_step / line["samples_per_second"]
        last = line["step"]
    return {"minutes": seconds / 60, "timed_steps": last} if lines else {}


def has_trained(trainer: Trainer) -> bool:
    """Whether `train()` did any step. A finished run that is started again does none and reports a loss of 0."""
    losses = [line["train_loss"] for line in trainer.state.log_history if "train_loss" in line]
    return bool(losses) and losses[-1] != 0


def count_parameters(model: nn.Module) -> Record:
    """Numbers of parameters: `total`, `trained` (with a gradient), and the same for each part, under `parts`.

    Parts are the model's modules; a head's base model counts as its modules, not as one part. Shared
    parameters count once.
    """
    parts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").removeprefix("model.")  # the first prefix is an adapter's
        part = parts.setdefault(name.split(".")[0], {"total": 0, "trained": 0})
        part["total"] += parameter.numel()
        part["trained"] += parameter.numel() * parameter.requires_grad
    return {**{key: sum(part[key] for part in parts.values()) for key in ("total", "trained")}, "parts": parts}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a training depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def published(value: Any) -> Any:
    """A value as JSON that may be published.

    Entries whose key names a secret are dropped, and so is what follows such a name in a list (`--hub_token`, ...).
    Tokens, keys and credentials within texts are removed. An absolute path is shortened to its last component. Values
    that JSON cannot hold become text.
    """
    if isinstance(value, dict):
        return {without_secrets(str(key)): published(item) for key, item in value.items() if not is_secret(str(key))}
    if isinstance(value, list | tuple | set | frozenset):
        items = list(value)
        named = [False, *(isinstance(item, str) and _names_secret(item, len(items)) for item in items)]
        return ["..." if secret else published(item) for item, secret in zip(items, named, strict=False)]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = without_secrets(str(value))
    if ADDRESS.fullmatch(text):
        return text.split("?")[0]
    if ABSOLUTE_PATH.match(text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return text


def _names_secret(item: str, count: int) -> bool:
    """Whether the next item of a list is a secret: after an option such as `--hub_token`, or in a pair."""
    return is_secret(item.lstrip("-")) and (item.startswith("-") or count == 2)


def write_record(folder: str | Path, record: Record) -> Path:
    """Writes a record next to the weights and returns its path."""
    return write_text(Path(folder) / RECORD_NAME, record_text(record))


def record_text(record: Record) -> str:
    """A record as JSON."""
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def read_record(folder: str | Path) -> Record:
    """The record of a checkpoint; empty sections if it has none.

    Raises:
        ValueError: if the file is not a record.
    """
    path = Path(folder) / RECORD_NAME
    record = {**{name: kind() for name, kind in SECTIONS.items()}, **read_json(path)}
    wrong = [name for name, kind in SECTIONS.items() if not isinstance(record[name], kind)]
    wrong = wrong or [n for n in ("data", "parts") if not all(isinstance(entry, dict) for entry in record[n])]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is not as recipes write it; delete the file and run the recipe again.")
    return record


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one if the file does not exist.

    Raises:
        ValueError: if the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): write it again, or delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: write it again, or delete it.")
    return content


__all__ = [
    "CARD_HASH",
    "RECORD_NAME",
    "count_parameters",
    "has_trained",
    "published",
    "read_json",
    "read_record",
    "record_text",
    "run_record",
    "training_time",
    "versions",
    "write_record",
]
