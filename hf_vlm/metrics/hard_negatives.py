"""Hard-negative accuracy: does the true caption score higher than one that differs in a single word?

- A pair is correct if the true caption scores higher. **A tie counts one half**, so a model that cannot distinguish the
  two captions gets 0.5 (chance).
- Accuracy is also reported per kind of change (left/right, number, colour, object). The macro average weighs all kinds
  equally.
"""

from collections.abc import Sequence

import torch

from .retrieval import Array


def hard_negative_metrics(
    positive_scores: Array | Sequence[float],
    negative_scores: Array | Sequence[float],
    kinds: Sequence[str],
    *,
    tie_tolerance: float = 0.0,
) -> dict[str, float]:
    """Pairwise accuracy over all pairs and for each kind.

    Args:
        positive_scores: `(pairs,)`, similarity of an image and its true caption.
        negative_scores: `(pairs,)`, similarity of the same image and the changed caption.
        kinds: `(pairs,)`, kind of the change.
        tie_tolerance: Scores that differ by at most this much are tied; 1e-6 suits float32 cosines.

    Returns:
        `accuracy`, `macro_accuracy` (mean over the kinds), `pairs` (their number), and for each kind `accuracy_{kind}`
        and `pairs_{kind}`.

    Raises:
        ValueError: if the lengths differ, there are no pairs, or a score is NaN.

    Example:

        metrics = hard_negative_metrics([0.9, 0.2], [0.1, 0.2], ["colour", "number"])
        print(metrics["accuracy"], metrics["accuracy_colour"])  # 0.75 1.0
    """
    # In double precision, so that the conversion creates no ties.
    positive = torch.as_tensor(positive_scores, dtype=torch.float64).cpu()
    negative = torch.as_tensor(negative_scores, dtype=torch.float64).cpu()
    if positive.shape != (len(kinds),) or negative.shape != (len(kinds),) or len(kinds) == 0:
        raise ValueError(
            "positive_scores, negative_scores and kinds must be non-empty lists of equal length: "
            f"got shapes {tuple(positive.shape)}, {tuple(negative.shape)} and {len(kinds)} kinds"
        )
    bad = (positive.isnan() | negative.isnan()).nonzero()
    if len(bad) > 0:
        raise ValueError(f"{len(bad)} of {len(kinds)} pairs have a NaN score, first pair {int(bad[0])}")
    higher = positive > negative + tie_tolerance
    lower = positive < negative - tie_tolerance
    right = 0.5 * (1 + higher.double() - lower.double())

    rows: dict[str, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    accuracies = {kind: float(right[rows[kind]].mean()) for kind in sorted(rows)}
    return {
        "accuracy": float(right.mean()),
        "macro_accuracy": sum(accuracies.values()) / len(accuracies),
        "pairs": float(len(kinds)),
        **{f"accuracy_{kind}": accuracy for kind, accuracy in accuracies.items()},
        **{f"pairs_{kind}": float(len(rows[kind])) for kind in accuracies},
    }


__all__ = ["hard_negative_metrics"]
