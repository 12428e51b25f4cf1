"""Descriptions of the evaluation tasks: names of their metrics for tables and model cards. No torch, no numbers.

A task writes a dictionary of numbers into `results.json`. Its description says which key is which: the table of
`hf-vlm evaluate`, the model card and the Hub's model index are all written from the description.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

RECALL_RANKS = (1, 5, 10)
EASY_VQA = "easy_"
"""Prefix of the tasks on easy-VQA's questions: `easy_vqa` is `vqa` on other data."""


@dataclass(frozen=True)
class Description:
    """Names of one task and of its metrics.

    Args:
        name: Name of the task, on the command line and in `results.json`.
        title: Heading in a model card.
        summary: What the task measures, in one line.
        hub_task: Task type and name in the Hub's model index.
        primary: Key of the primary metric, used where the task is summarised by one number.
        metrics: Metrics of a model card: key -> column heading, also the name in the model index.
        sizes: Keys that count the images, texts, pairs or questions: key -> column heading.
        columns: Metrics of the terminal's table: key -> column heading. A key `"chance.top1"` is found in the nested
            dictionary `chance`. By default those of `metrics`.
        kind_prefix: Every key with this prefix becomes a further column of the terminal's table.
        rows: Nested dictionaries with the same metrics, each a row of its own: key -> name of the row.
        own_rows: Those rows that describe the model itself and not a baseline. The model index lists them.
    """

    name: str
    title: str
    summary: str
    hub_task: tuple[str, str]
    primary: str
    metrics: Mapping[str, str]
    sizes: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    kind_prefix: str | None = None
    rows: Mapping[str, str] = field(default_factory=dict)
    own_rows: tuple[str, ...] = ()


RETRIEVAL = Description(
    name="retrieval",
    title="Retrieval",
    summary="images find their captions and captions their images; BLIP and BLIP-2 also re-rank by matching",
    hub_task=("image-text-retrieval", "Image-text retrieval"),
    primary="mean_recall",
    metrics={
        f"{way}_r{k}": f"{way.replace('_', ' ')} R@{k}"
        for way in ("text_to_image", "image_to_text")
        for k in RECALL_RANKS
    },
    sizes={"num_images": "images", "num_texts": "texts"},
    columns={
        **{f"text_to_image_r{k}": f"text>image R@{k}" for k in RECALL_RANKS},
        **{f"image_to_text_r{k}": f"image>text R@{k}" for k in RECALL_RANKS},
        **{f"chance.text_to_image_r{k}": f"chance R@{k}" for k in RECALL_RANKS},
    },
    rows={"reranked": "re-ranked"},
    own_rows=("reranked",),
)
HARD_NEGATIVES = Description(
    name="hard_negatives",
    title="Captions that differ in a word",
    summary="true captions against captions that differ in one word",
    hub_task=("image-text-matching", "True captions against hard negatives"),
    primary="accuracy",
    metrics={
        "accuracy": "accuracy",
        "accuracy_object": "accuracy, object",
        "accuracy_colour": "accuracy, colour",
        "accuracy_above_below": "accuracy, above or below",
        "accuracy_left_right": "accuracy, left or right",
        "accuracy_number": "accuracy, number",
    },
    sizes={"pairs": "pairs"},
    columns={"accuracy": "all"},
    kind_prefix="accuracy_",
    rows={"itm": "by ITM", "blind": "blind", "itm_blind": "by ITM, blind"},
    own_rows=("itm",),
)
CAPTION = Description(
    name="caption",
    title="Captions",
    summary="written captions against reference captions",
    hub_task=("image-to-text", "Image captioning"),
    primary="cider",
    metrics={"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"},
    sizes={"images": "images"},
    rows={"blind": "blind"},
)
VQA = Description(
    name="vqa",
    title="Questions",
    summary="answers to questions, written or chosen from a closed list",
    hub_task=("visual-question-answering", "Visual question answering"),
    primary="vqa_accuracy",
    metrics={
        "vqa_accuracy": "accuracy",
        "exact_match": "exact match",
        "vqa_accuracy_question_what": "accuracy, what",
        "vqa_accuracy_question_where": "accuracy, where",
        "vqa_accuracy_question_count": "accuracy, how many",
        "vqa_accuracy_question_colour": "accuracy, colour",
        "vqa_accuracy_question_yesno": "accuracy, yes or no",
    },
    sizes={"questions": "questions"},
    columns={"vqa_accuracy": "accuracy", "exact_match": "exact"},
    kind_prefix="vqa_accuracy_question_",
    rows={"blind": "blind", "majority": "majority answer"},
)
VQA_UNSEEN_WORDINGS = replace(
    VQA,
    name="vqa_unseen_wordings",
    title="Questions in unseen wordings",
    summary="the questions of `vqa` in an instruction that was not part of training",
)
POPE = Description(
    name="pope",
    title="Object hallucination (POPE)",
    summary="balanced yes/no questions about object presence",
    hub_task=VQA.hub_task,
    primary="pope_f1",
    metrics={
        "pope_accuracy": "accuracy",
        "pope_precision": "precision",
        "pope_recall": "recall",
        "pope_f1": "F1",
        "pope_yes_rate": "yes rate",
    },
    sizes={"questions": "questions"},
    columns={
        "pope_accuracy": "accuracy",
        "pope_precision": "precision",
        "pope_recall": "recall",
        "pope_f1": "f1",
        "pope_yes_rate": "yes rate",
        "pope_unclear": "unclear",
    },
    rows={"blind": "blind", "majority": "majority answer"},
)
ZERO_SHOT = Description(
    name="zero_shot",
    title="Zero-shot classification",
    summary="images classified by the nearest class name",
    hub_task=("zero-shot-image-classification", "Zero-shot image classification"),
    primary="top1",
    metrics={"top1": "top-1", "top5": "top-5", "mean_per_class_accuracy": "mean per class"},
    sizes={"images": "images", "classes": "classes"},
    rows={"chance": "chance"},
)
DESCRIPTIONS = {
    described.name: described
    for described in (RETRIEVAL, HARD_NEGATIVES, CAPTION, VQA, VQA_UNSEEN_WORDINGS, POPE, ZERO_SHOT)
}


__all__ = ["DESCRIPTIONS", "EASY_VQA", "RECALL_RANKS", "Description"]
