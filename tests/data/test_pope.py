"""Questions after objects, and what the answers are worth: closed forms and counts by hand."""

import random
from collections import Counter

import pytest

from hf_vlm.data.builtin.pope import POPE_KINDS, pope_questions
from hf_vlm.data.builtin.scene_text import phrase
from hf_vlm.evaluation import pope_metrics, says_yes

OBJECTS = [["cat", "dog"], ["cat", "cat", "apple"], ["cat", "tree"], ["dog", "tree"], ["black cat"], ["dog"]]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", True),
        ("Yes, there is a cat.", True),
        ("No.", False),
        ("no, there is no cat in it", False),
        ("There is not. Yes", False),
        ("Yes. But no dog", True),  # the first sentence counts
        ("nothing is known", True),  # POPE looks for whole words
        ("", True),
    ],
)
def test_what_counts_as_yes(answer: str, expected: bool) -> None:
    assert says_yes(answer) == expected


def test_counts_by_hand() -> None:
    """3 right yes, 1 wrong yes, 2 wrong no, 4 right no."""
    found = ["yes"] * 4 + ["no"] * 6
    truth = ["yes", "yes", "yes", "no", "yes", "yes", "no", "no", "no", "no"]
    scores = pope_metrics(found, truth)
    assert scores["pope_accuracy"] == pytest.approx(0.7)
    assert scores["pope_precision"] == pytest.approx(3 / 4)
    assert scores["pope_recall"] == pytest.approx(3 / 5)
    assert scores["pope_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert scores["pope_yes_rate"] == pytest.approx(0.4)
    assert scores["pope_unclear"] == 0
    assert scores["questions"] == 10


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("yes", (0.5, 2 / 3, 1.0, 0.0)), ("no", (0.5, 0.0, 0.0, 0.0)), ("a cat", (0.5, 2 / 3, 1.0, 1.0))],
)
def test_the_same_answer_to_everything(answer: str, expected: tuple[float, ...]) -> None:
    scores = pope_metrics([answer] * 8, ["yes", "no"] * 4)
    names = ("pope_accuracy", "pope_f1", "pope_yes_rate", "pope_unclear")
    assert tuple(scores[name] for name in names) == pytest.approx(expected)


def test_kinds_are_scored_by_themselves() -> None:
    rng = random.Random(0)
    found, truth = ([rng.choice(["yes", "no"]) for _ in range(60)] for _ in range(2))
    kinds = [POPE_KINDS[i % 3] for i in range(60)]
    scores = pope_metrics(found, truth, kinds)
    for place, kind in enumerate(POPE_KINDS):
        alone = pope_metrics(found[place::3], truth[place::3])
        assert scores[f"pope_accuracy_{kind}"] == alone["pope_accuracy"]
        assert scores[f"pope_f1_{kind}"] == alone["pope_f1"]


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [([], [], "at least 1"), (["yes"], ["yes", "no"], "must be equal"), (["yes"], ["maybe"], "must be yes or no")],
)
def test_what_is_refused(found: list[str], truth: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pope_metrics(found, truth)


def test_questions_are_true_and_balanced() -> None:
    asked = pope_questions(OBJECTS)
    names = {f"Is there {phrase(name)} in the picture?": name for of_image in OBJECTS for name in of_image}
    for there, rows in zip(OBJECTS, asked, strict=True):
        for row in rows:
            assert (names[row["question"]] in there) == (row["answer"] == "yes")
    counts = Counter((row["kind"], row["answer"]) for rows in asked for row in rows)
    assert counts == dict.fromkeys(((kind, answer) for kind in POPE_KINDS for answer in ("yes", "no")), len(OBJECTS))


def test_absent_objects_are_chosen_as_their_kind_says() -> None:
    def absent(number: int, kind: str) -> str:
        (row,) = (row for row in asked[number] if (row["kind"], row["answer"]) == (kind, "no"))
        return row["question"]

    asked = pope_questions(OBJECTS)
    assert absent(5, "popular") == "Is there a cat in the picture?"  # in three of the six
    with_cats = ("dog", "tree")
    assert absent(1, "adversarial") in {f"Is there a {name} in the picture?" for name in with_cats}
    assert absent(1, "popular") == "Is there a dog in the picture?"
    assert "cat" not in "".join(absent(4, kind) for kind in POPE_KINDS)  # a black cat is one
    assert len({absent(5, "random")} | {pope_questions(OBJECTS, seed)[5][1]["question"] for seed in range(20)}) > 1


def test_questions_follow_from_the_seed() -> None:
    assert pope_questions(OBJECTS, 1) == pope_questions(OBJECTS, 1)
    assert pope_questions(OBJECTS, 1) != pope_questions(OBJECTS, 2)


@pytest.mark.parametrize("objects", [[["cat"]], [["cat"], []], [["cat"], ["black cat"]]])
def test_pictures_of_which_nothing_can_be_asked_are_refused(objects: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"image \d has the objects"):
        pope_questions(objects)
