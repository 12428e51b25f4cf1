"""The tasks of the package, one section each, and what a checkpoint can be evaluated on.

A task runs when the model's head can do it (`hf_vlm/families.py`) and the test set has what it needs (`Task.needs`).

To add a task, write its section here and append it to `TASKS`, describe its metrics in `metrics/descriptions.py`, and
name it in `families.py` in the entries of the heads that support it.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from ..checkpoints import load_complete, read_config
from ..data.builtin.instruction_templates import Wordings
from ..data.builtin.pope import pope_questions
from ..families import heads, load_class
from ..metrics.descriptions import DESCRIPTIONS, RECALL_RANKS
from .prompts import caption_prompt
from .reports import (
    caption_report,
    hard_negative_report,
    pope_report,
    retrieval_report,
    vqa_report,
    zero_shot_report,
)
from .task import Evaluator, Task, TestSet

Reports = dict[str, dict[str, dict[str, Any]]]  # metrics by test set and task


# Retrieval


def run_retrieval(evaluator: Evaluator, test: TestSet) -> dict[str, Any]:
    """`retrieval_report`, re-ranked if the model has a matching head."""
    rerank = evaluator.settings.rerank if evaluator.matching and evaluator.settings.rerank > 0 else None
    options = {"rerank": rerank, "ks": RECALL_RANKS, **evaluator.settings.run_options}
    return retrieval_report(evaluator.model, evaluator.processor, test.images, test.captions or [], test.ids, **options)


RETRIEVAL = Task(DESCRIPTIONS["retrieval"], needs=("captions",), run=run_retrieval)


# Hard negatives


def run_hard_negatives(evaluator: Evaluator, test: TestSet) -> dict[str, Any]:
    """`hard_negative_report`, also by matching if the model has a matching head."""
    return hard_negative_report(
        evaluator.model,
        evaluator.processor,
        test.images,
        test.hard_negatives or [],
        matching=evaluator.matching,
        **evaluator.settings.run_options,
    )


HARD_NEGATIVES = Task(DESCRIPTIONS["hard_negatives"], needs=("hard_negatives",), run=run_hard_negatives)


# Captions


def run_caption(evaluator: Evaluator, test: TestSet) -> dict[str, Any]:
    """The metrics of `caption_report`."""
    settings = evaluator.settings
    prompt = settings.prompt
    if prompt is None:
        prompt = caption_prompt(evaluator.model, settings.wordings)
    prompt_tokens = 1 if prompt is None else len(evaluator.processor.tokenizer(prompt)["input_ids"])
    report, _ = caption_report(
        evaluator.captioner,
        evaluator.processor,
        test.images,
        test.references or [],
        prompt=prompt,
        prompting=evaluator.prompting,
        generate_options=evaluator.generate_options(settings.caption_tokens, prompt_tokens, settings.beams),
        **settings.run_options,
    )
    return report


CAPTION = Task(DESCRIPTIONS["caption"], needs=("references",), run=run_caption)


# Questions


def run_vqa(evaluator: Evaluator, test: TestSet, wordings: Wordings | None = None) -> dict[str, Any]:
    """The metrics of `vqa_report`.

    Args:
        evaluator: Model and settings.
        test: Images with questions.
        wordings: Set of instructions for a language model; by default that of the settings.

    Raises:
        ValueError: if answers are to be ranked by a language model, or there are no training questions.
    """
    settings, answers = evaluator.settings, None
    if settings.rank_answers:
        if evaluator.prompting is not None:
            raise ValueError(f"A {type(evaluator.model).__name__} cannot rank answers: leave out rank_answers.")
        if test.train_questions is None:
            raise ValueError("Ranking needs a list of answers, but there are no training questions: give train_split.")
        given = [asked["answer"] for asked in test.train_questions]
        answers = sorted({text for people in given for text in ([people] if isinstance(people, str) else people)})
    report, _ = vqa_report(
        evaluator.model,
        evaluator.processor,
        test.images,
        evaluator.worded(test.questions or [], wordings or settings.wordings),
        train_questions=test.train_questions,
        answer_list=answers,
        prompting=evaluator.prompting,
        generate_options=evaluator.generate_options(settings.answer_tokens),
        **settings.run_options,
    )
    return report


VQA = Task(DESCRIPTIONS["vqa"], needs=("questions",), run=run_vqa)
VQA_UNSEEN_WORDINGS = Task(
    DESCRIPTIONS["vqa_unseen_wordings"], needs=("questions",), run=partial(run_vqa, wordings="unseen")
)


# Object hallucination (POPE)


def run_pope(evaluator: Evaluator, test: TestSet) -> dict[str, Any]:
    """The metrics of `pope_report`."""
    settings = evaluator.settings
    return pope_report(
        evaluator.model,
        evaluator.processor,
        test.images,
        evaluator.worded(pope_questions(test.objects or []), settings.wordings),
        prompting=evaluator.prompting,
        generate_options=evaluator.generate_options(settings.answer_tokens),
        **settings.run_options,
    )


POPE = Task(DESCRIPTIONS["pope"], needs=("objects",), run=run_pope)


# Zero-shot classification


def run_zero_shot(evaluator: Evaluator, test: TestSet) -> dict[str, Any]:
    """`zero_shot_report` over all class names of the test set."""
    return zero_shot_report(
        evaluator.model,
        evaluator.processor,
        test.images,
        test.labels or [],
        test.class_names,
        **evaluator.settings.run_options,
    )


ZERO_SHOT = Task(DESCRIPTIONS["zero_shot"], needs=("labels",), run=run_zero_shot)


TASKS: tuple[Task, ...] = (RETRIEVAL, HARD_NEGATIVES, CAPTION, VQA, VQA_UNSEEN_WORDINGS, POPE, ZERO_SHOT)


def tasks_by_name() -> dict[str, Task]:
    """The registered tasks by name, in the order of `TASKS`."""
    return {task.name: task for task in TASKS}


def usable_tasks(fields: Collection[str]) -> tuple[str, ...]:
    """Names of the tasks for which a test set with these fields is enough."""
    return tuple(task.name for task in TASKS if task.can_use(fields))


def tasks_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the tasks that the model's head can do; none for a class without a head."""
    known = heads().get(type(model).__name__)
    return () if known is None else known.tasks


def chosen_tasks(model: PreTrainedModel, fields: Collection[str], task: str | None, data: str) -> list[str]:
    """Names of the tasks that both the head and the data allow, in the order of `TASKS`.

    Args:
        model: A model with a head.
        fields: Fields of `TestSet` that the data fill.
        task: The only task to run; None for all.
        data: Name of the data for error messages.

    Raises:
        ValueError: if no task is left, or the model's class has no tasks (such as one inside an adapter: merge it).
    """
    name, able, available = type(model).__name__, tasks_of(model), usable_tasks(fields)
    if not able:
        raise ValueError(f"A {name} cannot be evaluated, only {', '.join(heads())}.")
    if task is not None and task not in able:
        raise ValueError(f"A {name} cannot do {task!r}; it can do {', '.join(able)}.")
    if task is not None and task not in available:
        raise ValueError(f"{data} has no data for {task!r}, only for {', '.join(available)}.")
    tasks = [known for known in available if known in able and task in (None, known)]
    if not tasks:
        raise ValueError(
            f"A {name} can do {', '.join(able)}, but {data} only allows {', '.join(available)}: use other data."
        )
    return tasks


def run_tasks(evaluator: Evaluator, names: Sequence[str], test: TestSet) -> dict[str, dict[str, Any]]:
    """The metrics of each named task."""
    tasks = tasks_by_name()
    return {name: tasks[name].run(evaluator, test) for name in names}


def load_checkpoint(checkpoint: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model, with the head that its config names, and processor.

    Raises:
        ValueError: if the architecture is unknown, the checkpoint has no head, or its weights are not the model's.
    """
    config = read_config(checkpoint)
    name = (config.architectures or ["model without a name"])[0]
    if name not in heads():
        raise ValueError(
            f"{checkpoint} is a {name} ({config.model_type}), which cannot be evaluated, only {', '.join(heads())}. "
            f"Convert a checkpoint of transformers first: hf-vlm convert {checkpoint} FOLDER"
        )
    return load_complete(load_class(name), checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)


__all__ = [
    "TASKS",
    "Reports",
    "chosen_tasks",
    "load_checkpoint",
    "run_tasks",
    "tasks_by_name",
    "tasks_of",
    "usable_tasks",
]
