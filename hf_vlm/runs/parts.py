"""The pretrained parts that a recipe's arguments name, checked before anything is built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import cached_file

from ..data.wheels import PREFIX
from .provenance import HUB_ID

PARTS = ("model", "checkpoint", "captioner", "clip", "vision", "text", "tokenizer", "language_model")
FAMILY = {  # what the argument `model` of a recipe must be
    "blip_finetune": "vlm_blip",
    "blip2_stage2": "vlm_blip2",
    "instructblip_finetune": "vlm_blip2",
    "llava_instruct": "vlm_llava",
}


def check_parts(recipe: str, model_args: Mapping[str, Any]) -> None:
    """Checks that every named part is there, and that it is of the right kind.

    Args:
        recipe: Name of the recipe.
        model_args: Its model arguments.

    Raises:
        ValueError: if a folder does not exist, a repository cannot be reached, `model` is of another architecture, or
            `vision` has no image tower.
    """
    for part in PARTS:
        name = model_args.get(part)
        if name is None or name.startswith(PREFIX):
            continue
        if not Path(name).is_dir() and HUB_ID.fullmatch(name) is None:
            raise ValueError(f"{part} is {name!r}: there is no such folder; correct the path, or give a Hub id.")
        is_tokenizer = part == "tokenizer" or (part == "text" and recipe == "instructblip_finetune")
        if is_tokenizer and Path(name).is_dir():
            continue  # its files have many names
        file = "tokenizer_config.json" if is_tokenizer else "config.json"
        try:
            cached_file(name, file)
        except OSError as error:
            where = "the folder" if Path(name).is_dir() else "the repository, or no network to reach it,"
            raise ValueError(f"{part} is {name!r}: {where} has no {file} ({str(error).splitlines()[0]})") from error
        if part in ("model", "vision"):
            check_architecture(part, name, FAMILY.get(recipe))


def check_architecture(part: str, name: str, family: str | None) -> None:
    """Checks what a config says, because a model of another architecture would be built at its default size.

    Raises:
        ValueError: if it is not what the argument needs.
    """
    config = AutoConfig.from_pretrained(name)
    if part == "model" and family is not None and config.model_type != family:
        raise ValueError(f"{part} is {name!r}, which is a {config.model_type}: give a {family}.")
    if part == "vision" and not any(hasattr(config, field) for field in ("vision_config", "image_size", "patch_size")):
        raise ValueError(f"{part} is {name!r}, which is a {config.model_type} without an image tower.")


__all__ = ["check_parts"]
