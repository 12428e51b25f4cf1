"""Questions about images. Random choices depend only on seed, epoch and row, as in `pairs.py`."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..sources.mixing import Mixture, Weights, check_weights, mix
from ..sources.questions import question_source
from ..sources.rows import OnError, Rows
from ..sources.skipped import SkipReport


class Question(TypedDict):
    """One example: an image, a question, its answers with weights that sum to 1, and its row."""

    image: Image.Image
    question: str
    answers: list[str]
    weights: list[float]
    index: int
    seed: int


def weigh_answers(answers: str | Sequence[str]) -> tuple[list[str], list[float]]:
    """The distinct answers, and the share of people who gave each (BLIP, section 5.3)."""
    counts = Counter([answers] if isinstance(answers, str) else answers)
    total = sum(counts.values())
    return list(counts), [count / total for count in counts.values()]


def make_question(row: dict[str, Any], index: int, seed: int, epoch: int) -> Question:
    """Chooses one question of a row.

    Args:
        row: `image`, and either `question` with `answer` (a text, or one text per person asked), or `questions`, a list
            of dicts with these two, from which one is chosen.
        index: The row's number.
        seed: Decides, together with epoch and index, the question and the example's seed.
        epoch: The number of the pass.

    Raises:
        ValueError: if question or answers are missing or empty.
    """
    rng = np.random.default_rng((seed, epoch, index))
    asked = row["questions"][int(rng.integers(len(row["questions"])))] if row.get("questions") else row
    question, answer = asked.get("question", ""), asked.get("answer")
    said = [answer] if isinstance(answer, str) else answer or []
    if not said or not all(isinstance(text, str) and text.strip() for text in (question, *said)):
        raise ValueError(f"Row {index} lacks a question or an answer: {question!r}, {answer!r}. Remove or fix it.")
    answers, weights = weigh_answers(said)
    return {
        "image": row["image"],
        "question": question,
        "answers": answers,
        "weights": weights,
        "index": index,
        "seed": int(rng.integers(2**63)),
    }


class QuestionDataset(Dataset):
    """One question per row, chosen again each epoch.

    Args:
        rows: A sequence of the dicts that [`make_question`] takes.
        seed: Decides questions and augmentation.
    """

    def __init__(self, rows: Rows, seed: int = 0):
        self.rows = rows
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see the new epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Question:
        return make_question(self.rows[index], index, self.seed, int(self.epoch))


def load_questions(
    sources: Sequence[dict[str, Any]],
    weights: Weights | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    report: SkipReport | None = None,
) -> QuestionDataset:
    """Opens the sources that a YAML file lists; arguments as in `load_pairs`, columns as in [`question_source`]."""
    opened = [question_source(source) for source in sources]
    check_weights(opened, weights)
    rows = mix(opened, weights, seed, on_error, report)
    assert isinstance(rows, Mixture)  # questions are not streamed
    return QuestionDataset(rows, seed)


__all__ = [
    "Question",
    "QuestionDataset",
    "load_questions",
    "make_question",
    "weigh_answers",
]
