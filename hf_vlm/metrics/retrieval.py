"""Image-text retrieval: recall at k in both directions, median rank and mean reciprocal rank.

- **Several captions per image** (the protocol of Karpathy and Fei-Fei, 2015): an image is a hit if *any* caption
  is among its first k texts. A caption is a hit if its image is among its first k images. Items match if their ids are
  equal, so several images may share an id.
- **Ties are broken at random, and the exact expectation is reported.** A model that gives every pair the same score
  gets exactly the recall of chance, neither 1 (ties counted as hits) nor 0.
- **Cosines within `COSINE_TOLERANCE` are tied**: rounding makes equal embeddings differ by about 1e-7, and their order
  would depend on the batches.
- **An image may have several embeddings** (BLIP-2's queries): the one nearest to the text counts.
- Similarities are computed `chunk` rows at a time. The whole matrix is never built.

Shapes: I images, T texts, E embeddings of an image, D embedding size, Q queries, N candidates.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

Array = torch.Tensor | np.ndarray

COSINE_TOLERANCE = 1e-6


def retrieval_metrics(
    image_embeds: Array,
    text_embeds: Array,
    text_to_image: Array | Sequence[int],
    image_ids: Array | Sequence[int] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
    tie_tolerance: float = COSINE_TOLERANCE,
) -> dict[str, float]:
    """Retrieval by cosine similarity, every image against every text and back.

    Args:
        image_embeds: `(I, D)` or `(I, E, D)`, any floating type, normalised here.
        text_embeds: `(T, D)`.
        text_to_image: `(T,)`, integers: the id of the image that each text describes. Without `image_ids`, the id of an
            image is its row in `image_embeds`.
        image_ids: `(I,)`, integers; several images may share an id.
        ks: Ranks at which recall is measured.
        chunk: Queries compared at a time; memory is about `16 * chunk * max(I, T)` bytes.
        tie_tolerance: Cosines that differ by at most this much count as equal.

    Returns:
        For `image_to_text` and `text_to_image`: `_r{k}`, the share of queries with a match among the first k;
        `_median_rank`, the smallest k with a share of at least one half (ranks start at 1); `_mrr`, mean of 1 / rank
        of the first match. `mean_recall` is the mean over all k and both directions.

    Raises:
        ValueError: if shapes do not match, an embedding is not finite, or an image or text has no match.

    Example:

        metrics = retrieval_metrics(torch.eye(3), torch.eye(3), text_to_image=[0, 1, 2], ks=(1,))
        print(metrics["text_to_image_r1"])  # 1.0
    """
    images, texts = unit_images(image_embeds), unit_rows(text_embeds, "text_embeds")
    if images.shape[-1] != texts.shape[1]:
        raise ValueError(f"image_embeds have size {images.shape[-1]}, text_embeds {texts.shape[1]}: they must be equal")
    image_ids, text_ids = _matching_ids(text_to_image, image_ids, len(images), len(texts))
    by_image = first_matches(lambda rows: cosines(images[rows], texts), image_ids, text_ids, chunk, tie_tolerance)
    by_text = first_matches(lambda rows: cosines(images, texts[rows]).T, text_ids, image_ids, chunk, tie_tolerance)
    return _both_directions(by_image, by_text, ks)


def similarity_metrics(
    similarity: Array,
    text_to_image: Array | Sequence[int],
    image_ids: Array | Sequence[int] | None = None,
    *,
    text_similarity: Array | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
    tie_tolerance: float = 0.0,
) -> dict[str, float]:
    """The metrics of `retrieval_metrics` from given scores, such as those of a re-ranking model.

    Args:
        similarity: `(I, T)`, larger is more similar; `-inf` marks pairs that were not scored.
        text_to_image, image_ids, ks, chunk, tie_tolerance: As in `retrieval_metrics`.
        text_similarity: `(T, I)`, the scores for text-to-image if they are not the transpose of `similarity` (a
            re-ranker scores different pairs in each direction).

    Raises:
        ValueError: if shapes do not match, a score is NaN, or an image or text has no match.
    """
    by_row = _scores(similarity, "similarity")
    by_column = by_row.T if text_similarity is None else _scores(text_similarity, "text_similarity")
    if by_column.shape != by_row.T.shape:
        raise ValueError(f"text_similarity has shape {tuple(by_column.shape)}, expected {tuple(by_row.T.shape)}")
    image_ids, text_ids = _matching_ids(text_to_image, image_ids, *by_row.shape)
    by_image = first_matches(lambda rows: by_row[rows], image_ids, text_ids, chunk, tie_tolerance)
    by_text = first_matches(lambda rows: by_column[rows], text_ids, image_ids, chunk, tie_tolerance)
    return _both_directions(by_image, by_text, ks)


def chance(
    text_to_image: Array | Sequence[int],
    image_ids: Array | Sequence[int] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """The expected metrics of random scores: recall at k of a query with m matches is `1 - C(N - m, k) / C(N, k)`.

    Arguments, keys and errors are those of `retrieval_metrics`.
    """
    text_ids = _integers(text_to_image, "text_to_image")
    num_images = int(text_ids.max()) + 1 if image_ids is None else len(image_ids)
    image_ids, text_ids = _matching_ids(text_ids, image_ids, num_images, len(text_ids))
    return _both_directions(_all_tied(image_ids, text_ids), _all_tied(text_ids, image_ids), ks)


def first_matches(
    score_rows: Callable[[slice], torch.Tensor],
    query_ids: torch.Tensor,
    candidate_ids: torch.Tensor,
    chunk: int,
    tie_tolerance: float,
) -> torch.Tensor:
    """The rank of each query's best match among its candidates, with ties.

    Args:
        score_rows: Maps a slice of the queries to their scores `(rows, N)`.
        query_ids: `(Q,)`.
        candidate_ids: `(N,)`; a candidate matches a query of the same id.
        chunk: Length of a slice.
        tie_tolerance: Scores that differ from the best match by at most this much are tied with it.

    Returns:
        `(Q, 3)`, int64: the number of candidates above the best match; the number tied with it, itself included; the
        number of tied candidates that match.
    """
    # Allocated first: small results between large buffers would fragment memory.
    places = torch.empty(len(query_ids), 3, dtype=torch.int64)
    for start in range(0, len(query_ids), chunk):
        rows = slice(start, start + chunk)
        places[rows] = _places(score_rows(rows), query_ids[rows, None] == candidate_ids, tie_tolerance)
    return places


def hit_probability(places: torch.Tensor, k: int) -> torch.Tensor:
    """The probability that a match is among the first k if ties are broken at random.

    Args:
        places: `(Q, 3)`, from `first_matches`.
        k: At least 1.

    Returns:
        `(Q,)`, float64; 0 or 1 for a query without ties.
    """
    if k < 1:
        raise ValueError(f"recall at k needs k >= 1, got {k}")
    above, tied, matching = places.unbind(1)
    return 1 - _miss_probability(tied, matching, (k - above).clamp(min=0))


def unit_rows(embeds: Array, name: str) -> torch.Tensor:
    """The rows of `embeds`, `(rows, D)`, as float32 unit vectors on the CPU; `name` appears in error messages."""
    rows = torch.as_tensor(embeds).detach().to("cpu", torch.float32)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"{name} must have shape (rows, size) with at least one row, got {tuple(rows.shape)}")
    bad = (~rows.isfinite().all(dim=1)).nonzero()
    if len(bad) > 0:
        raise ValueError(f"{name}: NaN or infinity in {len(bad)} of {len(rows)} rows, first row {int(bad[0])}")
    return F.normalize(rows, dim=1)


def unit_images(embeds: Array) -> torch.Tensor:
    """Image embeddings `(I, D)` or `(I, E, D)` as unit vectors `(I, E, D)`; see `unit_rows`."""
    embeds = torch.as_tensor(embeds)
    if embeds.ndim != 3:
        return unit_rows(embeds, "image_embeds")[:, None]
    return unit_rows(embeds.flatten(0, 1), "image_embeds (images * embeddings rows)").unflatten(0, embeds.shape[:2])


def cosines(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Similarities `(I, T)` of unit vectors `(I, E, D)` and `(T, D)`: the nearest of an image's embeddings counts."""
    nearest = images[:, 0] @ texts.T
    for embeds in images.unbind(1)[1:]:
        torch.maximum(nearest, embeds @ texts.T, out=nearest)
    return nearest


def pair_cosines(images: torch.Tensor, texts: torch.Tensor, pairs: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """`cosines` of the pairs `(N, 2)` (image row, text row) only: `(N,)`."""
    parts = [(images[part[:, 0]] * texts[part[:, 1], None]).sum(-1).amax(1) for part in pairs.split(chunk)]
    return torch.cat(parts)


def _places(scores: torch.Tensor, matches: torch.Tensor, tie_tolerance: float) -> torch.Tensor:
    best = scores.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
    above = scores > best + tie_tolerance
    tied = (scores >= best - tie_tolerance) & ~above
    return torch.stack([above.sum(dim=1), tied.sum(dim=1), (tied & matches).sum(dim=1)], dim=1)


def _scores(similarity: Array, name: str) -> torch.Tensor:
    scores = torch.as_tensor(similarity).detach().cpu()
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {tuple(scores.shape)}")
    bad = scores.isnan().any(dim=1).nonzero()
    if len(bad) > 0:
        raise ValueError(f"{name}: NaN in {len(bad)} of {len(scores)} rows, first row {int(bad[0])}")
    return scores if scores.is_floating_point() else scores.double()


def _integers(ids: Array | Sequence[int], name: str) -> torch.Tensor:
    values = torch.as_tensor(ids).cpu()
    if values.ndim != 1 or len(values) == 0 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be a non-empty list of integers, got {values.dtype} {tuple(values.shape)}")
    return values.long()


def _matching_ids(
    text_to_image: Array | Sequence[int], image_ids: Array | Sequence[int] | None, num_images: int, num_texts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of both sides, `(I,)` and `(T,)`, after checking that every item has a match."""
    text_ids = _integers(text_to_image, "text_to_image")
    image_ids = torch.arange(num_images) if image_ids is None else _integers(image_ids, "image_ids")
    if (len(image_ids), len(text_ids)) != (num_images, num_texts):
        raise ValueError(
            f"{num_images} images and {num_texts} texts, but {len(image_ids)} image ids and {len(text_ids)} text ids"
        )
    for kind, other, ids, other_ids in (("text", "image", text_ids, image_ids), ("image", "text", image_ids, text_ids)):
        lost = (~torch.isin(ids, other_ids)).nonzero()
        if len(lost) > 0:
            row = int(lost[0])
            where = f"first {kind} {row} (id {int(ids[row])})"
            raise ValueError(f"{len(lost)} {kind}s have no {other} with the same id, {where}: leave them out")
    return image_ids, text_ids


def _miss_probability(tied: torch.Tensor, matching: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """`C(tied - matching, draws) / C(tied, draws)`: probability of no match in the first `draws` tied candidates."""
    tied, others, draws = tied.double(), (tied - matching).double(), draws.double()
    # Differences of neighbouring terms first, so that the probability is exactly 1 without draws.
    log_ratio = torch.lgamma(others + 1) - torch.lgamma((others - draws).clamp(min=0) + 1)
    log_ratio += torch.lgamma((tied - draws).clamp(min=0) + 1) - torch.lgamma(tied + 1)
    return log_ratio.exp().masked_fill(draws > others, 0.0)


def _all_tied(query_ids: torch.Tensor, candidate_ids: torch.Tensor) -> torch.Tensor:
    """The result of `first_matches` if all scores are equal."""
    labels = torch.unique(torch.cat([query_ids, candidate_ids]), return_inverse=True)[1]
    matching = labels[len(query_ids) :].bincount(minlength=len(labels))[labels[: len(query_ids)]]
    return torch.stack([torch.zeros_like(matching), torch.full_like(matching, len(candidate_ids)), matching], dim=1)


def _median_rank(places: torch.Tensor) -> float:
    low, high = 1, int(places[:, :2].sum(dim=1).max())
    while low < high:
        middle = (low + high) // 2
        # The tolerance absorbs the rounding of the log-factorials.
        if hit_probability(places, middle).mean() >= 0.5 - 1e-9:
            high = middle
        else:
            low = middle + 1
    return float(low)


def _mean_reciprocal_rank(places: torch.Tensor) -> float:
    certain = places[:, 1] == places[:, 2]
    total = float((1.0 / (places[certain, 0] + 1).double()).sum())
    for place, count in zip(*torch.unique(places[~certain], dim=0, return_counts=True), strict=True):
        above, tied, matching = place
        draws = torch.arange(int(tied - matching) + 2)
        misses = _miss_probability(tied, matching, draws)
        total += float(count * ((misses[:-1] - misses[1:]) / (above + draws[1:])).sum())
    return total / len(places)


def _both_directions(by_image: torch.Tensor, by_text: torch.Tensor, ks: Sequence[int]) -> dict[str, float]:
    metrics = {}
    for direction, places in (("image_to_text", by_image), ("text_to_image", by_text)):
        metrics |= {f"{direction}_r{k}": float(hit_probability(places, k).mean()) for k in ks}
        metrics[f"{direction}_median_rank"] = _median_rank(places)
        metrics[f"{direction}_mrr"] = _mean_reciprocal_rank(places)
    recalls = [metrics[f"{direction}_r{k}"] for direction in ("image_to_text", "text_to_image") for k in ks]
    return metrics | {"mean_recall": sum(recalls) / len(recalls)}


__all__ = [
    "COSINE_TOLERANCE",
    "chance",
    "cosines",
    "first_matches",
    "hit_probability",
    "pair_cosines",
    "retrieval_metrics",
    "similarity_metrics",
    "unit_images",
    "unit_rows",
]
