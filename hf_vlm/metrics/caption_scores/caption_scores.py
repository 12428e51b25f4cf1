"""Caption metrics for `evaluate.load`; see `hf_vlm.evaluation.caption_metrics`."""

import datasets
import evaluate

from hf_vlm.metrics.captioning import caption_metrics

_DESCRIPTION = "CIDEr, BLEU-1 to 4 and ROUGE-L of image captions, as pycocoevalcap computes them, without Java."

_CITATION = """\
@inproceedings{vedantam2015cider,
  title={CIDEr: Consensus-based image description evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR},
  year={2015}
}"""

_INPUTS = """
Args:
    predictions: (images,), one caption per image.
    references: (images,), a list of captions per image, at least one of them with a word.
"""


class CaptionScores(evaluate.Metric):
    """`compute(predictions=..., references=...)` returns `caption_metrics(predictions, references)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return caption_metrics(predictions, references)


__all__ = ["CaptionScores"]
