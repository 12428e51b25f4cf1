"""The beginning of every training recipe: its output folder, the seed, and the checkpoint to resume from."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from ..files import hold_folder
from ..hub.record import RECORD_NAME, published, read_record
from ..training.resume import compare_runs, last_checkpoint
from ..training.trainer import VlmTrainer
from .parts import check_parts
from .sources import check_steps

AFTERWARDS = ("num_scenes", "num_questions", "lora_run")  # of the evaluation at the end
FREE = ("eval_sources", "feature_cache", "on_error", "max_skipped")  # decide neither rows nor their order


class Run:
    """A run of a recipe, new or resumed; it holds its output folder until it is deleted.

    Args:
        recipe: Name of the recipe.
        model_args: Its dataclass of model arguments.
        data_args: Its dataclass of data arguments.
        training_args: Its training arguments.

    Raises:
        ValueError: if the output folder is held by another process, holds another recipe's run, or was made with other
            arguments than these, or a pretrained part is not there.
    """

    def __init__(self, recipe: str, model_args: Any, data_args: Any, training_args: TrainingArguments):
        check_steps(data_args.sources, training_args.max_steps)
        folder = training_args.output_dir
        self.hold = hold_folder(folder)
        other = recorded_recipe(folder)
        if other not in (None, recipe):
            raise ValueError(f"{folder} holds a run of {other}: choose another output_dir for {recipe}.")
        check_parts(recipe, vars(model_args))
        set_seed(training_args.seed)
        model, data = dataclasses.asdict(model_args), dataclasses.asdict(data_args)
        data = {name: value for name, value in data.items() if name not in (*AFTERWARDS, *FREE)}
        self.facts = {"fixed": {"recipe": recipe, **published(model)}, "order": published(data)}
        self.checkpoint = last_checkpoint(folder)
        if self.checkpoint is not None:
            compare_runs(self.checkpoint, self.facts, not training_args.ignore_data_skip)

    def train(self, trainer: VlmTrainer) -> None:
        """Trains, from the last checkpoint if there is one."""
        trainer.run_arguments = self.facts
        trainer.train(resume_from_checkpoint=self.checkpoint)


def recorded_recipe(folder: str | Path) -> str | None:
    """The recipe whose record is in a folder; None without a readable record."""
    if not (Path(folder) / RECORD_NAME).is_file():
        return None
    try:
        return read_record(folder).get("recipe")
    except ValueError:
        return None


__all__ = ["Run"]
