"""Matches as an aligned table for the terminal. Control characters in data are escaped."""

import unicodedata
from collections.abc import Sequence

from ..terminal import JOINERS, printable
from .match import Match

MAX_WIDTH = 60
VARIATIONS = ("\ufe0e", "\ufe0f")  # text or emoji form of the character before


def width(text: str) -> int:
    """Number of terminal cells that a text takes, by Unicode's width tables."""
    total = 0
    joined = False
    for each in text:
        if each in (*JOINERS, *VARIATIONS) or unicodedata.combining(each):
            joined = each == "\u200d"
            continue
        total += 0 if joined else 1 + (unicodedata.east_asian_width(each) in "WF")
        joined = False
    return total


def cell(text: str) -> str:
    """A printable text, truncated to `MAX_WIDTH` cells."""
    text = printable(text)
    if width(text) <= MAX_WIDTH:
        return text
    while width(text) > MAX_WIDTH - 1:
        text = text[:-1]
    return text + "…"


def matches_table(matches: Sequence[Match]) -> str:
    """A table of score, kind, text or caption, and id, best first."""
    lines = [["score", "kind", "text", "id"]]
    lines += [[f"{each.score:.3f}", each.kind, cell(each.text), cell(each.id)] for each in matches]
    widths = [max(width(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(text + " " * (widths[column] - width(text)) for column, text in enumerate(line)).rstrip()
        for line in lines
    )


__all__ = ["matches_table", "printable"]
