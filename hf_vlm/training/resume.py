"""Find the checkpoint to resume from, even if the last run was killed while saving one."""

import json
import logging
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

logger = logging.getLogger(__name__)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: the Trainer writes its state last, after weights and optimiser."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; newer incomplete ones are removed, with a warning.

    Args:
        output_dir: The run's output folder; it need not exist.

    Returns:
        The checkpoint's path, or None if there is none.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_complete(checkpoint):
            return str(checkpoint)
        logger.warning("Removing %s: the run was stopped while saving it.", checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)  # every rank runs this
    return None


__all__ = ["last_checkpoint"]
