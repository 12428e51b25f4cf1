"""Detection of bad image-text pairs by a score: metrics at a threshold and over all thresholds.

- A pair is flagged if its score is *below* the threshold. Precision is the share of flagged pairs that are bad. Recall
  is the share of bad pairs that are flagged. F1 is their harmonic mean.
- Average precision and ROC AUC need no threshold. Ties count one half in the AUC. A random score has an average
  precision equal to the share of bad pairs, and an AUC of one half.
- The metrics are also reported per kind of corruption, without the bad pairs of other kinds.
"""

from collections.abc import Sequence

import torch

from .retrieval import Array

GOOD = "good"


def filter_metrics(scores: Array | Sequence[float], corruptions: Sequence[str], threshold: float) -> dict[str, float]:
    """Precision, recall, F1, average precision and ROC AUC of detecting bad pairs.

    Args:
        scores: `(pairs,)`; a better match has a higher score.
        corruptions: `(pairs,)`, `"good"` or the kind of corruption.
        threshold: Pairs with a lower score are flagged.

    Returns:
        `precision`, `recall`, `f1` (0 if nothing is flagged), `average_precision`, `roc_auc`, `threshold`, `pairs`,
        `bad` and `flagged` (their numbers), and for each corruption `{metric}_{corruption}` and `bad_{corruption}`.

    Raises:
        ValueError: if the lengths differ, a score is NaN, or there are no good or no bad pairs.

    Example:

        metrics = filter_metrics([0.9, 0.1], ["good", "wrong_colour"], threshold=0.5)
        print(metrics["f1"], metrics["roc_auc"])  # 1.0 1.0
    """
    scores, bad = _checked(scores, corruptions)
    report = {**_metrics(scores, bad, threshold), "threshold": float(threshold)}
    report |= {"pairs": float(len(bad)), "bad": float(bad.sum()), "flagged": float((scores < threshold).sum())}
    for name in sorted(set(corruptions) - {GOOD}):
        mine = torch.tensor([corruption == name for corruption in corruptions])
        kept = mine | ~bad
        report |= {f"{key}_{name}": value for key, value in _metrics(scores[kept], bad[kept], threshold).items()}
        report[f"bad_{name}"] = float(mine.sum())
    return report


def best_threshold(scores: Array | Sequence[float], corruptions: Sequence[str]) -> float:
    """The threshold with the highest F1, halfway between two scores; the lowest of equally good ones.

    Choose the threshold on validation pairs, not on the pairs of the final measurement.

    Raises:
        ValueError: as in `filter_metrics`.
    """
    scores, bad = _checked(scores, corruptions)
    values, flagged_bad, flagged = _cumulative(scores, bad)
    f1 = 2 * flagged_bad / (flagged + bad.sum())
    best = int(f1.argmax())
    above = values[best + 1] if best + 1 < len(values) else values[best] + 1
    return float((values[best] + above) / 2)


def _checked(scores: Array | Sequence[float], corruptions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `(pairs,)` in double precision, and a mask `(pairs,)` of the bad pairs."""
    scores = torch.as_tensor(scores, dtype=torch.float64).cpu()
    if scores.shape != (len(corruptions),):
        raise ValueError(f"scores have the shape {tuple(scores.shape)} and there are {len(corruptions)} corruptions")
    if bool(scores.isnan().any()):
        raise ValueError(f"pair {int(scores.isnan().nonzero()[0])} has a NaN score")
    bad = torch.tensor([corruption != GOOD for corruption in corruptions])
    if not 0 < int(bad.sum()) < len(bad):
        raise ValueError(f"{int(bad.sum())} of {len(bad)} pairs are bad: finding them needs both good and bad ones")
    return scores, bad


def _metrics(scores: torch.Tensor, bad: torch.Tensor, threshold: float) -> dict[str, float]:
    flagged = scores < threshold
    found, count = float((flagged & bad).sum()), float(bad.sum())
    _, flagged_bad, cut = _cumulative(scores, bad)
    steps = torch.diff(flagged_bad, prepend=flagged_bad.new_zeros(1))
    good_below = (cut - flagged_bad) - torch.diff(cut - flagged_bad, prepend=cut.new_zeros(1)) / 2
    good = len(bad) - count
    return {
        "precision": found / max(float(flagged.sum()), 1.0),
        "recall": found / count,
        "f1": 2 * found / (float(flagged.sum()) + count),
        "average_precision": float((steps * flagged_bad / cut).sum()) / count,
        "roc_auc": float((steps * (good - good_below)).sum()) / (count * good),
    }


def _cumulative(scores: torch.Tensor, bad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The distinct scores in order, and for each the number of bad pairs and of all pairs with at most this score."""
    values, place, counts = scores.unique(return_inverse=True, return_counts=True)
    bad_counts = torch.zeros(len(values), dtype=torch.float64).index_add_(0, place, bad.double())
    return values, bad_counts.cumsum(0), counts.double().cumsum(0)


__all__ = ["GOOD", "best_threshold", "filter_metrics"]
