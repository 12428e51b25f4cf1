"""Reports: all metrics of one task for a model and a test set, with baselines.

- Two-tower models and the ITC heads of BLIP and BLIP-2: retrieval (with `rerank`, also re-ranked by ITM), hard
  negatives and zero-shot classification.
- Models that generate text: captions, answers and object hallucination (POPE).
- **Blind rows**: the same model with a grey image in place of every image. A correct blind answer comes from the text
  alone. Retrieval and classification need no blind row: with equal images the result is `chance`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..metrics.captioning import caption_metrics
from ..metrics.hard_negatives import hard_negative_metrics
from ..metrics.pope import pope_metrics
from ..metrics.rerank import MATCH_TOLERANCE, rerank_metrics
from ..metrics.retrieval import COSINE_TOLERANCE, chance, pair_cosines, retrieval_metrics, unit_images
from ..metrics.vqa import majority_answer, majority_answers, vqa_metrics
from ..metrics.zero_shot import PROMPTS, class_prompts, zero_shot_classifier, zero_shot_metrics
from .embed import embed_images, embed_texts
from .matching import match_logits
from .writing import Chatting, Prompting, answer_questions, caption_images, choose_answers

GREY = Image.new("RGB", (64, 64), (128, 128, 128))
"""The image of the blind rows."""

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def retrieval_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    captions: Sequence[str | Sequence[str]],
    ids: Sequence[int] | None = None,
    *,
    rerank: int | None = None,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Retrieval both ways over one test set.

    Args:
        images: `(I,)`.
        captions: `(I,)`, one or several captions per image; a caption repeated within an id counts once.
        ids: `(I,)`; images of equal id share their captions. By default every image has its own id.
        rerank: Number of candidates per query that are re-ranked by matching; requires a matching head.
        ks: Ranks at which recall is measured.
        batch_size: Images per forward pass.
        progress: Show progress bars.
        autocast_dtype: Autocast dtype, for instance `torch.bfloat16`; None: no autocast.

    Returns:
        The keys of `retrieval_metrics`, `num_images`, `num_texts`, and under `chance` the metrics of random scores.
        With `rerank` also that number, and under `reranked` the metrics of `rerank_metrics`.

    Raises:
        ValueError: if the lengths differ or there are no images.

    Example:

        report = retrieval_report(model, processor, images, captions)
        print(report["text_to_image_r1"], report["chance"]["text_to_image_r1"])
    """
    ids = list(range(len(images))) if ids is None else list(ids)
    if not len(images) == len(captions) == len(ids):
        raise ValueError(
            f"{len(images)} images, {len(captions)} captions and {len(ids)} ids: give one of each per image."
        )
    pairs = {
        (image_id, text): None
        for image_id, texts in zip(ids, captions, strict=True)
        for text in ([texts] if isinstance(texts, str) else texts)
    }
    text_ids, texts = [image_id for image_id, _ in pairs], [text for _, text in pairs]
    run_options: dict[str, Any] = {"progress": progress, "autocast_dtype": autocast_dtype}
    image_embeds = embed_images(model, processor, images, batch_size, **run_options)
    text_embeds = embed_texts(model, processor, texts, **run_options)
    report: dict[str, Any] = retrieval_metrics(image_embeds, text_embeds, text_ids, ids, ks=ks)
    report |= {"num_images": len(images), "num_texts": len(texts), "chance": chance(text_ids, ids, ks=ks)}
    if rerank is None:
        return report

    def score_pairs(candidates: torch.Tensor) -> torch.Tensor:
        return match_logits(model, processor, images, texts, candidates, **run_options)[:, 1]

    reranked = rerank_metrics(image_embeds, text_embeds, score_pairs, text_ids, ids, k=rerank, ks=ks)
    return report | {"rerank": rerank, "reranked": reranked}


def hard_negative_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    hard_negatives: Sequence[Sequence[Mapping[str, str]]],
    *,
    matching: bool = False,
    batch_size: int = 64,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Hard-negative accuracy: the share of pairs whose true caption scores above one that differs in a word.

    Args:
        images: `(I,)`.
        hard_negatives: `(I,)`, for each image dicts with `caption` (true), `negative` (false) and `kind`.
        matching: Also score by the log-odds of a match (ITM); requires a matching head.
        batch_size: Images per forward pass.
        progress: Show progress bars.
        autocast_dtype: Autocast dtype, for instance `torch.bfloat16`; None: no autocast.

    Returns:
        The keys of `hard_negative_metrics`, scored by embedding similarity (ITC), and under `blind` the same with a
        grey image. With `matching`, `itm` and `itm_blind` hold the same scored by matching. Chance is 0.5.
    """
    rows = [(i, pair) for i, pairs in enumerate(hard_negatives) for pair in pairs]
    texts = sorted({pair[key] for _, pair in rows for key in ("caption", "negative")})
    position = {text: i for i, text in enumerate(texts)}
    owner = torch.tensor([i for i, _ in rows])
    true, false = (torch.tensor([position[pair[key]] for _, pair in rows]) for key in ("caption", "negative"))
    kinds = [pair["kind"] for _, pair in rows]
    run_options: dict[str, Any] = {"progress": progress, "autocast_dtype": autocast_dtype}
    text_embeds = embed_texts(model, processor, texts, **run_options)

    def by_embeddings(images: Sequence[Image.Image], owner: torch.Tensor) -> dict[str, float]:
        image_embeds = unit_images(embed_images(model, processor, images, batch_size, **run_options))
        pairs = (torch.stack([owner, chosen], dim=1) for chosen in (true, false))
        right, wrong = (pair_cosines(image_embeds, text_embeds, of) for of in pairs)
        return hard_negative_metrics(right, wrong, kinds, tie_tolerance=COSINE_TOLERANCE)

    def by_matching(images: Sequence[Image.Image], owner: torch.Tensor) -> dict[str, float]:
        pairs, inverse = torch.stack([owner.repeat(2), torch.cat([true, false])], dim=1).unique(
            dim=0, return_inverse=True
        )
        logits = match_logits(model, processor, images, texts, pairs, **run_options)
        right, wrong = (logits[:, 1] - logits[:, 0])[inverse].chunk(2)
        return hard_negative_metrics(right, wrong, kinds, tie_tolerance=MATCH_TOLERANCE)

    grey = torch.zeros_like(owner)
    report: dict[str, Any] = {**by_embeddings(images, owner), "blind": by_embeddings([GREY], grey)}
    if matching:
        report |= {"itm": by_matching(images, owner), "itm_blind": by_matching([GREY], grey)}
    return report


def caption_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    references: Sequence[str | Sequence[str]],
    *,
    prompt: str | None = None,
    prompting: Prompting | Chatting | None = None,
    generate_options: Mapping[str, Any] = NO_OPTIONS,
    batch_size: int = 32,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Generated captions of all images against their references.

    Args:
        images: `(I,)`.
        references: `(I,)`, one or several true captions per image.
        prompt: Text that captions begin with; not scored. With `prompting`, the instruction.
        prompting: As in `answer_questions`.
        generate_options: Options of transformers' `generate`.
        batch_size, progress, autocast_dtype: As in `caption_images`.

    Returns:
        A report and the captions. The report has the keys of `caption_metrics`, `images` (their number), and under
        `blind` the metrics of the caption for a grey image.

    Raises:
        ValueError: if the lengths differ, there are no images, or an image has no reference.
    """
    truths = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    options: dict[str, Any] = {"progress": progress, "autocast_dtype": autocast_dtype, **generate_options}

    def write(images: Sequence[Image.Image]) -> list[str]:
        if prompting is None:
            return caption_images(model, processor, images, prompt, batch_size, **options)
        rows, prompts = range(len(images)), [prompt or ""] * len(images)
        return answer_questions(model, processor, images, prompts, rows, batch_size, prompting=prompting, **options)

    captions = write(images)
    blind = write([GREY]) * len(captions)
    report = {**caption_metrics(captions, truths), "images": len(captions), "blind": caption_metrics(blind, truths)}
    return report, captions


def vqa_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[Sequence[Mapping[str, Any]]],
    *,
    train_questions: Sequence[Mapping[str, Any]] | None = None,
    answer_list: Sequence[str] | None = None,
    prompting: Prompting | Chatting | None = None,
    generate_options: Mapping[str, Any] = NO_OPTIONS,
    batch_size: int = 64,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Answers to all questions about the images.

    Args:
        images: `(I,)`.
        questions: `(I,)`, for each image dicts with `question`, `answer` (a string, or the answers of several people)
            and, in all or none, `kind`.
        train_questions: Questions of the training set, for the majority answer.
        answer_list: Closed list of answers to choose from; by default answers are generated.
        generate_options: Options of transformers' `generate`, if answers are generated.
        prompting, batch_size, progress, autocast_dtype: As in `answer_questions`.

    Returns:
        A report and the answers, image by image. The report has the keys of `vqa_metrics`, also by kind of question if
        there are kinds. Under `blind` are the metrics with a grey image. With `train_questions`, `majority` holds the
        metrics of the most frequent training answer (of the same kind, if there are kinds).

    Raises:
        ValueError: if the lengths differ, there are no questions, or a question has no answer.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images and questions about {len(questions)}: give one list per image.")
    rows = [(i, asked) for i, of_image in enumerate(questions) for asked in of_image]
    texts = [asked["question"] for _, asked in rows]
    people = [[asked["answer"]] if isinstance(asked["answer"], str) else asked["answer"] for _, asked in rows]
    kinds = [asked["kind"] for _, asked in rows] if rows and "kind" in rows[0][1] else None
    run_options: dict[str, Any] = {"progress": progress, "autocast_dtype": autocast_dtype}

    def answer(images: Sequence[Image.Image], texts: list[str], image_of_text: list[int]) -> list[str]:
        if answer_list is not None:
            return choose_answers(model, processor, images, texts, image_of_text, answer_list, **run_options)
        options = {"prompting": prompting, **run_options, **generate_options}
        return answer_questions(model, processor, images, texts, image_of_text, batch_size, **options)

    answers = answer(images, texts, [i for i, _ in rows])
    asked_once = list(dict.fromkeys(texts))
    blind = dict(zip(asked_once, answer([GREY], asked_once, [0] * len(asked_once)), strict=True))
    report: dict[str, Any] = vqa_metrics(answers, people, kinds)
    report["blind"] = vqa_metrics([blind[text] for text in texts], people, kinds)
    if train_questions is not None:
        report["majority"] = vqa_metrics(_majority(train_questions, kinds, len(rows)), people, kinds)
    return report, answers


def _majority(train_questions: Sequence[Mapping[str, Any]], kinds: list[str] | None, count: int) -> list[str]:
    """The most frequent training answer of each question's kind; for a kind not in training, that of all questions."""
    given = [asked["answer"] for asked in train_questions]
    of_all = majority_answer(given)
    if kinds is None:
        return [of_all] * count
    by_kind = majority_answers(given, [asked["kind"] for asked in train_questions])
    return [by_kind.get(kind, of_all) for kind in kinds]


def pope_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[Sequence[Mapping[str, Any]]],
    *,
    prompting: Prompting | Chatting | None = None,
    generate_options: Mapping[str, Any] = NO_OPTIONS,
    batch_size: int = 64,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Object hallucination: answers to balanced yes/no questions about object presence (POPE).

    Args:
        questions: `(I,)`, for each image dicts with `question`, `answer` ("yes" or "no") and `kind`.
        The rest as in `vqa_report`.

    Returns:
        The keys of `pope_metrics`; under `blind` the same with a grey image, under `majority` the same for the answer
        yes to every question.

    Raises:
        ValueError: if there are no questions.
    """
    rows = [(i, asked) for i, of_image in enumerate(questions) for asked in of_image]
    texts, truths, kinds = ([asked[name] for _, asked in rows] for name in ("question", "answer", "kind"))
    options = {"progress": progress, "autocast_dtype": autocast_dtype, **generate_options}

    def answer(images: Sequence[Image.Image], texts: list[str], image_of_text: list[int]) -> list[str]:
        return answer_questions(
            model, processor, images, texts, image_of_text, batch_size, prompting=prompting, **options
        )

    report: dict[str, Any] = pope_metrics(answer(images, texts, [i for i, _ in rows]), truths, kinds)
    asked_once = list(dict.fromkeys(texts))
    blind = dict(zip(asked_once, answer([GREY], asked_once, [0] * len(asked_once)), strict=True))
    report["blind"] = pope_metrics([blind[text] for text in texts], truths, kinds)
    report["majority"] = pope_metrics(["yes"] * len(texts), truths, kinds)
    return report


def zero_shot_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    labels: Sequence[str],
    class_names: Sequence[str] | None = None,
    *,
    templates: Sequence[str] = PROMPTS,
    ks: Sequence[int] = (1, 5),
    batch_size: int = 64,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Zero-shot classification of all images, with the class names in several templates (a prompt ensemble).

    Args:
        images: `(I,)`.
        labels: `(I,)`, the class name of each image.
        class_names: All classes that compete; by default those in `labels`.
        templates: Prompt templates with `{}` for the class name.
        ks: Ranks at which accuracy is measured.
        batch_size: Images per forward pass.
        progress: Show progress bars.
        autocast_dtype: Autocast dtype, for instance `torch.bfloat16`; None: no autocast.

    Returns:
        The keys of `zero_shot_metrics`, `images` and `classes` (their numbers), and under `chance` the metrics of a
        random guess.

    Raises:
        ValueError: if the lengths differ, there are no images, or a label is not in `class_names`.

    Example:

        report = zero_shot_report(model, processor, images, labels=["cat", "dog"], class_names=["cat", "dog", "cow"])
        print(report["top1"], report["chance"]["top1"])
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: give one label per image.")
    names = list(dict.fromkeys(labels if class_names is None else class_names))
    position = {name: i for i, name in enumerate(names)}
    if unknown := set(labels) - set(names):
        raise ValueError(f"{min(unknown)!r} is the label of an image and not one of the {len(names)} class names")
    options: dict[str, Any] = {"progress": progress, "autocast_dtype": autocast_dtype}
    image_embeds = embed_images(model, processor, images, batch_size, **options)
    prompt_embeds = embed_texts(model, processor, class_prompts(names, templates), **options)
    classes = zero_shot_classifier(prompt_embeds.unflatten(0, (len(names), -1)))  # (C, D)
    report: dict[str, Any] = zero_shot_metrics(image_embeds, classes, [position[name] for name in labels], ks=ks)
    guess = {f"top{k}": min(1.0, k / len(names)) for k in ks}
    guess["mean_per_class_accuracy"] = 1 / len(names)
    return report | {"images": len(images), "classes": len(names), "chance": guess}


__all__ = [
    "GREY",
    "caption_report",
    "hard_negative_report",
    "pope_report",
    "retrieval_report",
    "vqa_report",
    "zero_shot_report",
]
