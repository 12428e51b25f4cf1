"""Checkpoints that a run resumes from: whole, on disk, and of the same run.

- A checkpoint counts once all its files are synced to disk. `checkpoint.json`, written last, lists the files that a
  resume needs, with size and checksum, and what the run was.
- A checkpoint that is not whole is set aside under another name, never deleted, and the one before is resumed.
- Checkpoints without `checkpoint.json` were written by other versions. Their files are checked by their own formats.
- A run resumes only with the same weights, data and order of rows. Other changes are named in a warning.
"""

import json
import logging
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)

from ..files import hold_folder, sync, write_text
from ..models.distributed import rank, world_size

logger = logging.getLogger(__name__)

MARK = "checkpoint.json"
UNFINISHED = {"unfinished": True}
JSON_FILES = (TRAINER_STATE_NAME, "config.json", "adapter_config.json")
STATE_KEYS = ("global_step", "epoch", "max_steps", "log_history")
CHUNK = 16 * 2**20

Facts = dict[str, Any]


# --- whole checkpoints


def begin_checkpoint(checkpoint: Path) -> None:
    """Marks a checkpoint as unfinished, before its first file is written."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_text(checkpoint / MARK, json.dumps(UNFINISHED))


def seal_checkpoint(checkpoint: Path, facts: Facts) -> None:
    """Syncs the files of a checkpoint to disk, then marks it as whole.

    Args:
        checkpoint: The folder, with all its files.
        facts: What a resumed run is compared with, as JSON.
    """
    for path in sorted(checkpoint.rglob("*")):
        sync(path)
    files = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, checksum(path)]
        for path in needed_files(checkpoint)
    }
    content = {"files": files, "run": facts}
    write_text(checkpoint / MARK, json.dumps({**content, "crc32": _json_checksum(content)}, indent=1))
    sync(checkpoint.parent)


def needed_files(checkpoint: Path) -> Iterator[Path]:
    """The files that a resume needs: weights, optimiser, scheduler, random states and the Trainer's state."""
    for path in sorted(checkpoint.rglob("*")):
        is_part = path.suffix in (".safetensors", ".pt", ".pth", ".bin") or path.name.endswith(".index.json")
        is_needed = is_part or path.name in JSON_FILES or path.parent != checkpoint  # FSDP and DeepSpeed write folders
        if path.is_file() and is_needed and path.name != TRAINING_ARGS_NAME:
            yield path


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _json_checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, such as a missing file; None if it is whole.

    Raises:
        OSError: if a file is there and cannot be read, for example because a network file system is away.
    """
    if not (checkpoint / MARK).is_file():
        return _damage_by_format(checkpoint)
    try:
        mark = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    except ValueError:
        mark = {}
    if mark == UNFINISHED:
        return "the run was stopped while saving it"
    if not isinstance(mark, dict) or mark.pop("crc32", None) != _json_checksum(mark):
        return f"{MARK} is damaged"
    for name, (size, value) in mark["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        if checksum(path) != value:
            return f"{name} is damaged: its checksum is wrong"
    return None


def _damage_by_format(checkpoint: Path) -> str | None:
    """[`damage_of`] a checkpoint that lists no files."""
    names = {path.name for path in checkpoint.iterdir()}
    folders = {path.name for path in checkpoint.iterdir() if path.is_dir()}  # written by FSDP and DeepSpeed
    required = {
        TRAINER_STATE_NAME: {TRAINER_STATE_NAME},
        "config.json": {"config.json", "adapter_config.json"},
        "model.safetensors": {
            *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
            *("pytorch_model.bin", "pytorch_model.bin.index.json", *folders),
        },
        OPTIMIZER_NAME: {OPTIMIZER_NAME, "optimizer.bin", *folders},
        SCHEDULER_NAME: {SCHEDULER_NAME, *folders},
        "rng_state.pth": {"rng_state.pth", *(name for name in names if re.fullmatch(r"rng_state_\d+\.pth", name))},
    }
    for name, any_of in required.items():
        if not any_of & names:
            return f"{name} is missing"
    ranks = sorted(int(name[10:-4]) for name in names if re.fullmatch(r"rng_state_\d+\.pth", name))
    if missing := set(range(len(ranks))) - set(ranks):
        return f"rng_state_{min(missing)}.pth is missing"
    for path in needed_files(checkpoint):
        if (problem := _file_damage(path)) is not None:
            return f"{path.name} {problem}"
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if missing_keys := [key for key in STATE_KEYS if key not in state]:
        return f"{TRAINER_STATE_NAME} has no {missing_keys[0]}"
    if state["global_step"] != step_of(checkpoint):
        return f"{TRAINER_STATE_NAME} is of step {state['global_step']}"
    return None


def _file_damage(path: Path) -> str | None:
    """What is wrong with one file by its own format."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares the header with the size of the file
                return None
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                name = archive.testzip()
            return None if name is None else "is damaged: the checksum of a part is wrong"
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                return "holds no JSON object"
            shards = set(content.get("weight_map", {}).values()) if path.name.endswith(".index.json") else set()
            if absent := [shard for shard in sorted(shards) if not (path.parent / shard).is_file()]:
                return f"names {absent[0]}, which is missing"
    except OSError:
        raise
    except (ValueError, SafetensorError, zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
        return f"is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run. Newer damaged ones are set aside, with a warning.

    Of several ranks the first decides, for all.

    Args:
        output_dir: The run's output folder; it need not exist.

    Returns:
        The checkpoint's path, or None if there is none.

    Raises:
        OSError: if a file cannot be read; nothing is set aside then.
        ValueError: if another process holds the folder of a damaged checkpoint.
    """
    found = [_find_checkpoint(Path(output_dir)) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def _find_checkpoint(folder: Path) -> str | None:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if (damage := damage_of(checkpoint)) is None:
            return str(checkpoint)
        with hold_folder(folder):
            aside = _set_aside(checkpoint)
        logger.warning("%s is not whole: %s. It is now called %s.", checkpoint, damage, aside.name)
    return None


def _set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint so that neither a run nor the Trainer's rotation of checkpoints takes it for one."""
    aside, number = checkpoint.with_name(f"damaged-{checkpoint.name}"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    return checkpoint.rename(aside)


# --- the same run


def run_facts(checkpoint: str | Path) -> Facts:
    """What [`seal_checkpoint`] stored about the run of a checkpoint; empty for other versions' checkpoints."""
    try:
        mark = json.loads((Path(checkpoint) / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return mark.get("run", {})


def compare_runs(checkpoint: str | Path, facts: Facts, same_order: bool = True) -> None:
    """Compares a checkpoint's run with the one that is about to resume it.

    Args:
        checkpoint: The checkpoint.
        facts: What is known of the new run, by how it is compared: `fixed` (must be equal), `order` (must be equal,
            because it decides which row comes next), `kept` (part of the optimiser's state: the checkpoint's values
            hold) and `taken` (the new values hold).
        same_order: Whether to compare `order`.

    Raises:
        ValueError: if a value differs that must be equal.
    """
    before, now = run_facts(checkpoint), json.loads(json.dumps(facts))

    def changes(group: str) -> list[str]:
        """`name was 1 and is 2`, for each value that both runs have and that differs."""
        old, new = before.get(group, {}), now.get(group, {})
        return [
            f"{name} was {shown(old[name])} and is {shown(new[name])}"
            for name in new
            if name in old and old[name] != new[name]
        ]

    for group, advice in (
        ("fixed", "Set it back, or choose another output_dir."),
        ("order", "Set it back, choose another output_dir, or set ignore_data_skip to train on the new rows."),
    ):
        if (group == "fixed" or same_order) and (changed := changes(group)):
            more = f" (and {len(changed) - 1} more changes)" if len(changed) > 1 else ""
            raise ValueError(f"{checkpoint} cannot be resumed: {changed[0]}{more}. {advice}")
    if rank() > 0:
        return
    if kept := changes("kept"):
        logger.warning("%s: %s. The checkpoint's value is kept.", checkpoint, "; ".join(kept))
    if taken := changes("taken"):
        logger.warning("%s: %s. The new value is taken from here on.", checkpoint, "; ".join(taken))


def shown(value: Any) -> str:
    """A value as an error shows it, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def saved_shapes(checkpoint: str | Path) -> dict[str, list[int]] | None:
    """The shapes of a checkpoint's weights by name, or those of its adapter; None if they are not safetensors."""
    folder = Path(checkpoint)
    adapter = folder / "adapter_model.safetensors"
    files = [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))
    shapes = {}
    for path in files:
        with safe_open(path, "pt") as weights:
            shapes |= {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes or None


__all__ = [
    "MARK",
    "begin_checkpoint",
    "compare_runs",
    "damage_of",
    "last_checkpoint",
    "run_facts",
    "saved_shapes",
    "seal_checkpoint",
]
