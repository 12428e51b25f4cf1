"""Image-text retrieval for `evaluate.load`; see `hf_vlm.evaluation.retrieval_metrics`."""

import datasets
import evaluate
import numpy as np

from hf_vlm.metrics.retrieval import retrieval_metrics

_DESCRIPTION = "Recall at k, median rank and mean reciprocal rank of image-to-text and text-to-image retrieval."

_CITATION = """\
@inproceedings{karpathy2015deep,
  title={Deep visual-semantic alignments for generating image descriptions},
  author={Karpathy, Andrej and Fei-Fei, Li},
  booktitle={CVPR},
  year={2015}
}"""

_INPUTS = """
One row per text. Pass all images to `compute` at once, because their number differs from that of the texts.

Args:
    text_embeds: (texts, size); rows can also be added in batches with `add_batch`.
    text_to_image: (texts,), the id of the image that each text describes; without image_ids, its row in image_embeds.
    image_embeds: (images, size), to `compute` only.
    image_ids: (images,), to `compute` only; images with the same id are equally correct. Optional.
    ks: ranks at which recall is measured, (1, 5, 10) by default.
"""


class ImageTextRetrieval(evaluate.Metric):
    """`compute(image_embeds=..., text_embeds=..., text_to_image=...)` returns `retrieval_metrics` of its arguments."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "text_embeds": datasets.Sequence(datasets.Value("float32")),
                    "text_to_image": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        text_embeds: list[list[float]],
        text_to_image: list[int],
        image_embeds: np.ndarray,
        image_ids: np.ndarray | None = None,
        ks: tuple[int, ...] = (1, 5, 10),
    ) -> dict[str, float]:
        texts = np.asarray(text_embeds, dtype=np.float32)
        return retrieval_metrics(image_embeds, texts, text_to_image, image_ids, ks=ks)


__all__ = ["ImageTextRetrieval"]
