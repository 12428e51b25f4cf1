"""Whole evaluations of a two-tower model on data: embed everything, compare, report beside chance."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from .embed import embed_images, embed_texts
from .hard_negatives import hard_negative_metrics
from .retrieval import chance, retrieval_metrics


def retrieval_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    captions: Sequence[str | Sequence[str]],
    ids: Sequence[int] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Retrieval both ways over one test set.

    Args:
        images: `(I,)` pictures.
        captions: `(I,)`, one caption or several of each picture; a caption that repeats within an id counts once.
        ids: `(I,)`, pictures of equal id share their captions; by default each is its own.
        ks: ranks at which recall is measured.
        batch_size: images a forward pass.
        progress: show progress bars.

    Returns:
        The keys of `retrieval_metrics`, `num_images`, `num_texts`, and under `chance` the same metrics at random.

    Raises:
        ValueError: the lengths differ or there are no images.
    """
    ids = list(range(len(images))) if ids is None else list(ids)
    if not len(images) == len(captions) == len(ids):
        raise ValueError(f"{len(images)} images, {len(captions)} captions and {len(ids)} ids: they must be equal")
    pairs = {
        (image_id, text): None
        for image_id, texts in zip(ids, captions, strict=True)
        for text in ([texts] if isinstance(texts, str) else texts)
    }
    text_ids, texts = [image_id for image_id, _ in pairs], [text for _, text in pairs]
    image_embeds = embed_images(model, processor, images, batch_size, progress=progress)
    text_embeds = embed_texts(model, processor, texts, progress=progress)
    report: dict[str, Any] = retrieval_metrics(image_embeds, text_embeds, text_ids, ids, ks=ks)
    report |= {"num_images": len(images), "num_texts": len(texts), "chance": chance(text_ids, ids, ks=ks)}
    return report


def hard_negative_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    hard_negatives: Sequence[Sequence[dict[str, str]]],
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """How often a picture prefers its true caption to one that differs in a word.

    Args:
        images: `(I,)` pictures.
        hard_negatives: `(I,)`, for each picture dicts with `caption` (true), `negative` (false) and `kind`.
        batch_size: images a forward pass.
        progress: show progress bars.

    Returns:
        The keys of `hard_negative_metrics`; chance is 0.5.
    """
    rows = [(i, pair) for i, pairs in enumerate(hard_negatives) for pair in pairs]
    texts = sorted({pair[key] for _, pair in rows for key in ("caption", "negative")})
    position = {text: i for i, text in enumerate(texts)}
    image_embeds = embed_images(model, processor, images, batch_size, progress=progress)
    image_embeds = image_embeds[torch.tensor([i for i, _ in rows])]
    text_embeds = embed_texts(model, processor, texts, progress=progress)
    true, false = (
        (image_embeds * text_embeds[torch.tensor([position[pair[key]] for _, pair in rows])]).sum(-1)
        for key in ("caption", "negative")
    )
    return hard_negative_metrics(true, false, [pair["kind"] for _, pair in rows], tie_tolerance=1e-6)


__all__ = ["hard_negative_report", "retrieval_report"]
