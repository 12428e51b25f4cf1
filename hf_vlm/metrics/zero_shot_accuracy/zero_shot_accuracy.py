"""Zero-shot accuracy for `evaluate.load`; see `hf_vlm.evaluation.zero_shot_metrics`."""

import datasets
import evaluate
import numpy as np

from hf_vlm.metrics.zero_shot import zero_shot_metrics

_DESCRIPTION = "Top-k and mean per-class accuracy of classifying images by the nearest class embedding."

_CITATION = """\
@inproceedings{radford2021learning,
  title={Learning transferable visual models from natural language supervision},
  author={Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  booktitle={ICML},
  year={2021}
}"""

_INPUTS = """
Args:
    image_embeds: (images, size); rows can also be added in batches with `add_batch`.
    labels: (images,), the class of each image, in [0, classes).
    class_embeds: (classes, size), to `compute` only; see hf_vlm.evaluation.zero_shot_classifier.
    ks: numbers of nearest classes among which the true class counts as a hit, (1, 5) by default.
"""


class ZeroShotAccuracy(evaluate.Metric):
    """`compute(image_embeds=..., class_embeds=..., labels=...)` returns `zero_shot_metrics` of its arguments."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "image_embeds": datasets.Sequence(datasets.Value("float32")),
                    "labels": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        image_embeds: list[list[float]],
        labels: list[int],
        class_embeds: np.ndarray,
        ks: tuple[int, ...] = (1, 5),
    ) -> dict[str, float]:
        images = np.asarray(image_embeds, dtype=np.float32)
        return zero_shot_metrics(images, class_embeds, labels, ks=ks)


__all__ = ["ZeroShotAccuracy"]
