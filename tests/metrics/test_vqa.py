"""VQA metrics against the challenge's rules, its published numbers, and brute force over the subsets of people."""

import random
from itertools import combinations

import pytest

from hf_vlm.evaluation import majority_answer, majority_answers, normalize_answer, vqa_metrics


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        # The examples of the challenge's page.
        ("Two", "2"),
        ("100,978", "100978"),
        ("the cat", "cat"),
        ("dont", "don't"),
        ("2.5", "2.5"),
        ("a.m.", "am"),
        # Punctuation leaves a space, or nothing next to a space.
        ("t-shirt", "t shirt"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("yes!", "yes"),
        ("what ?", "what"),
        ("1,000/2", "10002"),
        ("it's 10:30", "it's 10:30"),
        (".5 5.", ".5 5"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("A dog on The mat", "dog on mat"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("yall'd've oclock twas", "y'all'd've o'clock 'twas"),
        ("  two\nred\tdogs ", "2 red dogs"),
        ("wed hes", "wed he's"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalize(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal
    assert normalize_answer(normal) == normal


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_ten_people(matches: int, expected: float) -> None:
    people = ["blue"] * matches + ["red"] * (10 - matches)
    assert vqa_metrics(["blue"], [people])["vqa_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("people", range(1, 13))
def test_brute_force_over_people_left_out(people: int) -> None:
    needed = min(3, people - 1)
    for matches in range(people + 1):
        answers = ["blue"] * matches + ["red"] * (people - matches)
        if people == 1:
            expected = float(matches)
        else:
            subsets = list(combinations(answers, people - 1))
            expected = sum(min(subset.count("blue") / needed, 1) for subset in subsets) / len(subsets)
        assert vqa_metrics(["blue"], [answers])["vqa_accuracy"] == pytest.approx(expected)
    assert vqa_metrics(["blue"], [["blue"] * people])["vqa_accuracy"] == 1


def test_one_answer_is_exact_match() -> None:
    metrics = vqa_metrics(["Yes.", "two", "circle"], [["yes"], ["2"], ["square"]])
    assert metrics == {"vqa_accuracy": pytest.approx(2 / 3), "exact_match": pytest.approx(2 / 3), "questions": 3}


def test_unanimous_answers_are_normalised_too() -> None:
    assert vqa_metrics(["Yes", "t shirt"], [["yes"] * 10, ["t-shirt"] * 10])["vqa_accuracy"] == 1


def test_exact_match_is_of_the_most_frequent_answer() -> None:
    people = ["Blue"] * 2 + ["blue"] * 3 + ["red"] * 5
    for prediction, expected in (("blue", 1), ("red", 1), ("green", 0)):
        assert vqa_metrics([prediction], [people])["exact_match"] == expected
    assert vqa_metrics(["blue"], [[*people, "red"]])["exact_match"] == 0


def test_types() -> None:
    predictions = ["yes", "no", "2", "red"]
    answers = [["yes"], ["yes"], ["two"], ["blue"]]
    metrics = vqa_metrics(predictions, answers, ["is", "is", "how many", "what"], ["y/n", "y/n", "number", "other"])
    assert metrics == {
        "vqa_accuracy": 0.5,
        "exact_match": 0.5,
        "questions": 4,
        "vqa_accuracy_question_how many": 1,
        "questions_question_how many": 1,
        "vqa_accuracy_question_is": 0.5,
        "questions_question_is": 2,
        "vqa_accuracy_question_what": 0,
        "questions_question_what": 1,
        "vqa_accuracy_answer_number": 1,
        "questions_answer_number": 1,
        "vqa_accuracy_answer_other": 0,
        "questions_answer_other": 1,
        "vqa_accuracy_answer_y/n": 0.5,
        "questions_answer_y/n": 2,
    }
    assert all(type(value) is float for value in metrics.values())


def test_order_changes_nothing() -> None:
    generator = random.Random(0)
    answers = [generator.choices(["a red", "Red", "blue", "two", "2"], k=10) for _ in range(40)]
    predictions = generator.choices(["red", "blue", "2", "no"], k=40)
    types = generator.choices(["what", "how"], k=40)
    expected = vqa_metrics(predictions, answers, types)
    assert 0.2 < expected["vqa_accuracy"] < 0.95
    order = generator.sample(range(40), 40)
    shuffled = [generator.sample(answers[i], 10) for i in order]
    assert vqa_metrics([predictions[i] for i in order], shuffled, [types[i] for i in order]) == expected


def test_majority() -> None:
    train = [["yes", "Yes.", "no"], "no", "the two", ["2", "two"], "two"]
    assert majority_answer(train) == "2"
    assert majority_answer(["red", "blue", "red", "blue", "green"]) == "blue"
    types = ["is", "is", "how many", "how many", "is"]
    assert majority_answers(train, types) == {"how many": "2", "is": "no"}
    # Its accuracy is its share.
    answers = [["red"]] * 3 + [["blue"]] * 7
    assert vqa_metrics([majority_answer(answers)] * 10, answers)["vqa_accuracy"] == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"no training answers"):
        majority_answer([])
    with pytest.raises(ValueError, match=r"5 train_answers and 1 question_types"):
        majority_answers(train, ["is"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), r"0 predictions and 0 answers: must be equal, and at least 1"),
        ((["a"], [["a"], ["b"]]), r"1 predictions and 2 answers"),
        ((["a"], [["a"]], ["is", "is"]), r"1 predictions and 2 question_types"),
        ((["a"], [["a"]], None, []), r"1 predictions and 0 answer_types"),
        ((["a", None], [["a"], ["b"]]), r"predictions, row 1: None is not a string"),
        ((["a", "b"], [["a"], []]), r"answers, row 1: \[\] is not a list of at least one string"),
        ((["a", "b"], [["a"], "b"]), r"answers, row 1: 'b' is not a list"),
        ((["a", "b"], [["a"], ["b", 2]]), r"answers, row 1: 2 is not a string"),
    ],
)
def test_bad_input_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vqa_metrics(*arguments)
