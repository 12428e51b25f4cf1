"""Scenes with captions of which a known share is false: the truth that a filter of pairs is measured against.

- A caption is bad in one of two ways: it is *another image's*, or it has *one wrong attribute*, a hard negative of its
  own image (`scene_text.py`).
- **Bad captions are false by construction.** Another image's comes from a scene no object of which could also have the
  name of an object that is here, and every caption names an object.
- All captions, good and bad, are drawn from the same pairs of a true caption and its false twin, so that their form
  tells nothing.
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
    """A caption and whether it is true of its scene.

    Args:
        caption: what a filter gets to see.
        corruption: `"good"`, `"another_image"`, or `"wrong_"` with the kind of hard negative, such as `"wrong_number"`.
        scene: the scene that it was written for, as a place in the list of scenes.
        true_caption: a true one of the same form.
    """

    caption: str
    corruption: str
    scene: int
    true_caption: str

    @property
    def is_bad(self) -> bool:
        """Whether it is false of the scene that it stands beside."""
        return self.corruption != GOOD


def corrupt_captions(
    scenes: Sequence[Mapping[str, Any]], another_image: float = 0.2, wrong_attribute: float = 0.2, seed: int = 0
) -> list[JudgedCaption]:
    """A caption for each scene, of which exact shares are false.

    Args:
        scenes: dicts with `objects` and `hard_negatives`, as `SceneStream.scene` makes them.
        another_image: share of scenes that get another scene's caption, rounded to whole scenes.
        wrong_attribute: share of scenes that get a caption with one wrong attribute.
        seed: decides which scenes and which captions.

    Raises:
        ValueError: shares below 0 or above 1 together; or no other scene's caption is false of a scene.
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
    """A scene none of whose objects could also have one of these names."""
    for other in rng.sample(range(len(rows)), len(rows)):
        if not any(conflict(thing["name"], name) for thing in rows[other][0] for name in names):
            return other
    raise ValueError(f"scene {here}: every other scene shows something of what it shows; take more scenes")


__all__ = ["ANOTHER_IMAGE", "GOOD", "JudgedCaption", "corrupt_captions"]
