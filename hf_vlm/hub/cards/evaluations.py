"""The evaluations of model cards: the descriptions of the tasks, with the dataset, note and row names of a card.

An evaluation that is not listed here is shown as its description says, or under its own names.
"""

from dataclasses import replace

from ...metrics.descriptions import DESCRIPTIONS, Description
from .types import Evaluation

BLIND = "the same with a grey image"
MAJORITY = "most frequent training answer"
OTHER_RUNS = {"lora": "the same stage with LoRA"}
"""Rows of any evaluation that are results of other runs, by key."""
EMOJI = ("hf_vlm_emoji", "Built-in emoji drawings")
SCENES = ("hf_vlm_scenes", "Scenes of built-in emoji drawings")
EASY_VQA = ("easy_vqa", "easy-VQA")
TEST_SETS = {
    "unseen_style": "emoji of the training set, in a style not seen in training",
    "unseen_emoji": "held-out emoji, in the styles of the training set",
    "unseen_both": "held-out emoji, in a style not seen in training",
}

RETRIEVAL = Evaluation(
    DESCRIPTIONS["retrieval"],
    EMOJI,
    note=(
        "On the built-in emoji drawings, among all images or texts of the test set. R@k: share of queries with a "
        "correct match among the first k."
    ),
    labels={"reranked": "re-ranked by ITM", "chance": "chance"},
)
RERANKED_RETRIEVAL = replace(
    RETRIEVAL,
    dataset=SCENES,
    note=(
        "Between scenes and captions that name all objects and the background. By embeddings (ITC), and with the best "
        "candidates re-ranked by matching (ITM). R@k: share of queries with a correct match among the first k."
    ),
)
"""Retrieval by a model with a matching head."""

VQA = Evaluation(
    DESCRIPTIONS["vqa"],
    SCENES,
    note="Questions about scenes, each with one correct answer; accuracy over all, and by the kind of question.",
    labels={"blind": BLIND, "majority": f"{MAJORITY} of the kind"},
)
ON_EASY_VQA = Evaluation(
    replace(DESCRIPTIONS["vqa"], title="Questions of easy-VQA"),
    EASY_VQA,
    note=(
        "A fixed random sample of easy-VQA's test questions, about images of one coloured shape; most are yes/no "
        "questions."
    ),
    labels={"blind": BLIND, "majority": MAJORITY},
)


def with_unseen_wordings(evaluation: Evaluation) -> Evaluation:
    """The same questions as an instruction in other words. The model index tells the two apart by the dataset."""
    kind, name = evaluation.dataset
    return replace(
        evaluation,
        description=replace(evaluation.description, title=f"{evaluation.description.title} in unseen wordings"),
        dataset=(f"{kind}_unseen_wordings", f"{name}, unseen wordings"),
        note="The same questions as an instruction in wordings not used in training.",
    )


CAPTION_FILTER = Description(
    name="caption_filter",
    title="False captions found",
    summary="true captions against captions of another image or with a wrong attribute",
    hub_task=("image-text-matching", "Filtering of image-text pairs"),
    primary="roc_auc",
    metrics={
        "average_precision": "average precision",
        "roc_auc": "ROC AUC",
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "roc_auc_another_image": "ROC AUC, another image's",
        "roc_auc_wrong_object": "ROC AUC, wrong object",
        "roc_auc_wrong_colour": "ROC AUC, wrong colour",
        "roc_auc_wrong_number": "ROC AUC, wrong number",
        "roc_auc_wrong_left_right": "ROC AUC, left or right",
        "roc_auc_wrong_above_below": "ROC AUC, above or below",
    },
    sizes={"pairs": "captions", "bad": "false captions"},
    rows={
        "itm": "ITM, threshold from validation",
        "itc": "ITC, threshold from validation",
        "clip": "CLIP, threshold from validation",
        "blind": BLIND,
    },
)

EVALUATIONS = {
    "retrieval": RETRIEVAL,
    "hard_negatives": Evaluation(
        DESCRIPTIONS["hard_negatives"],
        SCENES,
        note=(
            "On scenes composed of these drawings: share of pairs in which the true caption scores higher than one "
            "with a wrong word, over all and by the kind of word. Chance is one half."
        ),
        labels={"blind": BLIND, "itm_blind": "by ITM, with a grey image"},
    ),
    "caption": Evaluation(
        DESCRIPTIONS["caption"],
        SCENES,
        note="Against all true captions of each scene. CIDEr lies between 0 and 10; papers report 100 times its value.",
        labels={"blind": BLIND},
    ),
    "vqa": VQA,
    "vqa_unseen_wordings": with_unseen_wordings(VQA),
    "easy_vqa": ON_EASY_VQA,
    "easy_vqa_unseen_wordings": with_unseen_wordings(ON_EASY_VQA),
    "pope": Evaluation(
        DESCRIPTIONS["pope"],
        ("hf_vlm_scenes_pope", "Scenes of built-in emoji drawings, object presence"),
        note=(
            "Balanced yes/no questions about object presence. Absent objects are random, the most frequent ones, or "
            "those that most often occur together with the objects in the scene. Precision, recall and F1 are for yes."
        ),
        labels={"blind": BLIND, "majority": "always yes"},
    ),
    "caption_filter": Evaluation(
        CAPTION_FILTER,
        SCENES,
        note=(
            "Captions of scenes; some belong to another scene or have one wrong attribute. A caption counts as false "
            "if its probability of a match is below one half. In the rows below, the threshold is the one with the "
            "best F1 on validation scenes."
        ),
    ),
}

__all__ = ["EVALUATIONS", "OTHER_RUNS", "RERANKED_RETRIEVAL", "TEST_SETS"]
