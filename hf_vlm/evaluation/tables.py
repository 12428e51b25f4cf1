"""Reports as plain tables: a row for each test set, and below it those of the same model blind, re-ranked and so on."""

from collections.abc import Mapping, Sequence
from typing import Any

from .tasks import KS

# What a report holds besides its own numbers, and what to call that row.
ROWS = {
    "reranked": "re-ranked",
    "itm": "by ITM",
    "blind": "blind",
    "itm_blind": "by ITM, blind",
    "majority": "majority answer",
}
Report = Mapping[str, Mapping[str, Any]]
Results = dict[str, dict[str, dict[str, Any]]]  # by task and test set


def by_task(reports: Mapping[str, Report]) -> Results:
    """Reports by test set and task turned into reports by task and test set, as `results.json` holds them."""
    tasks = dict.fromkeys(task for of_set in reports.values() for task in of_set)
    return {task: {name: dict(of_set[task]) for name, of_set in reports.items() if task in of_set} for task in tasks}


def add_row(results: Results, row: str, others: Mapping[str, Report]) -> None:
    """Puts another run's own numbers as a row into each evaluation, by task and test set, that both have."""
    for task, report in results.items():
        for name, scores in report.items():
            if found := others.get(task, {}).get(name):
                scores[row] = {key: value for key, value in found.items() if not isinstance(value, dict)}


def format_reports(reports: Mapping[str, Report]) -> str:
    """Reports by test set and task as one table a task, under its name."""
    return "\n\n".join(f"{task.replace('_', ' ')}\n{format_report(of)}" for task, of in by_task(reports).items())


def format_report(report: Report) -> str:
    """The reports of one task by test set as a table."""
    first = next(iter(report.values()))
    rows = _rows(report)
    if "accuracy" in first:
        table = hard_negative_table(rows)
    elif "cider" in first:
        table = caption_table(rows)
    elif "vqa_accuracy" in first:
        table = vqa_table(rows)
    elif "pope_f1" in first:
        table = pope_table(rows)
    else:
        table = retrieval_table(rows)
    return _aligned(table)


def retrieval_table(report: Report) -> list[list[str]]:
    """Rows of cells: a test set's size, recall both ways and what chance gives for text to image."""
    head = ["test set", "images", "texts"]
    head += [f"{direction} R@{k}" for direction in ("text>image", "image>text") for k in KS]
    table = [[*head, *(f"chance R@{k}" for k in KS)]]
    for name, scores in report.items():
        recalls = [scores[f"{way}_r{k}"] for way in ("text_to_image", "image_to_text") for k in KS]
        recalls += [scores["chance"][f"text_to_image_r{k}"] for k in KS]
        counts = [str(scores["num_images"]), str(scores["num_texts"])]
        table.append([name, *counts, *(f"{recall:.3f}" for recall in recalls)])
    return table


def hard_negative_table(report: Report) -> list[list[str]]:
    """Rows of cells: the pairs of a test set, accuracy over all and by kind."""
    kinds = _keys(report, "accuracy_")
    table = [["test set", "pairs", "all", *(kind.removeprefix("accuracy_") for kind in kinds)]]
    for name, scores in report.items():
        table.append([name, f"{scores['pairs']:.0f}", f"{scores['accuracy']:.3f}", *_cells(scores, kinds)])
    return table


def caption_table(report: Report) -> list[list[str]]:
    """Rows of cells: the images of a test set and the scores of its captions."""
    scores_of = {"CIDEr": "cider", "BLEU-4": "bleu_4", "ROUGE-L": "rouge_l"}
    table = [["test set", "images", *scores_of]]
    for name, scores in report.items():
        table.append([name, str(scores["images"]), *_cells(scores, list(scores_of.values()))])
    return table


def vqa_table(report: Report) -> list[list[str]]:
    """Rows of cells: the questions of a test set, soft accuracy and exact match, soft accuracy by kind of question."""
    prefix = "vqa_accuracy_question_"
    kinds = _keys(report, prefix)
    table = [["test set", "questions", "accuracy", "exact", *(kind.removeprefix(prefix) for kind in kinds)]]
    for name, scores in report.items():
        cells = _cells(scores, ["vqa_accuracy", "exact_match", *kinds])
        table.append([name, f"{scores['questions']:.0f}", *cells])
    return table


def pope_table(report: Report) -> list[list[str]]:
    """Rows of cells: the questions after objects, and how well it is said what is there."""
    names = ["accuracy", "precision", "recall", "f1", "yes_rate", "unclear"]
    table = [["test set", "questions", *(name.replace("_", " ") for name in names)]]
    for name, scores in report.items():
        table.append([name, f"{scores['questions']:.0f}", *_cells(scores, [f"pope_{key}" for key in names])])
    return table


def _rows(report: Report) -> dict[str, Mapping[str, Any]]:
    """The rows of a table: a test set, then what its report holds besides."""
    rows: dict[str, Mapping[str, Any]] = {}
    for name, scores in report.items():
        rows[name] = scores
        rows |= {f"{name}, {label}": {**scores, **scores[key]} for key, label in ROWS.items() if key in scores}
    return rows


def _keys(report: Report, prefix: str) -> list[str]:
    return sorted({key for scores in report.values() for key in scores if key.startswith(prefix)})


def _cells(scores: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{scores[key]:.3f}" if key in scores else "-" for key in keys]


def _aligned(table: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


__all__ = [
    "ROWS",
    "add_row",
    "by_task",
    "caption_table",
    "format_report",
    "format_reports",
    "hard_negative_table",
    "pope_table",
    "retrieval_table",
    "vqa_table",
]
