"""Results of a search and of an addition."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..data.sources.images import load_image
from ..terminal import printable
from .sheet import Hit
from .store import COLUMNS


@dataclass
class Match:
    """A search result: `score` is the cosine with the query; the other fields are those of the added item."""

    id: str
    kind: str
    text: str
    score: float
    path: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image | None:
        """The thumbnail, decoded.

        Raises:
            ImageError: if it cannot be read.
        """
        if self.thumbnail is None:
            return None
        return load_image(self.thumbnail, where=f"The thumbnail of {printable(self.id, 200)}")

    def hit(self) -> Hit:
        """The match as an entry of a result sheet."""
        return Hit(self.text or self.id, self.score, self.image)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Match":
        """A match from a row of the table with its score."""
        metadata = {name: value for name, value in row.items() if name not in (*COLUMNS, "score")}
        own = {name: row[name] for name in ("id", "kind", "text", "score", "path", "thumbnail")}
        return cls(**own, metadata=metadata)

    def to_dict(self) -> dict[str, Any]:
        """The match without its thumbnail, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "thumbnail"}


@dataclass
class AddReport:
    """Counts of an addition: new, replaced and kept rows, and one error for each skipped row."""

    added: int = 0
    replaced: int = 0
    kept: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Number of items processed."""
        return self.added + self.replaced + self.kept + len(self.errors)

    def __str__(self) -> str:
        parts = [f"{self.added} added", f"{self.replaced} replaced", f"{self.kept} there already"]
        return ", ".join(
            [*parts, f"{len(self.errors)} left out" + "".join(f"\n  {error}" for error in self.errors[:5])]
        )


__all__ = ["AddReport", "Match"]
