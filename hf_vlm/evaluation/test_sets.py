"""`hf-vlm evaluate`: a checkpoint on the built-in pictures, on scenes, on easy-VQA, or on data of the user's own."""

import json
import random
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from ..data.batches.collators import pair_id
from ..data.builtin.easy_vqa import easy_vqa_images, easy_vqa_questions
from ..data.builtin.emoji import load_emoji
from ..data.builtin.emoji_pairs import TEST_SPLITS
from ..data.builtin.scenes import SceneStream, load_scenes
from ..data.sources.images import load_image
from ..data.sources.load import load_source
from ..data.sources.open import DataSource
from ..data.sources.questions import QuestionRows, question_source
from ..metrics.descriptions import EASY_VQA, RECALL_RANKS
from .prompts import prompting_of
from .reports import hard_negative_report, retrieval_report
from .tables import add_row, by_task, describe, format_report, format_reports, report_table
from .task import DEFAULTS, EvaluationSettings, Evaluator, TestSet
from .tasks import Reports, chosen_tasks, load_checkpoint, run_tasks, usable_tasks

# The fields of `TestSet` that each kind of data fills.
EMOJI_FIELDS = ("captions", "references", "labels")
SCENE_FIELDS = ("captions", "references", "hard_negatives", "questions", "objects")
CAPTION_FIELDS = ("captions", "references")
QUESTION_FIELDS = ("questions",)
CLASS_FIELDS = ("labels",)
TRAIN_SCENES = 1000
"""Number of training scenes whose questions give the majority answers."""
AFTER_TRAINING = EvaluationSettings(beams=1, answer_tokens=8, max_questions=400)
"""How a recipe evaluates a head with a language model, which is slow."""
Report = dict[str, dict[str, Any]]


def emoji_report(model: PreTrainedModel, processor: ProcessorMixin) -> Report:
    """Retrieval between drawings and names on the three test sets of the built-in pictures, by test set."""
    splits = load_emoji()
    return {
        name: retrieval_report(
            model, processor, splits[name]["image"], splits[name]["name"], splits[name]["emoji_id"], ks=RECALL_RANKS
        )
        for name in TEST_SPLITS
    }


def scenes_report(model: PreTrainedModel, processor: ProcessorMixin, num_scenes: int) -> Report:
    """Accuracy on captions that differ in one word, on scenes of each test set, by test set."""
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
    Path(folder, "results.json").write_text(json.dumps(reports, indent=2))


def emoji_reports(evaluator: Evaluator, task: str | None = None) -> Reports:
    """The tasks that a head can do on the built-in emoji, by test set and task; all or the one named."""
    tasks = chosen_tasks(evaluator.model, EMOJI_FIELDS, task, "emoji")
    reports, emoji = {}, load_emoji()
    for split in TEST_SPLITS:
        rows = emoji[split]
        names, ids = list(rows["name"]), rows["emoji_id"]
        test = TestSet(rows["image"], captions=names, references=names, ids=ids, labels=names)
        reports[split] = run_tasks(evaluator, tasks, test)
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
    """All that a head can do, on scenes of each test set.

    Args:
        model: A model with a head, or the folder or Hub id of a checkpoint.
        processor: Of a model; a checkpoint brings its own.
        num_scenes: Scenes of each test set.
        task: Name of a task; all that the head can do by default.
        splits: Test sets, of `EMOJI_SPLITS`.
        size: Pixels of the shorter side of a scene.
        aspects: Width over height, of which each scene has one.
        settings: How tasks are done.

    Returns:
        Metrics by test set and task, ready for JSON. Besides its own numbers a task's metrics hold dicts of the same
        kind: `blind` (on a plain grey picture), `majority` (answers of training questions, for `vqa`), `reranked` and
        `chance` (`retrieval`), `itm` and `itm_blind` (`hard_negatives`). Retrieval looks for the caption that names all
        there is and the background; scenes of equal captions count as one.

    Raises:
        ValueError: if the head cannot do the task, or a model comes without a processor.
    """
    if isinstance(model, str | Path):
        model, processor = load_checkpoint(str(model))
    if processor is None:
        raise ValueError("A model needs its processor beside it; a folder brings its own.")
    tasks = chosen_tasks(model, SCENE_FIELDS, task, "scenes")
    train_questions = None
    if not set(tasks).isdisjoint(usable_tasks(QUESTION_FIELDS)):
        stream = SceneStream("train", size=size, aspects=aspects)
        train_questions = list(chain.from_iterable(stream.scene(i)["questions"] for i in range(TRAIN_SCENES)))
    evaluator, reports = Evaluator(model, processor, settings), {}
    for split in splits:
        scenes = load_scenes(split, num_scenes, size=size, aspects=aspects)
        captions = scenes["captions"]
        test = TestSet(
            images=scenes["image"],
            captions=[texts[0] for texts in captions],
            ids=[pair_id(texts[0]) for texts in captions],
            references=list(captions),
            hard_negatives=scenes["hard_negatives"],
            questions=scenes["questions"],
            objects=[[thing["name"] for thing in things] for things in scenes["objects"]],
            train_questions=train_questions,
        )
        reports[split] = run_tasks(evaluator, tasks, test)
    return reports


def report_on_easy_vqa(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    num_questions: int = 0,
    *,
    task: str | None = None,
    settings: EvaluationSettings = DEFAULTS,
) -> Reports:
    """Answers to test questions of easy-VQA.

    Args:
        model: A model that answers questions.
        processor: Its processor.
        num_questions: How many, drawn at random but always the same (0: all 9,673).
        task: `vqa` or `vqa_unseen_wordings`; all that the head can do by default.
        settings: How tasks are done.

    Returns:
        Under `test`, for each task, metrics as of `report_on_scenes`; `easy_vqa` is `vqa` on this data.

    Raises:
        ValueError: if the head answers no questions.
        ModuleNotFoundError: if easy-VQA is not installed.
    """
    tasks = chosen_tasks(model, QUESTION_FIELDS, task, "easy_vqa")
    pictures, questions = easy_vqa_images("test"), easy_vqa_questions("test")
    if 0 < num_questions < len(questions):
        questions = random.Random(0).sample(questions, num_questions)
    asked: dict[int, list[dict[str, Any]]] = {}
    for question in questions:
        asked.setdefault(question["index"], []).append(question)
    images = [load_image(pictures[index]["image"]) for index in asked]
    test = TestSet(images, questions=list(asked.values()), train_questions=easy_vqa_questions("train"))
    report = run_tasks(Evaluator(model, processor, settings), tasks, test)
    return {"test": {f"{EASY_VQA}{name}": metrics for name, metrics in report.items()}}


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
    """The end of a recipe: all that its head can do on scenes, printed and written to `results.json` in the folder.

    A head with a language model also answers questions of easy-VQA, and does all as `settings` say. The results of
    other runs, whose folders `beside` names, become rows of these; a run that is not there is left out.
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
            add_row(results, row, json.loads(Path(other, "results.json").read_text()))
    Path(folder, "results.json").write_text(json.dumps(results, indent=2))


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
    """The reports behind `hf-vlm evaluate`, by test set and task; see the command's help for the arguments.

    Raises:
        ValueError: if the checkpoint is of another architecture, its head or the data do not serve for the task, or a
            column is missing.
    """
    model, processor = load_checkpoint(checkpoint)
    if data == "scenes":
        size = scene_size or min(max(processor.image_processor.size["height"], 48), 1024)  # sides that scenes can have
        return report_on_scenes(model, processor, limit, task=task, size=size, aspects=scene_aspects, settings=settings)
    if data == "easy_vqa":
        return report_on_easy_vqa(model, processor, limit, task=task, settings=settings)
    evaluator = Evaluator(model, processor, settings)
    if data == "emoji":
        return emoji_reports(evaluator, task)
    tasks = chosen_tasks(model, (*CAPTION_FIELDS, *QUESTION_FIELDS, *CLASS_FIELDS), task, data)
    mapping = dict(item.split("=", 1) for item in columns.split(",")) if columns else {}
    fields = own_fields(mapping, tasks)
    if fields == QUESTION_FIELDS:
        test = own_questions(data, split, train_split, mapping, limit)
    elif fields == CLASS_FIELDS:
        test = own_classes(data, split, mapping, limit)
    else:
        test = own_captions(data, split, mapping, limit)
    return {split: run_tasks(evaluator, chosen_tasks(model, fields, task, data), test)}


def own_fields(columns: Mapping[str, str], tasks: Collection[str]) -> tuple[str, ...]:
    """The fields of `TestSet` that the user's own rows fill: by the named columns, else by the tasks, else captions."""
    for role, fields in (("question", QUESTION_FIELDS), ("class", CLASS_FIELDS)):
        if role in columns or set(tasks) <= set(usable_tasks(fields)):
            return fields
    return CAPTION_FIELDS


def own_captions(data: str, split: str, columns: dict[str, str], limit: int) -> TestSet:
    """Images and captions of the user's own."""
    rows = _first(load_source(DataSource(data, split=split, columns=columns)), limit)
    images = [load_image(row["image"], where=f"row {i}") for i, row in enumerate(rows)]
    ids = [pair_id(row["id"]) for row in rows] if "id" in rows[0] else None
    captions = [row["caption"] for row in rows]
    return TestSet(images, captions=captions, references=captions, ids=ids)


def own_questions(data: str, split: str, train_split: str | None, columns: dict[str, str], limit: int) -> TestSet:
    """Images, questions and answers of the user's own; the training questions are those of `train_split`.

    Raises:
        ValueError: if a column is missing, or a row has no question or answer.
    """
    rows = _questions({"path": data, "split": split, "columns": columns})
    questions = _first(rows, limit)
    train_questions = None
    if train_split is not None:
        train = _questions({"path": data, "split": train_split, "columns": columns})
        train_questions = [train[i] for i in range(len(train))]
    images = [asked["image"] for asked in questions]
    return TestSet(images, questions=[[asked] for asked in questions], train_questions=train_questions)


def own_classes(data: str, split: str, columns: dict[str, str], limit: int) -> TestSet:
    """Images with a class name each, of the user's own. All classes of the split compete, whatever the limit.

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
    classes = dict.fromkeys(name.replace("_", " ") for name in rows.with_format(None)["caption"])
    first = _first(rows, limit)
    images = [load_image(row["image"], where=f"row {i}") for i, row in enumerate(first)]
    labels = [row["caption"].replace("_", " ") for row in first]
    return TestSet(images, labels=labels, class_names=list(classes))


def _questions(source: dict[str, Any]) -> QuestionRows:
    return load_source(question_source(source))


def _first(rows: Any, limit: int) -> list[dict[str, Any]]:
    return [rows[i] for i in range(len(rows) if limit == 0 else min(limit, len(rows)))]


__all__ = [
    "AFTER_TRAINING",
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
