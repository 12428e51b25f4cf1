"""Object hallucination by yes/no questions (POPE, arXiv 2305.10355): accuracy, precision, recall, F1, yes rate.

Half of the questions name an object that is present. A model that always says yes has accuracy 0.5, F1 0.667 and yes
rate 1, so report the yes rate together with the other metrics.
"""

import re
from collections.abc import Sequence

NEGATIONS = frozenset({"no", "not"})


def says_yes(answer: str) -> bool:
    """Whether an answer counts as yes, as in POPE: no `no` or `not` in its first sentence."""
    return NEGATIONS.isdisjoint(_words(answer.split(".")[0]))


def pope_metrics(
    predictions: Sequence[str], answers: Sequence[str], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """POPE accuracy, precision, recall, F1 and yes rate.

    Args:
        predictions: `(Q,)`, the model's answers.
        answers: `(Q,)`, `"yes"` or `"no"`.
        kinds: `(Q,)`, how absent objects were chosen: in POPE `random`, `popular` or `adversarial`.

    Returns:
        `pope_accuracy`; `pope_precision`, `pope_recall` and `pope_f1` of yes (0 if undefined); `pope_yes_rate`, the
        share of yes answers; `pope_unclear`, the share of answers with neither yes nor no (POPE counts these as yes);
        `questions`; `pope_accuracy_{kind}` and `pope_f1_{kind}`.

    Raises:
        ValueError: if the lengths differ, there are no questions, or an answer is neither yes nor no.

    Example:

        metrics = pope_metrics(["Yes, there is.", "Yes."], ["yes", "no"])
        print(metrics["pope_accuracy"], metrics["pope_yes_rate"])  # 0.5 1.0
    """
    kinds = kinds if kinds is not None else [""] * len(answers)
    if not len(predictions) == len(answers) == len(kinds) or len(answers) == 0:
        raise ValueError(
            f"{len(predictions)} predictions, {len(answers)} answers, {len(kinds)} kinds: must be equal, at least 1"
        )
    if unknown := sorted(set(answers) - {"yes", "no"}):
        raise ValueError(f"answers must be yes or no, got {unknown[0]!r}")
    found = [says_yes(text) for text in predictions]
    truth = [text == "yes" for text in answers]
    metrics = {f"pope_{name}": value for name, value in _scores(found, truth).items()}
    metrics["pope_yes_rate"] = sum(found) / len(found)
    metrics["pope_unclear"] = sum(_words(text).isdisjoint({"yes"} | NEGATIONS) for text in predictions) / len(found)
    metrics["questions"] = float(len(found))
    for kind in sorted({*kinds} - {""}):
        rows = [row for row, name in enumerate(kinds) if name == kind]
        scores = _scores([found[row] for row in rows], [truth[row] for row in rows])
        metrics |= {f"pope_{name}_{kind}": scores[name] for name in ("accuracy", "f1")}
    return metrics


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def _scores(found: Sequence[bool], truth: Sequence[bool]) -> dict[str, float]:
    pairs = list(zip(found, truth, strict=True))
    right_yes = sum(said and is_there for said, is_there in pairs)
    precision, recall = right_yes / max(1, sum(found)), right_yes / max(1, sum(truth))
    return {
        "accuracy": sum(said == is_there for said, is_there in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
    }


__all__ = ["pope_metrics", "says_yes"]
