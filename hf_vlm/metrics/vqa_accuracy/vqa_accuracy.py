"""VQA accuracy for `evaluate.load`; see `hf_vlm.evaluation.vqa_metrics`."""

import datasets
import evaluate

from hf_vlm.metrics.vqa import vqa_metrics

_DESCRIPTION = "Soft accuracy of the VQA challenge and exact match, on normalised answers."

_CITATION = """\
@inproceedings{antol2015vqa,
  title={VQA: Visual question answering},
  author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and others},
  booktitle={ICCV},
  year={2015}
}"""

_INPUTS = """
Args:
    predictions: (questions,), one answer per question.
    references: (questions,), a list of the annotators' answers per question, at least one.
    question_types: (questions,), to `compute` only; the soft accuracy is also reported per type. Optional.
    answer_types: (questions,), as question_types.
"""


class VqaAccuracy(evaluate.Metric):
    """`compute(predictions=..., references=...)` returns `vqa_metrics(predictions, references)`."""

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

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        question_types: list[str] | None = None,
        answer_types: list[str] | None = None,
    ) -> dict[str, float]:
        return vqa_metrics(predictions, references, question_types, answer_types)


__all__ = ["VqaAccuracy"]
