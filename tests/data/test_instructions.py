"""Instructions: true for their images, with other wordings in training than in test, mixed by square roots."""

import importlib.util
import re
from collections import Counter
from functools import cache
from pathlib import Path
from string import Formatter

import datasets
import pytest
from PIL import Image

from hf_vlm.data import (
    SceneRows,
    SceneStream,
    caption_instructions,
    easy_vqa_images,
    easy_vqa_questions,
    mix_by_sqrt,
    question_instructions,
    scene_instructions,
)
from hf_vlm.data.builtin.instruction_templates import TASKS, TRAIN_WORDINGS, UNSEEN_WORDINGS, wordings_of
from hf_vlm.data.builtin.scene_text import plural
from hf_vlm.data.builtin.scenes import BACKGROUNDS

NUM_SCENES = 150
NUMBERS = ["none", "one", "two", "three", "four"]
SIDES = "to the left of|to the right of|above|below"


@pytest.fixture(scope="module")
def rows() -> SceneRows:
    return SceneRows(SceneStream(), NUM_SCENES)


@pytest.fixture(scope="module")
def scenes(rows: SceneRows) -> list[dict]:
    return [rows.stream.scene(index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def tables(rows: SceneRows) -> dict[str, datasets.Dataset]:
    return scene_instructions(rows, seed=3)


@cache
def pattern(wording: str) -> re.Pattern:
    parts = Formatter().parse(wording)
    return re.compile("".join(re.escape(text) + (f"(?P<{field}>.+)" if field else "") for text, field, *_ in parts))


def asked(row: dict, wordings: dict = TRAIN_WORDINGS) -> dict[str, str]:
    """The fields of the instruction, found by the wording that fits it with the shortest fields."""
    found = [match for text in wordings[row["task"]] if (match := pattern(text).fullmatch(row["instruction"]))]
    assert found, row["instruction"]
    return min((match.groupdict() for match in found), key=lambda fields: sum(map(len, fields.values())))


def on_side(thing: dict, words: str, other: dict) -> bool:
    """Read from the boxes' edges, apart from the code under test."""
    left, top, right, bottom = thing["box"]
    other_left, other_top, other_right, other_bottom = other["box"]
    if words == "to the left of":
        return right <= other_left
    if words == "to the right of":
        return left >= other_right
    return bottom <= other_top if words == "above" else top >= other_bottom


def named(scene: dict, name: str) -> dict:
    (thing,) = [thing for thing in scene["objects"] if thing["name"] == name]
    return thing


def test_rows_are_as_described(tables: dict[str, datasets.Dataset]) -> None:
    assert list(tables) == list(TASKS)
    for task, table in tables.items():
        assert table.column_names == ["index", "source", "task", "instruction", "response"]
        assert set(table["task"]) == {task}
        assert set(table["source"]) == {"scenes"}
        assert all(text.strip() for name in ("instruction", "response") for text in table[name])
        assert table["index"][0] < 5
        assert max(table["index"]) > NUM_SCENES - 9
        assert all(asked(row) is not None for row in table)


def test_captions_and_questions_are_the_scenes_own(tables: dict[str, datasets.Dataset], scenes: list[dict]) -> None:
    captions = [(index, caption) for index, scene in enumerate(scenes) for caption in scene["captions"]]
    assert list(zip(tables["caption"]["index"], tables["caption"]["response"], strict=True)) == captions
    expected = [(i, row["question"], row["answer"]) for i, scene in enumerate(scenes) for row in scene["questions"]]
    assert [(row["index"], asked(row)["question"], row["response"]) for row in tables["vqa"]] == expected


def test_long_captions_are_left_out(rows: SceneRows) -> None:
    few = SceneRows(rows.stream, 30, max_words=9)
    short = scene_instructions(few, tasks=["caption"])["caption"]
    assert short["response"][:] == [caption for index in range(30) for caption in few[index]["caption"]]
    assert 30 <= len(short) < 90


def test_classification_has_one_right_option(tables: dict[str, datasets.Dataset], scenes: list[dict]) -> None:
    places, kinds = Counter(), Counter()
    for row in tables["classification"]:
        scene, fields = scenes[row["index"]], asked(row)
        options = fields["options"].split(", ")
        assert len(set(options)) == len(options) == 4
        is_colour = "background" in fields["question"]
        true = {scene["background"]} if is_colour else {thing["name"] for thing in scene["objects"]}
        assert true & set(options) == {row["response"]}
        assert not is_colour or set(options) <= set(BACKGROUNDS)
        places[options.index(row["response"])] += 1
        kinds[is_colour] += 1
    assert kinds == {True: NUM_SCENES, False: NUM_SCENES}
    assert min(places.values()) > 0.7 * max(places.values())


def test_matching_is_balanced_and_right(tables: dict[str, datasets.Dataset], scenes: list[dict]) -> None:
    answers = Counter(tables["matching"]["response"])
    assert set(answers) == {"yes", "no"}
    assert answers["yes"] == answers["no"]
    for row in tables["matching"]:
        twins = scenes[row["index"]]["hard_negatives"]
        assert asked(row)["caption"] in [twin["caption" if row["response"] == "yes" else "negative"] for twin in twins]
        assert (asked(row)["caption"] in scenes[row["index"]]["captions"]) == (row["response"] == "yes")


def check_sides(scene: dict, question: str, response: str) -> bool:
    match = re.fullmatch(rf"How many things are ({SIDES}) the (.+), and which\?", question)
    if not match:
        return False
    anchor = named(scene, match[2])
    there = [thing for thing in scene["objects"] if thing is not anchor and on_side(thing, match[1], anchor)]
    number, _, listed = response.partition(": ")
    assert number == NUMBERS[len(there)]
    for name, count in Counter(thing["name"] for thing in there).items():
        wanted = rf"an? {re.escape(name)}" if count == 1 else f"{NUMBERS[count]} {plural(name)}"
        assert re.search(rf"(^|, | and ){wanted}($|, | and )", listed), (listed, wanted)
    assert bool(listed) == bool(there)
    return True


def check_comparison(scene: dict, question: str, response: str) -> bool:
    match = re.fullmatch(rf"the (.+), because it is ({SIDES}) the (.+)", response)
    if not match:
        return False
    first, second = named(scene, match[1]), named(scene, match[3])
    assert on_side(first, match[2], second)
    extreme = {"further to the left": (0, -1), "further to the right": (2, 1), "higher": (1, -1), "lower": (3, 1)}
    asked_for = re.match(rf"Which is ({'|'.join(extreme)}) in the picture, the ", question)
    edge, sign = extreme[asked_for[1]]
    assert sign * first["box"][edge] > sign * second["box"][edge]
    assert all(f"the {thing['name']}" in question for thing in (first, second))
    return True


def check_numbers(scene: dict, question: str, response: str) -> bool:
    match = re.fullmatch(r"Are there more (.+) or more (.+)\?", question)
    if not match:
        return False
    counts = {plural(name): n for name, n in Counter(thing["name"] for thing in scene["objects"]).items()}
    first, second = counts[match[1]], counts[match[2]]
    answer, reason = response.split(", because there ")
    more = match[1] if first > second else match[2]
    assert answer == ("neither" if first == second else f"more {more}")
    listed = [f"{NUMBERS[n]} {name}" for name, n in counts.items() if n > 1 and name in match.groups()]
    assert all(text in reason for text in listed)
    assert reason.startswith("are " if max(first, second) > 1 else "is ")
    return True


def test_reasoning_is_true(tables: dict[str, datasets.Dataset], scenes: list[dict]) -> None:
    sorts = Counter()
    for row in tables["reasoning"]:
        question, scene = asked(row)["question"], scenes[row["index"]]
        checks = (check_sides, check_comparison, check_numbers)
        (right,) = [check.__name__ for check in checks if check(scene, question, row["response"])]
        sorts[right] += 1
    assert len(sorts) == 3
    assert min(sorts.values()) > 20


def test_which_is_named_first_does_not_tell(tables: dict[str, datasets.Dataset]) -> None:
    compared = [row for row in tables["reasoning"] if "because it is" in row["response"]]
    first = [f", {row['response'].split(', because')[0]} or " in row["instruction"] for row in compared]
    assert 0.35 < sum(first) / len(first) < 0.65


def test_the_seed_decides(rows: SceneRows, tables: dict[str, datasets.Dataset]) -> None:
    few = SceneRows(rows.stream, 20)
    again = scene_instructions(few, seed=3, tasks=["reasoning", "vqa"])
    assert list(again) == ["reasoning", "vqa"]
    for task, table in again.items():  # neither the other tasks nor the later scenes matter
        assert table.to_list() == tables[task].select(range(len(table))).to_list()
    other = scene_instructions(few, seed=4, tasks=["vqa"])["vqa"]
    assert other["response"][:] == again["vqa"]["response"][:]
    assert other["instruction"][:] != again["vqa"]["instruction"][:]


def test_unseen_wordings_ask_the_same(rows: SceneRows) -> None:
    few = SceneRows(rows.stream, 40)
    trained = scene_instructions(few, seed=1)
    for task, table in scene_instructions(few, seed=1, wordings="unseen").items():
        assert not set(table["instruction"]) & set(trained[task]["instruction"])
        assert all(asked(row, UNSEEN_WORDINGS) is not None for row in table)
        if task in ("caption", "vqa", "matching"):
            assert table["response"][:] == trained[task]["response"][:]


@pytest.mark.parametrize("task", list(TASKS))
def test_wordings(task: str) -> None:
    train, unseen = wordings_of(task), wordings_of(task, "unseen")
    assert len(set(train)) == len(train) >= 8
    assert len(set(unseen)) == len(unseen) >= 3
    assert not {text.lower().strip(" .?:") for text in train} & {text.lower().strip(" .?:") for text in unseen}
    for wording in (*train, *unseen):
        assert sorted(field for _, field, *_ in Formatter().parse(wording) if field) == sorted(TASKS[task])


@pytest.mark.parametrize(("task", "wordings"), [("poetry", "train"), ("vqa", "test")])
def test_unknown_wordings_are_refused(task: str, wordings: str) -> None:
    with pytest.raises(ValueError, match=r"poetry|'test'"):
        wordings_of(task, wordings)


def test_questions_as_instructions() -> None:
    asked_of = [
        {"question": "what colour?", "answer": "red", "index": 7},
        {"question": "how many?", "answer": ["2", "3", "3"], "index": 5},
    ]
    table = question_instructions(asked_of, "mine", seed=1)
    assert table["index"][:] == [7, 5]
    assert table["response"][:] == ["red", "3"]
    assert [asked(row)["question"] for row in table] == ["what colour?", "how many?"]
    assert set(table["source"]) == {"mine"}
    assert set(table["task"]) == {"vqa"}
    unseen = question_instructions(asked_of, "mine", 1, "unseen")
    assert [asked(row, UNSEEN_WORDINGS)["question"] for row in unseen] == ["what colour?", "how many?"]


def test_captions_as_instructions() -> None:
    table = caption_instructions([{"caption": ["a cat", "one cat"], "index": 4}, {"caption": "a dog"}], "mine")
    assert table["index"][:] == [4, 4, 1]
    assert table["response"][:] == ["a cat", "one cat", "a dog"]
    assert set(table["instruction"]) <= set(TRAIN_WORDINGS["caption"])


@pytest.mark.parametrize("row", [{"question": "", "answer": "a"}, {"question": "a", "answer": []}, {"answer": "a"}])
def test_questions_without_text_are_refused(row: dict) -> None:
    with pytest.raises(ValueError, match=r"mine, row 1: the (question|answer) must be a non-empty text"):
        question_instructions([{"question": "a", "answer": "b"}, row], "mine")


@pytest.mark.parametrize("caption", ["", " ", None, [], ["a", ""]])
def test_captions_without_text_are_refused(caption: object) -> None:
    with pytest.raises(ValueError, match="mine, row 0: the caption must be a non-empty text"):
        caption_instructions([{"caption": caption}], "mine")


def make_tables(**sizes: int) -> dict[str, datasets.Dataset]:
    return {
        name: question_instructions([{"question": f"{name} {i}", "answer": "a"} for i in range(size)], name)
        for name, size in sizes.items()
    }


def test_mixture_by_square_roots() -> None:
    mixture = mix_by_sqrt(make_tables(large=900, middle=100, small=25), seed=0, num_rows=9000)
    counts = Counter(mixture["source"])
    assert len(mixture) == 9000
    for name, root in (("large", 30), ("middle", 10), ("small", 5)):
        assert counts[name] / 9000 == pytest.approx(root / 45, abs=0.02)


def test_mixture_repeats_nothing_before_all_is_used() -> None:
    mixture = mix_by_sqrt(make_tables(large=400, small=25), seed=0, num_rows=1000)
    small = [row["index"] for row in mixture if row["source"] == "small"]
    passes = [small[start : start + 25] for start in range(0, len(small), 25)]
    assert len(passes) > 3
    assert all(sorted(order) == list(range(25)) for order in passes[:-1])
    assert len(set(passes[-1])) == len(passes[-1])
    assert passes[0] != passes[1]


def test_mixture_is_the_same_for_the_same_seed() -> None:
    tables = make_tables(a=50, b=10)
    mixture = mix_by_sqrt(tables, 1, 80).to_list()
    assert mix_by_sqrt(dict(reversed(tables.items())), 1, 80).to_list() == mixture
    assert mix_by_sqrt(tables, 2, 80).to_list() != mixture


def test_mixtures_that_cannot_be_are_refused() -> None:
    tables = make_tables(a=5)
    with pytest.raises(ValueError, match="b is empty"):
        mix_by_sqrt(tables | {"b": tables["a"].select([])}, 0, 5)
    with pytest.raises(ValueError, match="5 rows of 0 datasets"):
        mix_by_sqrt({}, 0, 5)
    with pytest.raises(ValueError, match="b and a differ in their columns"):
        mix_by_sqrt(tables | {"b": tables["a"].remove_columns("task")}, 0, 5)


@pytest.mark.parametrize(("split", "questions", "pictures"), [("train", 38575, 4000), ("test", 9673, 1000)])
def test_easy_vqa(split: str, questions: int, pictures: int) -> None:
    images, rows = easy_vqa_images(split), easy_vqa_questions(split)
    assert (len(rows), len(images)) == (questions, pictures)
    assert [row["id"] for row in images] == list(range(pictures))
    assert all(Path(row["image"]).name == f"{row['id']}.png" for row in images)
    assert all(Path(row["image"]).is_file() for row in images)
    assert {row["index"] for row in rows} == set(range(pictures))
    assert len({row["answer"] for row in rows}) == 13
    with Image.open(images[-1]["image"]) as picture:
        assert picture.size == (64, 64)


def test_easy_vqa_answers_are_of_that_picture() -> None:
    """A shape whose answer is red is red in the middle of its image, and likewise for blue."""
    images, seen = easy_vqa_images("test"), Counter()
    for row in easy_vqa_questions("test"):
        if row["answer"] in ("red", "blue") and row["question"] == "what color is the shape?":
            with Image.open(images[row["index"]]["image"]) as picture:
                # The shape's colour is the most frequent but one, or the most frequent of all.
                colours = sorted(picture.convert("RGB").getcolors(4096), reverse=True)[:2]
            channel = ("red", "green", "blue").index(row["answer"])
            assert any(max(colour) > 100 and colour.index(max(colour)) == channel for _, colour in colours)
            seen[row["answer"]] += 1
    assert len(seen) == 2


def test_easy_vqa_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'easy-vqa: pip install "hf-vlm\[data\]"'):
        easy_vqa_questions()


def test_easy_vqa_has_two_splits() -> None:
    with pytest.raises(ValueError, match="must be train or test, got 'validation'"):
        easy_vqa_images("validation")
