"""Evaluation: embeddings or scores in, a dictionary of floats out.

- `embed`: embeddings of many images and texts by a two-tower model.
- `retrieval`: recall at k both ways, and what chance gives.
- `zero_shot`: classification by prompt ensembles.
- `hard_negatives`: the true caption against one that differs in a word.
- `filtering`: bad image-text pairs found by a score.
- `captioning`: CIDEr, BLEU and ROUGE-L; `text`: the words that they count.
- `vqa`: soft accuracy and exact match of answers, and the majority's answer.
- `pope`: whether objects are said to be there that are not.
- `matching`: scores of image-text pairs by a model that sees both; `rerank`: retrieval with them.
- `writing`: captions and answers for a whole test set; `blocks`: what each of its images is encoded for, once.
- `suites`: the above on whole data sets, model and data in, report out.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from ..metrics.captioning import caption_metrics
    from ..metrics.filtering import best_threshold, filter_metrics
    from ..metrics.hard_negatives import hard_negative_metrics
    from ..metrics.pope import pope_metrics, says_yes
    from ..metrics.rerank import MATCH_TOLERANCE, rerank_metrics
    from ..metrics.retrieval import chance, retrieval_metrics, similarity_metrics
    from ..metrics.text import ptb_tokenize
    from ..metrics.vqa import majority_answer, majority_answers, normalize_answer, vqa_metrics
    from ..metrics.zero_shot import PROMPTS, class_prompts, zero_shot_classifier, zero_shot_metrics
    from .embed import embed_images, embed_texts
    from .matching import match_logits
    from .reports import (
        GREY,
        caption_report,
        hard_negative_report,
        pope_report,
        retrieval_report,
        vqa_report,
        zero_shot_report,
    )
    from .writing import Chatting, Prompting, answer_questions, caption_images, choose_answers
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "GREY",
    "MATCH_TOLERANCE",
    "PROMPTS",
    "Chatting",
    "Prompting",
    "answer_questions",
    "best_threshold",
    "caption_images",
    "caption_metrics",
    "caption_report",
    "chance",
    "choose_answers",
    "class_prompts",
    "embed_images",
    "embed_texts",
    "filter_metrics",
    "hard_negative_metrics",
    "hard_negative_report",
    "majority_answer",
    "majority_answers",
    "match_logits",
    "normalize_answer",
    "pope_metrics",
    "pope_report",
    "ptb_tokenize",
    "rerank_metrics",
    "retrieval_metrics",
    "retrieval_report",
    "says_yes",
    "similarity_metrics",
    "vqa_metrics",
    "vqa_report",
    "zero_shot_classifier",
    "zero_shot_metrics",
    "zero_shot_report",
]
