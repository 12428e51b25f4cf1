"""Hard-negative accuracy for `evaluate.load`; see `hf_vlm.evaluation.hard_negative_metrics`."""

import datasets
import evaluate

from hf_vlm.metrics.hard_negatives import hard_negative_metrics

_DESCRIPTION = "Share of images whose true caption scores above one that differs in a word; ties count one half."

_INPUTS = """
Args:
    positive_scores: (pairs,), score of each image with its true caption.
    negative_scores: (pairs,), score of the same image with the changed caption.
    kinds: (pairs,), kind of change, such as "colour"; the accuracy is also reported per kind.
    tie_tolerance: largest difference of two scores that counts as a tie, 0 by default.
"""


class HardNegativeAccuracy(evaluate.Metric):
    """`compute(positive_scores=..., negative_scores=..., kinds=...)` returns `hard_negative_metrics` of the same."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "positive_scores": datasets.Value("float64"),
                    "negative_scores": datasets.Value("float64"),
                    "kinds": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        positive_scores: list[float],
        negative_scores: list[float],
        kinds: list[str],
        tie_tolerance: float = 0.0,
    ) -> dict[str, float]:
        return hard_negative_metrics(positive_scores, negative_scores, kinds, tie_tolerance=tie_tolerance)


__all__ = ["HardNegativeAccuracy"]
