"""Evaluation of models on test sets. The metrics themselves are in `hf_vlm.metrics`; their functions are exported here.

- `task`: what a task is (`Task`, `TestSet`, `Evaluator`, `EvaluationSettings`); `tasks`: the tasks of the package.
- `test_sets`: the data, and `hf-vlm evaluate`; `tables`: the reports as text.
- `reports`: one function per task, model and data in, metrics and baselines out.
- `embed`: embeddings of many images and texts; `matching`: scores of image-text pairs (ITM).
- `writing`: generated captions and answers; `prompts` and `chat`: how language models are asked.
- `blocks`: iteration that encodes every image once.
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
