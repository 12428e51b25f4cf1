"""Instructions with short responses, built from scenes, questions and captions, and mixed as in InstructBLIP.

- Tables of text: a row refers to its image by `source` and `index`. Many instructions share one image, and building a
  table decodes none.
- Responses about scenes are derived from boxes and colours, so they are correct. A spatial relation is used only if it
  holds for the whole boxes.
- Wordings and choices depend only on the seed, the task and the row number.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from ...terminal import quoted
from ..sources.errors import CaptionError
from ..sources.questions import QuestionRows
from ..sources.skipped import SkipReport
from .instruction_templates import TASKS, Wordings, wordings_of
from .scene_text import NUMBERS, OPPOSITES, conflict, holds, phrase, plural, reaches
from .scenes import BACKGROUNDS, SceneRows

NUM_OPTIONS = 4

INSTRUCTION_FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        **{name: datasets.Value("string") for name in ("source", "task", "instruction", "response")},
    }
)

Scene = Mapping[str, Any]
Asked = tuple[dict[str, str], str]  # fields of the wording, and response


class _Table:
    """Collects the rows of one task and draws a wording for each."""

    def __init__(self, source: str, task: str, wordings: Wordings):
        self.source, self.task, self.wordings = source, task, wordings_of(task, wordings)
        self.rows: list[tuple[int, str, str, str, str]] = []

    def add(self, index: int, fields: Mapping[str, str], response: str, rng: random.Random) -> None:
        instruction = rng.choice(self.wordings).format(**fields)
        self.rows.append((index, self.source, self.task, instruction, response))

    def dataset(self) -> datasets.Dataset:
        columns = zip(*self.rows, strict=True) if self.rows else [[]] * len(INSTRUCTION_FEATURES)
        table = {name: list(column) for name, column in zip(INSTRUCTION_FEATURES, columns, strict=True)}
        return datasets.Dataset.from_dict(table, features=INSTRUCTION_FEATURES)


def scene_instructions(
    rows: SceneRows, seed: int = 0, wordings: Wordings = "train", tasks: Sequence[str] = tuple(TASKS)
) -> dict[str, datasets.Dataset]:
    """Instructions about scenes, one table per task.

    Args:
        rows: The scenes.
        seed: Seed of wordings, options and reasoning questions.
        wordings: `"train"` or the held-out `"unseen"`.
        tasks: Names from `TASKS`. `caption`; `vqa`: all questions of the scene; `classification`: multiple choice about
            an object and the background; `matching`: yes/no, balanced over true captions and hard negatives;
            `reasoning`: positions and numbers, answered with a reason.

    Returns:
        Task -> dataset with `index` (the scene's row), `source` ("scenes"), `task`, `instruction` and `response`.

    Raises:
        ValueError: if a task or the wordings are unknown.
    """
    tables = {task: _Table("scenes", task, wordings) for task in tasks}
    for index in range(len(rows)):
        scene = rows.stream.scene(index)
        scene["captions"] = rows.short(scene["captions"])
        for task, table in tables.items():
            rng = random.Random(f"{seed} {task} {index}")
            for fields, response in _asked(task, scene, rows.stream.names, rng):
                table.add(index, fields, response, rng)
    return {task: table.dataset() for task, table in tables.items()}


def question_instructions(
    rows: Sequence[Mapping[str, Any]] | datasets.Dataset | QuestionRows,
    source: str,
    seed: int = 0,
    wordings: Wordings = "train",
    report: SkipReport | None = None,
) -> datasets.Dataset:
    """Questions as instructions of the task `vqa`.

    Args:
        rows: Dicts with `question` and `answer`: a text, or several people's answers. The most frequent answer is the
            response. `index` is the row of the image, by default the row of the question. No image is decoded.
        source: Value of the column `source`.
        seed: Seed of the wordings.
        wordings: `"train"` or the held-out `"unseen"`.
        report: Counts the rows without a question or an answer, which are left out. None: such a row raises.

    Returns:
        A dataset with the columns of `scene_instructions`.

    Raises:
        ValueError: if a question or an answer is missing or empty.
    """
    table = _Table(source, "vqa", wordings)

    def add(number: int, row: Mapping[str, Any]) -> None:
        row = rows.texts(number) if isinstance(rows, QuestionRows) else row
        question, said = row.get("question"), row.get("answer")
        people = [said] if isinstance(said, str) else list(said or [])
        answer = Counter(people).most_common(1)[0][0] if people else None
        for what, text in (("question", question), ("answer", answer)):
            _check_text(text, f"{source}, row {number}: the {what}")
        rng = random.Random(f"{seed} vqa {number}")
        table.add(int(row.get("index", number)), {"question": str(question)}, str(answer), rng)

    empty = ({} for _ in range(len(rows)))  # `add` reads the texts itself, so that a bad row can be left out
    texts = empty if isinstance(rows, QuestionRows) else _texts(rows, ["question", "answer", "index"])
    _add_rows(add, texts, source, len(rows), report)
    return table.dataset()


def caption_instructions(
    rows: Sequence[Mapping[str, Any]] | datasets.Dataset,
    source: str,
    seed: int = 0,
    wordings: Wordings = "train",
    report: SkipReport | None = None,
) -> datasets.Dataset:
    """Captions as responses to instructions of the task `caption`.

    Args:
        rows: Dicts with `caption`, a text or several; each caption becomes a row. A source from `load_source` needs
            `on_error="raise"`: the substitute for an unreadable image would not fit the caption.
        source, seed, wordings, report: See `question_instructions`.

    Raises:
        ValueError: if a caption is missing or empty.
    """
    table = _Table(source, "caption", wordings)

    def add(number: int, row: Mapping[str, Any]) -> None:
        said = row.get("caption")
        captions = [said] if isinstance(said, str) else list(said or [None])
        for caption in captions:
            _check_text(caption, f"{source}, row {number}: the caption")
        rng = random.Random(f"{seed} caption {number}")
        for caption in captions:
            table.add(int(row.get("index", number)), {}, caption, rng)

    _add_rows(add, _texts(rows, ["caption", "index"]), source, len(rows), report)
    return table.dataset()


def mix_by_sqrt(tables: Mapping[str, datasets.Dataset], seed: int, num_rows: int) -> datasets.Dataset:
    """Mixes datasets with probabilities proportional to the square roots of their sizes (InstructBLIP, section 2.4).

    The rows of each dataset come in a random order without repetition. After the last row a new order begins.

    Args:
        tables: Datasets with equal columns; their order does not matter.
        seed: Seed of the mixture.
        num_rows: Length of the mixture.

    Raises:
        ValueError: if there are no datasets, one is empty, columns differ or the length is not positive.
    """
    names = sorted(tables)
    empty = [name for name in names if len(tables[name]) == 0]
    if not names or empty or num_rows < 1:
        wrong = f"{empty[0]} is empty" if empty else f"{num_rows} rows of {len(names)} datasets were requested"
        raise ValueError(f"Cannot mix: {wrong}; give non-empty datasets and a positive number of rows.")
    for name in names:
        if tables[name].features != tables[names[0]].features:
            raise ValueError(f"Cannot mix: {name} and {names[0]} differ in their columns; make them equal.")
    sizes = np.array([len(tables[name]) for name in names])
    shares = np.sqrt(sizes)
    owner = np.random.default_rng(seed).choice(len(names), size=num_rows, p=shares / shares.sum())
    rows = np.empty(num_rows, dtype=np.int64)
    for number, size in enumerate(sizes):
        places = np.flatnonzero(owner == number)
        rng = np.random.default_rng((seed, number))
        passes = [rng.permutation(size) for _ in range(-(-len(places) // size))]
        if passes:
            rows[places] = np.concatenate(passes)[: len(places)] + sizes[:number].sum()
    return datasets.concatenate_datasets([tables[name] for name in names]).select(rows)


def _texts(rows: Any, columns: list[str]) -> Any:
    """The rows without other columns than the given ones, so that no image is decoded."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    return rows.with_format(None).select_columns([name for name in columns if name in rows.column_names])


def _add_rows(
    add: Callable[[int, Mapping[str, Any]], None],
    rows: Iterable[Mapping[str, Any]],
    source: str,
    count: int,
    report: SkipReport | None,
) -> None:
    """Adds each row to a table; a bad one raises, or is left out and counted."""
    tally = None if report is None else report.source(source, count)
    for number, row in enumerate(rows):
        try:
            add(number, row)
        except ValueError as error:
            if tally is None:
                raise
            tally.bad(error, number)
        else:
            if tally is not None:
                tally.good(number)


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise CaptionError(f"{what} must be a non-empty text, got {quoted(text)}; correct or remove the row.")


def _asked(task: str, scene: Scene, names: Sequence[str], rng: random.Random) -> list[Asked]:
    """All instructions about a scene in one task."""
    if task == "caption":
        return [({}, caption) for caption in scene["captions"]]
    if task == "vqa":
        return [({"question": row["question"]}, row["answer"]) for row in scene["questions"]]
    if task == "classification":
        return _classification(scene, names, rng)
    if task == "matching":
        return [({"caption": row[key]}, answer) for row in scene["hard_negatives"] for key, answer in _TWINS.items()]
    return [({"question": question}, response) for question, response in scene_reasoning(scene["objects"], rng)]


_TWINS = {"caption": "yes", "negative": "no"}


def _classification(scene: Scene, names: Sequence[str], rng: random.Random) -> list[Asked]:
    """Two multiple-choice questions, one about an object and one about the background."""
    there = [thing["name"] for thing in scene["objects"]]
    name, background = rng.choice(there), scene["background"]
    drawn = rng.sample(names, min(len(names), 10 * NUM_OPTIONS))
    absent = [other for other in drawn if not any(conflict(other, seen) for seen in there)][: NUM_OPTIONS - 1]
    colours = rng.sample([colour for colour in BACKGROUNDS if colour != background], NUM_OPTIONS - 1)
    asked = [("What colour is the background?", background, colours)]
    if absent:
        asked.append(("Which of these is in the picture?", name, absent))
    rows = []
    for question, answer, others in asked:
        options = [answer, *others]
        rng.shuffle(options)
        rows.append(({"question": question, "options": ", ".join(options)}, answer))
    return rows


def scene_reasoning(objects: Sequence[dict[str, Any]], rng: random.Random) -> list[tuple[str, str]]:
    """One reasoning question of each kind that the scene allows, with an answer and a reason."""
    counts = Counter(thing["name"] for thing in objects)
    singles = [thing for thing in objects if counts[thing["name"]] == 1]
    sorts = [_sides(objects, singles), _comparisons(singles), _numbers(counts)]
    return [rng.choice(asked) for asked in sorts if asked]


def _sides(objects: Sequence[dict[str, Any]], singles: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """How many objects are on one side of an anchor, and which. Skipped if an object is only partly on that side."""
    asked = []
    for anchor in singles:
        others = [thing for thing in objects if thing is not anchor]
        for words in OPPOSITES:
            there = [thing for thing in others if holds(thing, words, anchor)]
            # Sides without objects are skipped, because "none" would be the majority answer.
            if not there or any(reaches(thing, words, anchor) for thing in others if thing not in there):
                continue
            counts = Counter(thing["name"] for thing in there)
            number = {1: "one", **NUMBERS}[len(there)]
            listed = _listing([phrase(name, count) for name, count in counts.items()])
            question = f"How many things are {words} the {anchor['name']}, and which?"
            asked.append((question, f"{number}: {listed}"))
    return asked


def _comparisons(singles: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Which of two objects is further to one side."""
    ask = {"to the left of": "further to the left", "to the right of": "further to the right"}
    ask |= {"above": "higher", "below": "lower"}
    return [
        (f"Which is {ask[words]} in the picture, {choice}?", f"the {a['name']}, because it is {words} the {b['name']}")
        for a in singles
        for b in singles
        for words in OPPOSITES
        if a is not b and holds(a, words, b)
        for choice in (f"the {a['name']} or the {b['name']}", f"the {b['name']} or the {a['name']}")
    ]


def _numbers(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Which of two objects is more numerous. Equal counts are skipped, because they would be the majority answer."""
    asked = []
    for first, second in itertools.permutations([name for name in counts if plural(name)], 2):
        more, fewer = (first, second) if counts[first] > counts[second] else (second, first)
        if counts[more] == counts[fewer]:
            continue
        there = f"there {'are' if counts[more] > 1 else 'is'} {_listing([phrase(n, counts[n]) for n in (more, fewer)])}"
        asked.append(
            (f"Are there more {plural(first)} or more {plural(second)}?", f"more {plural(more)}, because {there}")
        )
    return asked


def _listing(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))


__all__ = [
    "INSTRUCTION_FEATURES",
    "caption_instructions",
    "mix_by_sqrt",
    "question_instructions",
    "scene_instructions",
    "scene_reasoning",
]
