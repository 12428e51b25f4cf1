"""How evaluations are shown in model cards. An evaluation that is not described here is shown under its own names."""

from dataclasses import replace

from .types import Evaluation

BLIND = "the same with a grey image"
MAJORITY = "most frequent training answer"
OTHER_RUNS = {"lora": "the same stage with LoRA"}
"""Rows of any evaluation that are results of other runs, by key."""
EMOJI = ("hf_vlm_emoji", "Built-in emoji drawings")
SCENES = ("hf_vlm_scenes", "Scenes of built-in emoji drawings")
EASY_VQA = ("easy_vqa", "easy-VQA")
VQA_TASK = ("visual-question-answering", "Visual question answering")
RETRIEVAL_SIZES = {"num_images": "images", "num_texts": "texts"}
TEST_SETS = {
    "unseen_style": "emoji of the training set, in a style not seen in training",
    "unseen_emoji": "held-out emoji, in the styles of the training set",
    "unseen_both": "held-out emoji, in a style not seen in training",
}

RECALLS = {
    "text_to_image_r1": "text to image R@1",
    "text_to_image_r5": "text to image R@5",
    "text_to_image_r10": "text to image R@10",
    "image_to_text_r1": "image to text R@1",
    "image_to_text_r5": "image to text R@5",
    "image_to_text_r10": "image to text R@10",
}
ANSWERS = {
    "vqa_accuracy": "accuracy",
    "exact_match": "exact match",
    "vqa_accuracy_question_what": "accuracy, what",
    "vqa_accuracy_question_where": "accuracy, where",
    "vqa_accuracy_question_count": "accuracy, how many",
    "vqa_accuracy_question_colour": "accuracy, colour",
    "vqa_accuracy_question_yesno": "accuracy, yes or no",
}

RETRIEVAL = Evaluation(
    title="Retrieval",
    task=("image-text-retrieval", "Image-text retrieval"),
    dataset=EMOJI,
    sizes=RETRIEVAL_SIZES,
    metrics=RECALLS,
    note=(
        "On the built-in emoji drawings, among all images or texts of the test set. R@k: share of queries with a "
        "correct match among the first k."
    ),
)
RERANKED_RETRIEVAL = replace(
    RETRIEVAL,
    dataset=SCENES,
    note=(
        "Between scenes and captions that name all objects and the background. By embeddings (ITC), and with the best "
        "candidates re-ranked by matching (ITM). R@k: share of queries with a correct match among the first k."
    ),
    rows={"reranked": "re-ranked by ITM", "chance": "chance"},
    own=("reranked",),
)
"""Retrieval by a model with a matching head."""

VQA = Evaluation(
    title="Questions",
    task=VQA_TASK,
    dataset=SCENES,
    sizes={"questions": "questions"},
    metrics=ANSWERS,
    note="Questions about scenes, each with one correct answer; accuracy over all, and by the kind of question.",
    rows={"blind": BLIND, "majority": f"{MAJORITY} of the kind"},
)
ON_EASY_VQA = replace(
    VQA,
    title="Questions of easy-VQA",
    dataset=EASY_VQA,
    note=(
        "A fixed random sample of easy-VQA's test questions, about images of one coloured shape; most are yes/no "
        "questions."
    ),
    rows={"blind": BLIND, "majority": MAJORITY},
)


def with_unseen_wordings(evaluation: Evaluation) -> Evaluation:
    """The same questions as an instruction in other words. The model index tells the two apart by the dataset."""
    kind, name = evaluation.dataset
    return replace(
        evaluation,
        title=f"{evaluation.title} in unseen wordings",
        dataset=(f"{kind}_unseen_wordings", f"{name}, unseen wordings"),
        note="The same questions as an instruction in wordings not used in training.",
    )


EVALUATIONS = {
    "retrieval": RETRIEVAL,
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
            "On scenes composed of these drawings: share of pairs in which the true caption scores higher than one "
            "with a wrong word, over all and by the kind of word. Chance is one half."
        ),
        rows={"itm": "by ITM", "blind": BLIND, "itm_blind": "by ITM, with a grey image"},
        own=("itm",),
    ),
    "caption": Evaluation(
        title="Captions",
        task=("image-to-text", "Image captioning"),
        dataset=SCENES,
        sizes={"images": "images"},
        metrics={"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"},
        note="Against all true captions of each scene. CIDEr lies between 0 and 10; papers report 100 times its value.",
        rows={"blind": BLIND},
    ),
    "vqa": VQA,
    "vqa_unseen_wordings": with_unseen_wordings(VQA),
    "easy_vqa": ON_EASY_VQA,
    "easy_vqa_unseen_wordings": with_unseen_wordings(ON_EASY_VQA),
    "pope": Evaluation(
        title="Object hallucination (POPE)",
        task=VQA_TASK,
        dataset=("hf_vlm_scenes_pope", "Scenes of built-in emoji drawings, object presence"),
        sizes={"questions": "questions"},
        metrics={
            "pope_accuracy": "accuracy",
            "pope_precision": "precision",
            "pope_recall": "recall",
            "pope_f1": "F1",
            "pope_yes_rate": "yes rate",
        },
        note=(
            "Balanced yes/no questions about object presence. Absent objects are random, the most frequent ones, or "
            "those that most often occur together with the objects in the scene. Precision, recall and F1 are for yes."
        ),
        rows={"blind": BLIND, "majority": "always yes"},
    ),
    "caption_filter": Evaluation(
        title="False captions found",
        task=("image-text-matching", "Filtering of image-text pairs"),
        dataset=SCENES,
        sizes={"pairs": "captions", "bad": "false captions"},
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
            "Captions of scenes; some belong to another scene or have one wrong attribute. A caption counts as false "
            "if its probability of a match is below one half. In the rows below, the threshold is the one with the "
            "best F1 on validation scenes."
        ),
        rows={
            "itm": "ITM, threshold from validation",
            "itc": "ITC, threshold from validation",
            "clip": "CLIP, threshold from validation",
            "blind": BLIND,
        },
    ),
}

__all__ = ["EVALUATIONS", "OTHER_RUNS", "RERANKED_RETRIEVAL", "TEST_SETS"]
