"""The built-in images as image-caption pairs, for training and for the three test sets."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

MAX_KEYWORDS = 6
TEST_SPLITS = ("unseen_style", "unseen_emoji", "unseen_both")


def emoji_captions(name: str, keywords: Sequence[str]) -> list[str]:
    """Training captions of an emoji: its name (twice), the name in a phrase, and the name with each of six keywords.

    The list is finite, so that embeddings of a frozen text tower can be cached.
    """
    return [name, name, f"an emoji of {name}", *(f"{name}, {keyword}" for keyword in keywords[:MAX_KEYWORDS])]


def emoji_pairs(split: Dataset, names_only: bool = False) -> list[dict[str, Any]]:
    """Rows for [`PairDataset`], decoded once and held in memory (about 36 kB each at 96 pixels).

    Args:
        split: A split of [`load_emoji`].
        names_only: Use only the name as caption, as in evaluation; otherwise all of [`emoji_captions`].

    Returns:
        Dicts with `image` (RGBA), `caption` (list of strings) and `id`. All styles of an emoji share its `id`, so its
        drawings are positives of each other's captions.
    """
    return [
        {
            "image": row["image"],
            "caption": [row["name"]] if names_only else emoji_captions(row["name"], row["keywords"]),
            "id": row["emoji_id"],
        }
        for row in split
    ]


__all__ = ["TEST_SPLITS", "emoji_captions", "emoji_pairs"]
