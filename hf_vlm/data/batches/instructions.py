"""Rows of instructions with their images, for sources whose bad rows are skipped."""

from collections.abc import Mapping
from typing import Any

import datasets

from ..sources.errors import RowError
from ..sources.images import ImageError
from ..sources.rows import OR_SKIP, Rows, next_good
from ..sources.skipped import SkipReport


class InstructionRows:
    """Instructions with decoded images; a row whose image cannot be read is replaced by the next good one.

    Args:
        table: Rows with `source` and `index` of their image.
        images: Rows with an `image`, by name of the source. A bad row raises.
        report: Counts the rows that are replaced.
    """

    def __init__(self, table: datasets.Dataset, images: Mapping[str, Rows], report: SkipReport):
        self.table = table
        self.images = images
        self.tally = report.source("the instructions", len(table))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return next_good(self._read, index, len(self), "the instructions", self.tally)

    def _read(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        try:
            image = self.images[row["source"]][row["index"]]["image"]
        except (ImageError, RowError) as error:  # its advice is followed here
            raise type(error)(str(error).removesuffix(OR_SKIP).rstrip()) from None
        return {**row, "image": image}


__all__ = ["InstructionRows"]
