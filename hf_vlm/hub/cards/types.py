"""The shape of the texts in model cards: of a family, of one of its heads, of an evaluation."""

from dataclasses import dataclass, field
from typing import Any

from ...metrics.descriptions import Description

CHECKPOINT = "CHECKPOINT"  # placeholder in a usage snippet: the name to load, quotation marks included
START = """import hf_vlm  # registers the architecture with the Auto classes
from PIL import Image
"""
NOT_EXAMINED = "Bias and safety were not examined. Do not use the model to judge people."


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of `results.json` as a card shows it.

    Args:
        description: Names of the task and of its metrics.
        dataset: Dataset type and name in the model index.
        note: What the numbers mean.
        labels: Row names of the card by key; they replace or extend those of `description`.
    """

    description: Description
    dataset: tuple[str, str]
    note: str = ""
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, str]:
        """Key of nested metrics -> name of their row, which stands below the row of their test set."""
        return {**self.description.rows, **self.labels}


@dataclass(frozen=True)
class HeadTexts:
    """What differs between the heads of a family: see [`CardTexts`]."""

    pipeline_tag: str
    tags: tuple[str, ...]
    usage: str


@dataclass(frozen=True)
class CardTexts:
    """The texts of one family's cards.

    Args:
        title: Name of the architecture.
        paper: Title of the paper.
        arxiv: The paper's number on arXiv.
        pipeline_tag: The task under which the Hub lists the base model.
        tags: Further search terms for the base model.
        description: One paragraph.
        usage: A Python snippet for the base model. It runs in a folder with an `image.png`; [`CHECKPOINT`] stands for
            the name to load.
        limits: Limits that do not depend on the training data.
        heads: Class name -> what differs for that head.
        evaluations: Name -> evaluations that replace or extend those that all families share.
        citation: The paper in BibTeX.
    """

    title: str
    paper: str
    arxiv: str
    pipeline_tag: str
    tags: tuple[str, ...]
    description: str
    usage: str
    limits: tuple[str, ...]
    heads: dict[str, HeadTexts] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    citation: str = ""

    def head(self, config: dict[str, Any]) -> HeadTexts:
        """The texts for the class that wrote a checkpoint with this config."""
        name = (config.get("architectures") or [""])[0]
        return self.heads.get(name, HeadTexts(self.pipeline_tag, self.tags, self.usage))


__all__ = ["CHECKPOINT", "NOT_EXAMINED", "START", "CardTexts", "Evaluation", "HeadTexts"]
