"""Balanced yes/no questions about object presence (POPE, arXiv 2305.10355, section 4)."""

import random
from collections import Counter
from collections.abc import Sequence

from .scene_text import conflict, phrase

POPE_KINDS = ("random", "popular", "adversarial")
QUESTION = "Is there {phrase} in the picture?"


def pope_questions(
    objects: Sequence[Sequence[str]], seed: int = 0, question: str = QUESTION
) -> list[list[dict[str, str]]]:
    """Questions for each image: per kind, one about a present object and one about an absent object.

    Args:
        objects: `(I,)`, names of the objects in each image. Absent objects are taken from the other images.
        seed: Seed of the choice of objects.
        question: Wording, with `{phrase}` for the object with its article.

    Returns:
        `(I,)`, lists of dicts with `question`, `answer` ("yes" or "no") and `kind`. The absent object is drawn at
        random (`random`), is the most frequent one (`popular`), or co-occurs most often with the image's objects
        (`adversarial`). Ties are broken at random. A name that could also describe a present object, such as "cat" for
        a black cat, is never the absent one.

    Raises:
        ValueError: if an image has no object, or every name could describe one of its objects.
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
                f"image {number} has the objects {there}: give at least one, and other images with other objects"
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
