"""Reports as plain-text tables: a row per test set, below it the rows of its baselines and re-rankings.

Every table is written from the task's `Description`; a task that is not registered shows all its numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics.descriptions import EASY_VQA, Description
from .tasks import tasks_by_name

Report = Mapping[str, Mapping[str, Any]]  # metrics by test set
Results = dict[str, dict[str, dict[str, Any]]]  # metrics by task and test set


def by_task(reports: Mapping[str, Report]) -> Results:
    """Reports by test set and task turned into reports by task and test set, as `results.json` holds them."""
    tasks = dict.fromkeys(task for of_set in reports.values() for task in of_set)
    return {task: {name: dict(of_set[task]) for name, of_set in reports.items() if task in of_set} for task in tasks}


def add_row(results: Results, row: str, others: Mapping[str, Report]) -> None:
    """Adds the metrics of another run to each task and test set that both have, as the nested dictionary `row`."""
    for task, report in results.items():
        for name, scores in report.items():
            if found := others.get(task, {}).get(name):
                scores[row] = {key: value for key, value in found.items() if not isinstance(value, dict)}


def format_reports(reports: Mapping[str, Report]) -> str:
    """Reports by test set and task as one table per task, under the name of the task."""
    return "\n\n".join(f"{task.replace('_', ' ')}\n{format_report(of, task)}" for task, of in by_task(reports).items())


def format_report(report: Report, task: str) -> str:
    """The reports of one task by test set as a table."""
    return _aligned(report_table(report, describe(task, report)))


def describe(task: str, report: Report) -> Description:
    """The description of a task by its name in `results.json`, or one with every number under its own key."""
    if (known := tasks_by_name().get(task.removeprefix(EASY_VQA))) is not None:
        return known.description
    keys = {key: key for scores in report.values() for key, value in scores.items() if isinstance(value, int | float)}
    return Description(task, task, task, (task, task), next(iter(keys), ""), keys)


def report_table(report: Report, description: Description) -> list[list[str]]:
    """Rows of cells, the first of them the headings: test set, sizes, metrics."""
    rows: dict[str, Mapping[str, Any]] = {}
    for name, scores in report.items():
        rows[name] = scores
        nested = {label: scores[key] for key, label in description.rows.items() if key in scores}
        rows |= {f"{name}, {label}": {**scores, **own} for label, own in nested.items()}
    columns = dict(description.columns or description.metrics)
    if (prefix := description.kind_prefix) is not None:
        kinds = sorted({key for scores in rows.values() for key in scores if key.startswith(prefix)})
        columns |= {key: key.removeprefix(prefix) for key in kinds}
    table = [["test set", *description.sizes.values(), *columns.values()]]
    for name, scores in rows.items():
        counts = [f"{scores[key]:.0f}" for key in description.sizes]
        table.append([name, *counts, *(_cell(scores, key) for key in columns)])
    return table


def _cell(scores: Mapping[str, Any], key: str) -> str:
    outer, _, inner = key.rpartition(".")
    value = scores.get(outer, {}).get(inner) if outer else scores.get(key)
    return "-" if value is None else f"{value:.3f}"


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


__all__ = ["Report", "Results", "add_row", "by_task", "describe", "format_report", "format_reports", "report_table"]
