"""Retrieval in two steps: embeddings select candidates, a slower and better score re-ranks them.

- BLIP's rule (arXiv 2201.12086, section 5.1, and the released code): the k most similar candidates of each query (ITC)
  are scored by the ITM logit of "match" plus the ITC cosine. All other candidates follow, tied.
- A pair selected in both directions is scored once.
- Memory grows with k times the number of images and texts. The matrix of all pairs is never built.

Shapes: I images, T texts, E embeddings of an image, D embedding size, Q queries, C candidates, N pairs to score.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from .retrieval import Array, _both_directions, _matching_ids, cosines, first_matches, unit_images, unit_rows

MATCH_TOLERANCE = 1e-5
"""Matching scores within this tolerance are tied, because a score varies slightly with the batch it is computed in."""


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
        score_pairs: Maps distinct pairs `(N, 2)`, image row and text row, to scores `(N,)`, such as the second column
            of `match_logits`.
        text_to_image, image_ids, ks: As in `retrieval_metrics`.
        k: Candidates per query that are scored; BLIP uses 256 on COCO and 128 on Flickr30K.
        chunk: Queries compared at a time.
        tie_tolerance: Scores that differ by at most this much count as equal.

    Raises:
        ValueError: if k is below 1, or as in `retrieval_metrics`.

    Example:

        images, texts = torch.eye(3), torch.eye(3)
        metrics = rerank_metrics(images, texts, lambda pairs: (pairs[:, 0] == pairs[:, 1]).float(), [0, 1, 2], k=2)
        print(metrics["text_to_image_r1"])  # 1.0
    """
    if k < 1:
        raise ValueError(f"re-ranking needs at least one candidate a query, got k={k}")
    images, texts = unit_images(image_embeds), unit_rows(text_embeds, "text_embeds")
    image_ids, text_ids = _matching_ids(text_to_image, image_ids, len(images), len(texts))
    by_image, of_image = _top((cosines(rows, texts) for rows in images.split(chunk)), k)
    by_text, of_text = _top((cosines(images, rows).T for rows in texts.split(chunk)), k)
    # A pair (image, text) is encoded as the number image * T + text.
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
    """Scores and indices `(Q, min(k, C))` of the best candidates; the scores come in parts of `(rows, C)`."""
    parts = [rows.topk(min(k, rows.shape[1])) for rows in scores]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _rows(scores: torch.Tensor, places: torch.Tensor, width: int) -> Callable[[slice], torch.Tensor]:
    """Rows of the matrix `(Q, C)` that is `-inf` except for `scores` at `places`, both `(Q, k)`."""

    def rows(chosen: slice) -> torch.Tensor:
        return torch.full((len(scores[chosen]), width), -torch.inf).scatter_(1, places[chosen], scores[chosen])

    return rows


__all__ = ["MATCH_TOLERANCE", "rerank_metrics"]
