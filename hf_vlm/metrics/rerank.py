"""Retrieval in two steps: embeddings find the candidates, a slower and better score puts them in order.

- BLIP's rule (arXiv 2201.12086, section 5.1, and the released evaluation): of each query the k most similar candidates
  by ITC get as score the ITM logit of "match" plus the ITC similarity (cosine); all others come after them, tied.
- Both directions ask for pairs; a pair that both ask for is scored once.
- Memory grows with k times the number of images and texts; the matrix of all pairs never exists.

Shapes: I images, T texts, E embeddings of an image, D embedding size, Q queries, C candidates, N pairs to score.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from .retrieval import Array, _both_directions, _matching_ids, cosines, first_matches, unit_images, unit_rows

MATCH_TOLERANCE = 1e-5


def rerank_metrics(
    image_embeds: Array,
    text_embeds: Array,
    score_pairs: Callable[[torch.Tensor], torch.Tensor],
    text_to_image: Array | Sequence[int],
    image_ids: Array | Sequence[int] | None = None,
    *,
    k: int = 128,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
    tie_tolerance: float = MATCH_TOLERANCE,
) -> dict[str, float]:
    """The metrics of `retrieval_metrics` after re-ranking.

    Args:
        image_embeds: `(I, D)` or `(I, E, D)`, any floating type, normalised here.
        text_embeds: `(T, D)`.
        score_pairs: takes pairs `(N, 2)`, rows of images and of texts, no pair twice, and returns a score `(N,)` of
            each, such as the second column of `match_logits`.
        text_to_image, image_ids, ks: as in `retrieval_metrics`.
        k: candidates of each query that are scored; BLIP takes 256 on COCO and 128 on Flickr30K.
        chunk: queries compared at a time.
        tie_tolerance: scores that differ by no more than this count as equal.

    Raises:
        ValueError: k is below 1, and as `retrieval_metrics`.
    """
    if k < 1:
        raise ValueError(f"re-ranking needs at least one candidate a query, got k={k}")
    images, texts = unit_images(image_embeds), unit_rows(text_embeds, "text_embeds")
    image_ids, text_ids = _matching_ids(text_to_image, image_ids, len(images), len(texts))
    by_image, of_image = _top((cosines(rows, texts) for rows in images.split(chunk)), k)
    by_text, of_text = _top((cosines(images, rows).T for rows in texts.split(chunk)), k)
    # A pair as one number.
    image_keys = torch.arange(len(images))[:, None] * len(texts) + of_image
    text_keys = of_text * len(texts) + torch.arange(len(texts))[:, None]
    keys = torch.cat([image_keys.flatten(), text_keys.flatten()]).unique()
    scores = score_pairs(torch.stack([keys // len(texts), keys % len(texts)], dim=1)).float().cpu()
    by_image += scores[torch.searchsorted(keys, image_keys)]
    by_text += scores[torch.searchsorted(keys, text_keys)]
    found_texts = first_matches(_rows(by_image, of_image, len(texts)), image_ids, text_ids, chunk, tie_tolerance)
    found_images = first_matches(_rows(by_text, of_text, len(images)), text_ids, image_ids, chunk, tie_tolerance)
    return _both_directions(found_texts, found_images, ks)


def _top(scores: Iterable[torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and places `(Q, k)` of the best candidates, or of all where there are fewer, of `(rows, C)` at a time."""
    parts = [rows.topk(min(k, rows.shape[1])) for rows in scores]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _rows(scores: torch.Tensor, places: torch.Tensor, width: int) -> Callable[[slice], torch.Tensor]:
    """Rows of the matrix `(Q, C)` of which only `scores` at `places`, both `(Q, k)`, are not `-inf`."""

    def rows(chosen: slice) -> torch.Tensor:
        return torch.full((len(scores[chosen]), width), -torch.inf).scatter_(1, places[chosen], scores[chosen])

    return rows


__all__ = ["MATCH_TOLERANCE", "rerank_metrics"]
