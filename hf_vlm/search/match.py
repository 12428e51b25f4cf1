"""What a search and an addition return."""

import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .rows import COLUMNS
from .sheet import Hit


@dataclass
class Match:
    """Something found: `score` is the cosine with the query, the rest is as it was added."""

    id: str
    kind: str
    text: str
    score: float
    path: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image | None:
        """The thumbnail, decoded."""
        return None if self.thumbnail is None else Image.open(io.BytesIO(self.thumbnail))

    def hit(self) -> Hit:
        """For the sheet."""
        return Hit(self.text or self.id, self.score, self.image)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Match":
        """From a row of the table with its score."""
        metadata = {name: value for name, value in row.items() if name not in (*COLUMNS, "score")}
        own = {name: row[name] for name in ("id", "kind", "text", "score", "path", "thumbnail")}
        return cls(**own, metadata=metadata)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the thumbnail."""
        return {name: value for name, value in vars(self).items() if name != "thumbnail"}


@dataclass
class AddReport:
    """What an addition did: rows that are new, rows replaced, rows that were there already and not embedded again, and
    for each row left out the error that names it.
    """

    added: int = 0
    replaced: int = 0
    kept: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """How many items were dealt with."""
        return self.added + self.replaced + self.kept + len(self.errors)

    def __str__(self) -> str:
        parts = [f"{self.added} added", f"{self.replaced} replaced", f"{self.kept} there already"]
        return ", ".join(
            [*parts, f"{len(self.errors)} left out" + "".join(f"\n  {error}" for error in self.errors[:5])]
        )


__all__ = ["AddReport", "Match"]
