"""Visual question answering: soft accuracy of the VQA challenge, exact match, and the majority answer as a baseline.

- **Soft accuracy** (Antol et al., 2015; Goyal et al., 2017): every question has answers from ten people. An answer
  counts fully if at least three others gave it. The score is averaged over the ten ways of leaving one person out, so
  1, 2, 3 and 4 matches of ten give 0.3, 0.6, 0.9 and 1.
- **Fewer than ten answers**: the same average. With fewer than four, all others must agree instead of three, so that a
  unanimous answer still scores 1. A single answer is compared exactly (the challenge's program gives 0).
- **Both sides are always normalised** by the challenge's published rules. The challenge's program skips normalisation
  if all ten answers are the same string: `Yes` is then wrong where everybody said `yes`. Here it is correct.
- Report `majority_answer` of the training answers next to every accuracy.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from statistics import fmean

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(DIGITS)}
ARTICLES = frozenset({"a", "an", "the"})
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've"
    " he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't"
    " not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've"
    " somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's"
    " there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't"
    " what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're"
    " why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've".split()
)
# A contraction is recognised when one of its apostrophes is missing.
RESTORED = {word[: mark.start()] + word[mark.end() :]: word for word in CONTRACTIONS for mark in re.finditer("'", word)}
DIGIT_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")


def normalize_answer(answer: str) -> str:
    """An answer in the normal form of the VQA challenge (visualqa.org, "Evaluation").

    - Punctuation except `'` and `:` is removed next to a space, or if the answer has a number such as 1,000. Elsewhere
      it becomes a space. Full stops are removed unless a digit follows.
    - Then: lower case, number words up to ten as digits, no articles, missing apostrophes restored (`dont`).
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    plain, grouped = text, DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        joined = grouped or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if joined else " ")
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", plain).lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa_metrics(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    question_types: Sequence[str] | None = None,
    answer_types: Sequence[str] | None = None,
) -> dict[str, float]:
    """Soft accuracy and exact match over all questions, soft accuracy by type of question and of answer.

    Args:
        predictions: `(Q,)`, one answer per question.
        answers: `(Q,)`, the people's answers to each question: ten in VQA, one in many other datasets.
        question_types: `(Q,)`, such as "how many".
        answer_types: `(Q,)`, such as "yes/no".

    Returns:
        `vqa_accuracy`; `exact_match`, the share of predictions that equal a most frequent answer; `questions`, their
        number; for each type `vqa_accuracy_question_{type}` and `questions_question_{type}`, or `_answer_` for types of
        answer. Shares lie in [0, 1].

    Raises:
        ValueError: if the lengths differ, there are no questions, a question has no answers, or there is a non-string.

    Example:

        metrics = vqa_metrics(["a red one", "2"], [["red one"], ["two"]])
        print(metrics["vqa_accuracy"])  # 1.0
    """
    _check(predictions, answers, {"question_types": question_types, "answer_types": answer_types})
    normal = cache(normalize_answer)
    accuracies, matches = [], []
    for prediction, people in zip(predictions, answers, strict=True):
        counts = Counter(normal(answer) for answer in people)
        count = counts[normal(prediction)]
        accuracies.append(_soft_accuracy(count, len(people)))
        matches.append(count == max(counts.values()))
    metrics = {
        "vqa_accuracy": fmean(accuracies),
        "exact_match": fmean(matches),
        "questions": float(len(predictions)),
    }
    for kind, types in (("question", question_types), ("answer", answer_types)):
        groups: dict[str, list[float]] = {}
        for accuracy, name in zip(accuracies, types or [], strict=types is not None):
            groups.setdefault(name, []).append(accuracy)
        for name in sorted(groups):
            metrics[f"vqa_accuracy_{kind}_{name}"] = fmean(groups[name])
            metrics[f"questions_{kind}_{name}"] = float(len(groups[name]))
    return metrics


def majority_answer(train_answers: Sequence[str | Sequence[str]]) -> str:
    """The most frequent answer of a training set, normalised; the alphabetically first of equally frequent ones.

    Args:
        train_answers: One or several answers to each question; each counts once.

    Raises:
        ValueError: if there are no answers.
    """
    normal = cache(normalize_answer)
    counts = Counter(
        normal(answer) for people in train_answers for answer in ([people] if isinstance(people, str) else people)
    )
    if not counts:
        raise ValueError("there are no training answers: give at least one")
    return min(counts, key=lambda answer: (-counts[answer], answer))


def majority_answers(train_answers: Sequence[str | Sequence[str]], question_types: Sequence[str]) -> dict[str, str]:
    """`majority_answer` for each type of question: the baseline that knows only the question's type.

    Args:
        train_answers: `(Q,)`, as in `majority_answer`.
        question_types: `(Q,)`.

    Raises:
        ValueError: if the lengths differ, or a type has no answers.
    """
    if len(train_answers) != len(question_types):
        raise ValueError(f"{len(train_answers)} train_answers and {len(question_types)} question_types: must be equal")
    groups: dict[str, list[str | Sequence[str]]] = {}
    for people, name in zip(train_answers, question_types, strict=True):
        groups.setdefault(name, []).append(people)
    return {name: majority_answer(groups[name]) for name in sorted(groups)}


def _soft_accuracy(matches: int, people: int) -> float:
    """Mean over leaving one person out: matches among the others divided by the needed number, at most 1."""
    if people == 1:
        return float(matches)
    needed = min(3, people - 1)
    without_match, without_other = min((matches - 1) / needed, 1), min(matches / needed, 1)
    return (matches * without_match + (people - matches) * without_other) / people


def _check(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], types: dict[str, Sequence[str] | None]
) -> None:
    lengths = {"answers": len(answers)} | {name: len(values) for name, values in types.items() if values is not None}
    for name, length in lengths.items():
        if length != len(predictions) or length == 0:
            raise ValueError(f"{len(predictions)} predictions and {length} {name}: must be equal, and at least 1")
    for row, (prediction, people) in enumerate(zip(predictions, answers, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions, row {row}: {prediction!r} is not a string")
        if isinstance(people, str) or len(people) == 0:
            raise ValueError(f"answers, row {row}: {people!r} is not a list of at least one string")
        for answer in people:
            if not isinstance(answer, str):
                raise ValueError(f"answers, row {row}: {answer!r} is not a string")


__all__ = ["majority_answer", "majority_answers", "normalize_answer", "vqa_metrics"]
