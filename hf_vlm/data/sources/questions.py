"""Questions about images with their answers, from columns `question` and `answer`, as they are written.

- An answer is a text, an integer (as its digits), a list of them (one per person asked), or VQAv2's list of dicts with
  an `answer` each. Anything else is refused with its row and column: no answer, empty texts, other numbers, booleans.
- Named JSON and CSV files, and an image folder's metadata, are read without types: "007" and "2024-01-01" stay texts.
- Nothing is stripped or lowercased. Metrics and models normalise answers where their papers do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets

from .cells import check_row, read_answers, read_cell, read_text
from .images import load_image
from .open import DataSource, undecoded
from .rows import CaptionError, Origin, Rows, SkipReport, SourceError, image_of, next_good, place_of


@dataclass(frozen=True)
class QuestionSource(DataSource):
    """A source of questions: as [`DataSource`], with the columns image, question and answer. It is not streamed."""

    ROLES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": DataSource.ROLES["image"],
        "question": ("question", "questions", "query"),
        "answer": ("answer", "answers", "multiple_choice_answer", "label"),
    }
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise SourceError(f"{self.path}: questions are not streamed: leave out streaming.")


def question_source(source: Mapping[str, Any]) -> QuestionSource:
    """A source of questions as a YAML file describes it; [`load_source`] opens it.

    Args:
        source: Fields of [`DataSource`]; `columns` may name image, question and answer.

    Raises:
        ValueError: if `columns` names another column, or the source is streamed.
    """
    return QuestionSource(**source)


class QuestionRows:
    """Rows of `image`, `question` and `answer` (a list of texts, one per person asked), by row number.

    Args:
        rows: Dicts with an image, a question and an answer, as stored.
        label: What to call the rows in an error.
        origin: The files that rows may name. None: images are passed on unchanged, for rows in memory.
        columns: Role -> column, of image, question and answer. Default: the columns of those names.
        report: Counts the bad rows, which the next good row replaces. None: a bad row raises.

    Raises:
        CaptionError: on indexing, if a row has no question or no answer; with row and column.
        ImageError: on indexing, if an image cannot be read.
    """

    def __init__(
        self,
        rows: Rows,
        label: str = "the questions",
        origin: Origin | None = None,
        columns: Mapping[str, str] | None = None,
        report: SkipReport | None = None,
    ):
        self.columns = {role: role for role in QuestionSource.ROLES} | dict(columns or {})
        self.rows: Any = rows
        self._texts: Any = rows
        if isinstance(rows, datasets.Dataset):
            kept = [name for name in (self.columns["question"], self.columns["answer"]) if name in rows.column_names]
            self._texts = rows.with_format(None).select_columns(kept)
            self.rows = rows if origin is None else undecoded(rows)
        self.label = label
        self.origin = origin
        self.tally = None if report is None else report.source(label, len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self.rows))[index]
        return next_good(self._read, index, len(self.rows), self.label, self.tally)

    def texts(self, index: int) -> dict[str, Any]:
        """The `question` and `answer` of a row; its image is not decoded, and a bad row raises."""
        if isinstance(self.rows, QuestionRows):
            return self.rows.texts(index)
        try:
            return self._read_texts(self._texts[index], f"{self.label}, row {index}")
        except CaptionError:
            self._read(index)  # raises the same, and names the image
            raise

    def _read(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = row.get(self.columns["image"]) if isinstance(row, Mapping) else None
        place = place_of(self.label, index, image)
        texts = self._read_texts(row, place)
        if self.origin is not None:
            image = load_image(image_of(image, self.origin, place), where=place)
        return {"image": image, **texts}

    def _read_texts(self, row: Any, place: str) -> dict[str, Any]:
        try:
            check_row(row, self.columns)
            return {
                role: read_cell(row.get(self.columns[role]), read, self.columns[role], wanted)
                for role, (read, wanted) in _READERS.items()
            }
        except ValueError as error:
            raise CaptionError(f"{place}: {error}") from None


_READERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "question": (read_text, "a text"),
    "answer": (read_answers, "a text or a list of texts"),
}

__all__ = ["QuestionRows", "QuestionSource", "question_source"]
