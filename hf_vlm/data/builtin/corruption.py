"""Captions of scenes with a known share of false ones: ground truth for evaluating a filter of image-text pairs.

- A bad caption either belongs to *another image*, or has *one wrong attribute*: a hard negative of its own image
  (`scene_text.py`).
- **Bad captions are false by construction.** Every caption names an object. A caption of another image comes from a
  scene whose object names conflict with none in this scene.
- Good and bad captions come from the same pairs of a true caption and a hard negative, so their form gives no hint.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .scene_text import conflict

GOOD = "good"
ANOTHER_IMAGE = "another_image"
WRONG_ATTRIBUTE = "wrong"


@dataclass(frozen=True)
class JudgedCaption:
    """A caption, and whether it is true for the scene it is paired with.

    Args:
        caption: the caption that a filter sees.
        corruption: `"good"`, `"another_image"`, or `"wrong_"` and the kind of hard negative, such as `"wrong_number"`.
        scene: position, in the list of scenes, of the scene that the caption was written for.
        true_caption: a true caption of the same form.
    """

    caption: str
    corruption: str
    scene: int
    true_caption: str

    @property
    def is_bad(self) -> bool:
        """Whether the caption is false for the scene it is paired with."""
        return self.corruption != GOOD


def corrupt_captions(
    scenes: Sequence[Mapping[str, Any]], another_image: float = 0.2, wrong_attribute: float = 0.2, seed: int = 0
) -> list[JudgedCaption]:
    """One caption per scene; exact shares of the captions are false.

    Args:
        scenes: dicts with `objects` and `hard_negatives`, as returned by `SceneStream.scene`.
        another_image: share of scenes that get another scene's caption, rounded to whole scenes.
        wrong_attribute: share of scenes that get a caption with one wrong attribute, rounded likewise.
        seed: seed of the choice of scenes and captions.

    Raises:
        ValueError: if a share is below 0, the shares sum to more than 1, or every other scene's objects conflict with
            those of a scene.
    """
    if min(another_image, wrong_attribute) < 0 or another_image + wrong_attribute > 1:
        raise ValueError(
            f"the shares of bad captions must be >= 0 and at most 1 together, got {another_image} and {wrong_attribute}"
        )
    rng = random.Random(f"corruption {seed}")
    rows = [(list(scene["objects"]), list(scene["hard_negatives"])) for scene in scenes]
    order = rng.sample(range(len(rows)), len(rows))
    strangers = round(another_image * len(rows))
    exchanged = set(order[:strangers])
    changed = set(order[strangers : strangers + round(wrong_attribute * len(rows))])
    captions = []
    for i, (objects, pairs) in enumerate(rows):
        pair = rng.choice(pairs)
        if i in exchanged:
            other = _stranger(i, [thing["name"] for thing in objects], rows, rng)
            text = rng.choice(rows[other][1])["caption"]
            captions.append(JudgedCaption(text, ANOTHER_IMAGE, other, pair["caption"]))
        elif i in changed:
            captions.append(JudgedCaption(pair["negative"], f"{WRONG_ATTRIBUTE}_{pair['kind']}", i, pair["caption"]))
        else:
            captions.append(JudgedCaption(pair["caption"], GOOD, i, pair["caption"]))
    return captions


def _stranger(here: int, names: list[str], rows: list[tuple[list, list]], rng: random.Random) -> int:
    """A random scene whose object names conflict with none of the given names."""
    for other in rng.sample(range(len(rows)), len(rows)):
        if not any(conflict(thing["name"], name) for thing in rows[other][0] for name in names):
            return other
    raise ValueError(f"scene {here}: every other scene shows one of its objects; use more scenes")


__all__ = ["ANOTHER_IMAGE", "GOOD", "JudgedCaption", "corrupt_captions"]
