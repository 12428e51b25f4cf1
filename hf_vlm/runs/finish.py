"""The end of every recipe: the record of the run, its model card and, with `--push_to_hub`, the push."""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer

from ..data.builtin.drawings import package_versions
from ..data.sources.skipped import SkipReport
from ..hub.cards.card import RESULTS_NAME, read_results, write_card
from ..hub.push import push_run
from ..hub.record import RECORD_NAME, Record, has_trained, read_record, run_record
from .provenance import builtin_data, own_data, own_licence, pretrained_parts

logger = logging.getLogger(__name__)


def finish_run(trainer: Trainer, recipe: str, model_args: Any, data_args: Any, has_easy_vqa: bool = False) -> None:
    """Writes `training_record.json` and the model card into the output folder, then pushes it if asked to.

    Runs on the first rank only. A finished run that is started again trains nothing and keeps its record; its card is
    written again, because the results may be new. A card that somebody has edited is kept.

    Args:
        trainer: The trainer after `train()` and `save_model()`.
        recipe: Name of the recipe.
        model_args: Its dataclass of model arguments.
        data_args: Its dataclass of data arguments; without `sources` it trained on the built-in data.
        has_easy_vqa: Whether the built-in data included easy-VQA.
    """
    skipped = skipped_rows(data_args.report)
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    record = old_record(args.output_dir)
    set_broken_results_aside(args.output_dir)
    if has_trained(trainer) or record["training"].get("steps") != trainer.state.global_step:
        model, data = dataclasses.asdict(model_args), dataclasses.asdict(data_args)
        parts = pretrained_parts(model)
        builtin = data["sources"] is None
        sources = builtin_data(has_easy_vqa) if builtin else own_data(data["sources"], data.get("eval_sources") or [])
        record = run_record(trainer, recipe, {"model": model, "data": data}, sources, parts)
        if skipped is not None:
            record["training"]["skipped"] = skipped
        if builtin:
            record["versions"] |= package_versions()
            record["licence"] = own_licence(parts)
    write_card(args.output_dir, args.hub_model_id if args.push_to_hub else None, record)
    push_run(args)


def skipped_rows(report: SkipReport | None) -> dict[str, int] | None:
    """Number of training rows that all ranks skipped since the run was started, by reason; logged on every rank."""
    if report is None:
        return None
    report.log()
    return dict(Counter(reason for reason, _ in set(gather_object(report.entries))).most_common())


def old_record(folder: str) -> Record:
    """The record of an earlier start of the run; an empty one, with a warning, in place of a broken file."""
    try:
        return read_record(folder)
    except ValueError as error:
        logger.warning("%s The record is written anew.", error)
        Path(folder, RECORD_NAME).unlink()
        return read_record(folder)


def set_broken_results_aside(folder: str) -> None:
    """Renames a broken `results.json`, which the card could not show, with a warning."""
    try:
        read_results(folder)
    except ValueError as error:
        path = Path(folder, RESULTS_NAME)
        logger.warning("%s It is now called damaged-%s.", error, path.name)
        path.replace(path.with_name(f"damaged-{path.name}"))


__all__ = ["finish_run"]
