"""What a model card says of every architecture and evaluation; no number of a run is here."""

from ...families import FAMILIES, load_reference
from .types import BLIND, CHECKPOINT, QUESTIONS, RECALLS, SCENES, Architecture, Evaluation

ARCHITECTURES: dict[str, Architecture] = {
    family.model_type: load_reference(family.card) for family in FAMILIES.values() if family.card
}

EVALUATIONS = {
    "retrieval": Evaluation(
        title="Retrieval",
        task=("image-text-retrieval", "Image-text retrieval"),
        dataset=("hf_vlm_emoji", "Built-in emoji drawings"),
        sizes={"num_images": "pictures", "num_texts": "texts"},
        metrics=RECALLS,
        note=(
            "On the built-in emoji drawings. R@k: how often a right one is among the first k; all pictures or all "
            "texts of the test set compete."
        ),
    ),
    "hard_negatives": Evaluation(
        title="Captions that differ in a word",
        task=("image-text-matching", "True captions against hard negatives"),
        dataset=SCENES,
        sizes={"pairs": "pairs"},
        metrics={
            "accuracy": "accuracy",
            "accuracy_object": "accuracy, object",
            "accuracy_colour": "accuracy, colour",
            "accuracy_above_below": "accuracy, above or below",
            "accuracy_left_right": "accuracy, left or right",
            "accuracy_number": "accuracy, number",
        },
        note=(
            "On scenes composed of these drawings: how often a picture prefers its true caption to one that differs in "
            "a word, in all and by what the word says. Chance is one half."
        ),
        rows={"itm": "by ITM", "blind": BLIND, "itm_blind": "by ITM, beside a grey picture"},
        own=("itm",),
    ),
    "caption": Evaluation(
        title="Captions",
        task=("image-to-text", "Image captioning"),
        dataset=SCENES,
        sizes={"images": "pictures"},
        metrics={"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"},
        note="Against all true captions of each scene. CIDEr lies between 0 and 10; papers print it times 100.",
        rows={"blind": BLIND},
    ),
    "vqa": Evaluation(
        title="Questions",
        task=("visual-question-answering", "Visual question answering"),
        dataset=SCENES,
        sizes={"questions": "questions"},
        metrics=QUESTIONS,
        note="Questions about scenes, each with one right answer, in all and by what they ask for.",
        rows={"blind": BLIND, "majority": "most frequent training answer of the kind"},
    ),
    "caption_filter": Evaluation(
        title="False captions found",
        task=("image-text-matching", "Filtering of image-text pairs"),
        dataset=SCENES,
        sizes={"pairs": "captions", "bad": "of these false"},
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
        note=(
            "Captions of scenes, some of them another scene's or with one wrong attribute; those that match with a "
            "probability below one half are called false, or, in the rows below, those below the threshold that is "
            "best on validation scenes."
        ),
        rows={
            "itm": "ITM, threshold from validation",
            "itc": "ITC, threshold from validation",
            "clip": "CLIP, threshold from validation",
            "blind": BLIND,
        },
    ),
}

TEST_SETS = {
    "unseen_style": "emoji of the training in a style that it never showed",
    "unseen_emoji": "emoji held out of the training, in the styles that it showed",
    "unseen_both": "emoji held out of the training, in a style that it never showed",
}

__all__ = ["ARCHITECTURES", "CHECKPOINT", "EVALUATIONS", "TEST_SETS"]
