"""Balanced questions after objects, half of them absent (POPE, arXiv 2305.10355, section 4)."""

import random
from collections import Counter
from collections.abc import Sequence

from .scene_text import conflict, phrase

POPE_KINDS = ("random", "popular", "adversarial")
QUESTION = "Is there {phrase} in the picture?"


def pope_questions(
    objects: Sequence[Sequence[str]], seed: int = 0, question: str = QUESTION
) -> list[list[dict[str, str]]]:
    """For each picture and each way of choosing, one question after a thing that is there and one that is not.

    Args:
        objects: `(I,)`, names of what is in each picture; what may be absent is named in other pictures.
        seed: Decides what is asked.
        question: Its wording, with `{phrase}` for the object with its article.

    Returns:
        `(I,)`, dicts of `question`, `answer` ("yes" or "no") and `kind`: an absent object is drawn at `random`; is the
        most frequent one (`popular`); or is the one most often seen beside what is there (`adversarial`). Among equals
        chance decides. An object whose name may be said of another, as "cat" of a black cat, is never the absent one.

    Raises:
        ValueError: if a picture has no object, or all that are named could be in it.
    """
    counts = Counter(name for names in objects for name in {*names})
    beside: dict[str, Counter[str]] = {name: Counter() for name in counts}
    for names in objects:
        for name in {*names}:
            beside[name].update({*names} - {name})
    asked = []
    for number, names in enumerate(objects):
        rng = random.Random(f"{seed} pope {number}")
        there = sorted({*names})
        absent = [name for name in sorted(counts) if not any(conflict(name, other) for other in there)]
        if not there or not absent:
            raise ValueError(
                f"picture {number} shows {there}: nothing there, or nothing that is surely not, to ask for"
            )
        order = rng.sample(there, len(there))
        rng.shuffle(absent)
        chosen = {
            "random": absent[0],
            "popular": max(absent, key=counts.__getitem__),
            "adversarial": max(absent, key=lambda name: sum(beside[other][name] for other in there)),
        }
        rows = []
        for place, kind in enumerate(POPE_KINDS):
            for name, answer in ((order[place % len(order)], "yes"), (chosen[kind], "no")):
                rows.append({"question": question.format(phrase=phrase(name)), "answer": answer, "kind": kind})
        asked.append(rows)
    return asked


__all__ = ["POPE_KINDS", "pope_questions"]
