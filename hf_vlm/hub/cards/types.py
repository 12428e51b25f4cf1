"""The shape of the texts in model cards: of a family, of one of its heads, of an evaluation."""

from dataclasses import dataclass, field
from typing import Any

CHECKPOINT = "CHECKPOINT"  # placeholder in a usage snippet: the name to load, quotation marks included
START = """import hf_vlm  # registers the architecture with the Auto classes
from PIL import Image
"""
NOT_EXAMINED = "Bias and safety were not examined. Do not use the model to judge people."


@dataclass(frozen=True)
class Evaluation:
    """How one evaluation of `results.json` is shown.

    Args:
        title: Heading of its table.
        task: Task type and name in the model index.
        dataset: Dataset type and name in the model index.
        sizes: Keys that count images, texts, pairs or questions -> column headings.
        metrics: Keys of the measured numbers -> column headings, also the names in the model index.
        note: What the numbers mean.
        rows: Keys of nested metrics, each a row below its test set's -> names of the rows.
        own: The keys in `rows` that describe the model itself and not a baseline. The model index lists them too.
    """

    title: str
    task: tuple[str, str]
    dataset: tuple[str, str]
    sizes: dict[str, str]
    metrics: dict[str, str]
    note: str
    rows: dict[str, str] = field(default_factory=lambda: {"chance": "chance"})
    own: tuple[str, ...] = ()


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
