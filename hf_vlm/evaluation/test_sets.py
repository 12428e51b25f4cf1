"""Evaluation of a checkpoint on the built-in emoji, on scenes, on easy-VQA, or on the user's own data.

`evaluate_checkpoint` is `hf-vlm evaluate`; `save_scene_report` ends a recipe.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from ..data.batches.collators import pair_id
from ..data.batches.pairs import row_id
from ..data.builtin.emoji import TEST_SPLITS, load_emoji
from ..data.builtin.scenes import load_scenes
from ..data.builtin.table import BUILTIN, BuiltinOptions, find_builtin
from ..data.sources.cells import read_captions
from ..data.sources.images import LazyImages
from ..data.sources.load import load_source, load_texts
from ..data.sources.open import DataSource
from ..data.sources.questions import QuestionRows, question_source
from ..data.sources.splits import one_split
from ..files import write_text
from ..metrics.descriptions import RECALL_RANKS
from .prompts import prompting_of
from .reports import hard_negative_report, retrieval_report
from .tables import add_row, by_task, describe, format_report, format_reports, report_table
from .task import DEFAULTS, EvaluationSettings, Evaluator, TestSet
from .tasks import Reports, chosen_tasks, load_checkpoint, run_tasks, usable_tasks

logger = logging.getLogger(__name__)

# The fields of `TestSet` that each kind of data fills.
CAPTION_FIELDS = ("captions", "references")
QUESTION_FIELDS = ("questions",)
CLASS_FIELDS = ("labels",)
AFTER_TRAINING = EvaluationSettings(beams=1, answer_tokens=8, max_questions=400)
"""Settings after training for a head with a language model: greedy and few questions, because it is slow."""
Report = dict[str, dict[str, Any]]


def emoji_report(model: PreTrainedModel, processor: ProcessorMixin) -> Report:
    """Retrieval between drawings and names on the three test sets of the built-in emoji, by test set."""
    splits = load_emoji()
    return {
        name: retrieval_report(
            model, processor, splits[name]["image"], splits[name]["name"], splits[name]["emoji_id"], ks=RECALL_RANKS
        )
        for name in TEST_SPLITS
    }


def scenes_report(model: PreTrainedModel, processor: ProcessorMixin, num_scenes: int) -> Report:
    """Hard-negative accuracy on scenes of each test set, by test set."""
    report = {}
    for name in TEST_SPLITS:
        scenes = load_scenes(name, num_scenes)
        report[name] = hard_negative_report(model, processor, scenes["image"], scenes["hard_negatives"])
    return report


def report_on_builtin_data(folder: str, num_scenes: int) -> None:
    """Evaluates a saved model on the built-in emoji and scenes, prints the tables and writes `results.json`."""
    model, processor = load_checkpoint(folder)
    reports = {
        "retrieval": emoji_report(model, processor),
        "hard_negatives": scenes_report(model, processor, num_scenes),
    }
    reports |= by_task(emoji_reports(Evaluator(model, processor), "zero_shot"))
    for task, report in reports.items():
        print(format_report(report, task))
    write_text(Path(folder, "results.json"), json.dumps(reports, indent=2))


def emoji_reports(evaluator: Evaluator, task: str | None = None) -> Reports:
    """The metrics of a head on the built-in emoji, by test set and task.

    Args:
        evaluator: Model and settings.
        task: The only task to run; by default all that the head can do.
    """
    return builtin_reports(evaluator, "emoji", BuiltinOptions(), task)


def builtin_reports(
    evaluator: Evaluator,
    data: str,
    options: BuiltinOptions,
    task: str | None = None,
    splits: Sequence[str] | None = None,
) -> Reports:
    """The metrics of a head on a built-in dataset, by test set and task.

    Args:
        evaluator: Model and settings.
        data: Name of the dataset, of `BUILTIN`.
        options: Number, size and aspect ratios of its images.
        task: The only task to run; by default all that the head can do.
        splits: Names of test sets; by default all of the dataset.

    Raises:
        ValueError: if the dataset has no test sets, or the head cannot do the task.
    """
    builtin = BUILTIN[data]
    if builtin.test_sets is None:
        raise ValueError(f"The built-in dataset {data} has no test sets; evaluate on another.")
    tasks = chosen_tasks(evaluator.model, builtin.test_fields, task, data)
    asks = not set(tasks).isdisjoint(usable_tasks(QUESTION_FIELDS))
    train_questions = builtin.train_questions(options) if asks and builtin.train_questions else None
    reports = {}
    for name, fields in builtin.test_sets(options, splits):
        report = run_tasks(evaluator, tasks, TestSet(**fields, train_questions=train_questions))
        reports[name] = {f"{builtin.task_prefix}{done}": metrics for done, metrics in report.items()}
    return reports


def report_on_scenes(
    model: PreTrainedModel | str | Path,
    processor: ProcessorMixin | None = None,
    num_scenes: int = 500,
    *,
    task: str | None = None,
    splits: Sequence[str] = TEST_SPLITS,
    size: int = 64,
    aspects: Sequence[float] = (1.0,),
    settings: EvaluationSettings = DEFAULTS,
) -> Reports:
    """The metrics of a head on scenes of each test set.

    Args:
        model: A model with a head, or the folder or Hub id of a checkpoint.
        processor: The processor of a model; a checkpoint has its own.
        num_scenes: Number of scenes per test set.
        task: The only task to run; by default all that the head can do.
        splits: Test sets, from `EMOJI_SPLITS`.
        size: Shorter side of a scene in pixels.
        aspects: Aspect ratios (width over height) to mix; each scene has one of them.
        settings: Options of the evaluation.

    Returns:
        Metrics by test set and task, ready for JSON. A task's metrics may hold nested dicts of the same kind: `blind`
        (with a grey image), `majority` (most frequent training answer), `reranked` and `chance` (`retrieval`), `itm`
        and `itm_blind` (`hard_negatives`). Retrieval uses the caption that names all objects and the background; scenes
        with equal captions share an id.

    Raises:
        ValueError: if the head cannot do the task, or a model comes without a processor.

    Example:

        reports = report_on_scenes("org/clip-small", num_scenes=100, task="retrieval")
        print(reports["unseen_style"]["retrieval"]["text_to_image_r1"])
    """
    if isinstance(model, str | Path):
        model, processor = load_checkpoint(str(model))
    if processor is None:
        raise ValueError("A model needs its processor: pass it as well, or pass the folder of a checkpoint.")
    options = BuiltinOptions(size=size, limit=num_scenes, aspects=aspects)
    return builtin_reports(Evaluator(model, processor, settings), "scenes", options, task, splits)


def report_on_easy_vqa(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    num_questions: int = 0,
    *,
    task: str | None = None,
    settings: EvaluationSettings = DEFAULTS,
) -> Reports:
    """The metrics of a head on test questions of easy-VQA.

    Args:
        model: A model that answers questions.
        processor: Its processor.
        num_questions: Size of a fixed random sample of the questions (0: all 9,673).
        task: `vqa` or `vqa_unseen_wordings`; by default both, if the head can do them.
        settings: Options of the evaluation.

    Returns:
        Under `test`, metrics by task as in `report_on_scenes`. The task `vqa` is called `easy_vqa` here.

    Raises:
        ValueError: if the head does not answer questions.
        ModuleNotFoundError: if easy-VQA is not installed.
    """
    options = BuiltinOptions(split="test", limit=num_questions)
    return builtin_reports(Evaluator(model, processor, settings), "easy_vqa", options, task)


def save_scene_report(
    folder: str | Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    num_scenes: int,
    size: int,
    settings: EvaluationSettings = AFTER_TRAINING,
    aspects: Sequence[float] = (1.0,),
    beside: Mapping[str, str | None] = {},
) -> None:
    """Evaluates the model of a recipe on scenes, prints the tables and writes `results.json` into the folder.

    Args:
        folder: Where `results.json` goes.
        model: A model with a head.
        processor: Its processor.
        num_scenes: Number of scenes per test set.
        size: Shorter side of a scene in pixels.
        settings: Options for a head with a language model, which also answers questions of easy-VQA.
        aspects: Aspect ratios (width over height) to mix.
        beside: Row name -> folder of another run. Its results are added as a row; a folder without any is skipped.
    """
    if prompting_of(model.eval(), processor) is None:
        reports = report_on_scenes(model, processor, num_scenes, size=size, aspects=aspects)
    else:
        reports = report_on_scenes(model, processor, num_scenes, size=size, aspects=aspects, settings=settings)
        reports |= report_on_easy_vqa(model, processor, settings.max_questions, settings=settings)
    print(format_reports(reports))
    results = by_task(reports)
    for row, other in beside.items():
        if other is not None and Path(other, "results.json").is_file():
            try:
                add_row(results, row, json.loads(Path(other, "results.json").read_text(encoding="utf-8")))
            except (ValueError, AttributeError, TypeError, KeyError):
                logger.warning("%s/results.json is broken: its row is left out.", other)
    write_text(Path(folder, "results.json"), json.dumps(results, indent=2))


def evaluate_checkpoint(
    checkpoint: str,
    data: str,
    split: str,
    columns: str,
    limit: int,
    task: str | None = None,
    train_split: str | None = None,
    settings: EvaluationSettings = DEFAULTS,
    scene_size: int | None = None,
    scene_aspects: Sequence[float] = (1.0,),
) -> Reports:
    """The reports of `hf-vlm evaluate`, by test set and task; `hf-vlm evaluate --help` explains the arguments.

    Raises:
        ValueError: if the architecture is unknown, the head or the data do not allow the task, or a column is missing.
    """
    model, processor = load_checkpoint(checkpoint)
    evaluator = Evaluator(model, processor, settings)
    if (builtin := find_builtin(data)) is not None:
        size = scene_size or builtin.fit(processor.image_processor.size.get("height", 224))
        return builtin_reports(evaluator, data, BuiltinOptions(size=size, limit=limit, aspects=scene_aspects), task)
    tasks = chosen_tasks(model, (*CAPTION_FIELDS, *QUESTION_FIELDS, *CLASS_FIELDS), task, data)
    mapping = dict(item.split("=", 1) for item in columns.split(",")) if columns else {}
    fields = own_fields(mapping, tasks)
    rows = "train" if split == "test" and train_split is None and one_split(data) else split
    if fields == QUESTION_FIELDS:
        test = own_questions(data, rows, train_split, mapping, limit)
    elif fields == CLASS_FIELDS:
        test = own_classes(data, rows, mapping, limit)
    else:
        test = own_captions(data, rows, mapping, limit)
    return {split: run_tasks(evaluator, chosen_tasks(model, fields, task, data), test)}


def own_fields(columns: Mapping[str, str], tasks: Collection[str]) -> tuple[str, ...]:
    """The fields of `TestSet` in the user's own data: by the named columns, else by the tasks, else captions."""
    for role, fields in (("question", QUESTION_FIELDS), ("class", CLASS_FIELDS)):
        if role in columns or set(tasks) <= set(usable_tasks(fields)):
            return fields
    return CAPTION_FIELDS


def own_captions(data: str, split: str, columns: dict[str, str], limit: int) -> TestSet:
    """The user's own images and captions. An image is decoded each time that a task reads it, and not kept."""
    rows = load_source(DataSource(data, split=split, columns=columns))
    images = LazyImages(rows, _count(rows, limit))
    texts = list(load_texts(rows.select(range(len(images)))))
    ids = [pair_id(row_id(row)) for row in texts] if "id" in texts[0] else None
    captions = [row["caption"] for row in texts]
    return TestSet(images, captions=captions, references=captions, ids=ids)


def own_questions(data: str, split: str, train_split: str | None, columns: dict[str, str], limit: int) -> TestSet:
    """The user's own images, questions and answers; `train_split` gives the training questions.

    Raises:
        ValueError: if a column is missing, or a row has no question or answer.
    """
    rows = _questions({"path": data, "split": split, "columns": columns})
    images = LazyImages(rows, _count(rows, limit))
    questions = [[rows.texts(i)] for i in range(len(images))]
    train_questions = None
    if train_split is not None:
        train = _questions({"path": data, "split": train_split, "columns": columns})
        train_questions = [train.texts(i) for i in range(len(train))]
    return TestSet(images, questions=questions, train_questions=train_questions)


def own_classes(data: str, split: str, columns: dict[str, str], limit: int) -> TestSet:
    """The user's own images with class names. All classes of the split compete, whatever the limit.

    Args:
        data: Path or Hub id.
        split: Split of the data.
        columns: May name `image` and `class`; by default the columns `image` and `label`, as in a folder of images
            sorted into one folder per class. An underscore in a class name is read as a space.
        limit: Number of images (0: all).

    Raises:
        ValueError: if a column is missing or another one is named.
    """
    if unknown := set(columns) - {"image", "class"}:
        raise ValueError(f"{data}: columns: {sorted(unknown)} is unknown; name image and class.")
    names = {"image": "image", "class": "label"} | columns
    source = DataSource(data, split=split, columns={"image": names["image"], "caption": names["class"]})
    rows = load_source(source)
    cells = [cell for cell in rows.with_format(None)["caption"] if cell is not None]
    classes = dict.fromkeys(name.replace("_", " ") for cell in cells for name in read_captions(cell))
    images = LazyImages(rows, _count(rows, limit))
    found = [row["caption"] for row in load_texts(rows.select(range(len(images))))]
    if several := [number for number, label in enumerate(found) if not isinstance(label, str)]:
        raise ValueError(f"{data}, row {several[0]}: has several classes; give it one.")
    labels = [label.replace("_", " ") for label in found]
    return TestSet(images, labels=labels, class_names=list(classes))


def _questions(source: dict[str, Any]) -> QuestionRows:
    return load_source(question_source(source))


def _count(rows: Any, limit: int) -> int:
    return len(rows) if limit == 0 else min(limit, len(rows))


__all__ = [
    "AFTER_TRAINING",
    "builtin_reports",
    "describe",
    "emoji_report",
    "emoji_reports",
    "evaluate_checkpoint",
    "format_report",
    "format_reports",
    "load_checkpoint",
    "own_captions",
    "own_classes",
    "own_questions",
    "report_on_builtin_data",
    "report_on_easy_vqa",
    "report_on_scenes",
    "report_table",
    "save_scene_report",
    "scenes_report",
]
