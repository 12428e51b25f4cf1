"""What a model card says of an architecture, of its heads and of an evaluation: the shape of the texts."""

from dataclasses import dataclass, field
from typing import Any

CHECKPOINT = "CHECKPOINT"  # stands in a usage snippet for the name to load, quotation marks included


@dataclass(frozen=True)
class Evaluation:
    """How one evaluation of `results.json` is shown.

    Args:
        title: Heading of its table.
        task: Task type and name in the model index.
        dataset: Data set type and name in the model index.
        sizes: Keys that count what was compared, with their column headings.
        metrics: Keys of the measured numbers, with their column headings and names in the model index.
        note: What the numbers are.
        rows: Keys of metrics within the metrics, each a row below its test set's, with what to call it.
        own: Those of them that are the model's own and so go into the model index.
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
class Head:
    """What differs between the heads of an architecture: see [`Architecture`]."""

    pipeline_tag: str
    tags: tuple[str, ...]
    usage: str


@dataclass(frozen=True)
class Architecture:
    """The texts of one model type.

    Args:
        title: Its name in the field.
        paper: Title of the paper.
        arxiv: The paper's number on arXiv.
        pipeline_tag: The task under which the Hub lists it.
        tags: More words to find it by.
        description: One paragraph.
        usage: A Python snippet that runs where `picture.png` is, with [`CHECKPOINT`] for the name to load.
        limits: What it cannot do, whatever it was trained on.
        heads: By the name of the class, what is different for a head; the above are the base model's.
        evaluations: By name, evaluations that are not those of [`EVALUATIONS`].
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
    heads: dict[str, Head] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    citation: str = ""

    def head(self, config: dict[str, Any]) -> Head:
        """What holds for the class that wrote a checkpoint with this config."""
        name = (config.get("architectures") or [""])[0]
        return self.heads.get(name, Head(self.pipeline_tag, self.tags, self.usage))


RECALLS = {
    "text_to_image_r1": "text to image R@1",
    "text_to_image_r5": "text to image R@5",
    "text_to_image_r10": "text to image R@10",
    "image_to_text_r1": "image to text R@1",
    "image_to_text_r5": "image to text R@5",
    "image_to_text_r10": "image to text R@10",
}
QUESTIONS = {
    "vqa_accuracy": "accuracy",
    "exact_match": "exact match",
    "vqa_accuracy_question_what": "accuracy, what",
    "vqa_accuracy_question_where": "accuracy, where",
    "vqa_accuracy_question_count": "accuracy, how many",
    "vqa_accuracy_question_colour": "accuracy, colour",
    "vqa_accuracy_question_yesno": "accuracy, yes or no",
}
OBJECTS = {
    "pope_accuracy": "accuracy",
    "pope_precision": "precision",
    "pope_recall": "recall",
    "pope_f1": "F1",
    "pope_yes_rate": "yes rate",
}
OTHER_RUNS = {"lora": "the same stage by LoRA"}
"""Rows of any evaluation that are other runs' results, by key."""
SCENES = ("hf_vlm_scenes", "Scenes of built-in emoji drawings")
BLIND = "the same beside a grey picture"
VQA_TASK = ("visual-question-answering", "Visual question answering")
POPE = Evaluation(
    title="Objects that are not there",
    task=VQA_TASK,
    dataset=("hf_vlm_scenes_pope", "Scenes of built-in emoji drawings, after objects"),
    sizes={"questions": "questions"},
    metrics=OBJECTS,
    note=(
        "Half of the questions ask for an object that is in the scene, half for one that is not: drawn at random, the "
        "most frequent, or the one most often beside what is there (POPE). Precision, recall and F1 are those of yes."
    ),
    rows={"blind": BLIND, "majority": "always yes"},
)

__all__ = [
    "BLIND",
    "CHECKPOINT",
    "OTHER_RUNS",
    "POPE",
    "QUESTIONS",
    "RECALLS",
    "SCENES",
    "VQA_TASK",
    "Architecture",
    "Evaluation",
    "Head",
]
