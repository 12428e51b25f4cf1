"""Counts the rows that `on_error="skip"` leaves out: by reason, over all workers of a process, each row once.

- Too many skipped rows mean a wrong column or folder: above 10 % a warning, above `max_skipped` an error.
- Worker processes share no memory, so what they count lies in files of a temporary folder.
"""

import json
import logging
import mmap
import os
import shutil
import struct
import tempfile
import weakref
from collections import Counter
from pathlib import Path

from ...terminal import printable, quoted
from .errors import RowError, SourceError

logger = logging.getLogger(__name__)

MANY = 0.1
"""Share of skipped rows above which a warning is logged."""
MAX_SKIPPED = 0.5
"""Default share of skipped rows above which a source is refused."""
ENOUGH = 200
"""Rows to see before the share counts; in a smaller source all of them."""

_UNSEEN, _GOOD, _BAD = range(3)
_COUNTS = struct.Struct("qq")  # rows read by one process, and bad ones among them


class SkipReport:
    """Counts skipped rows, possibly of several sources.

    The first bad row is logged as a warning at once. The sum is logged by `log`, or when the report is deleted or the
    program ends.

    Args:
        shown: Number of bad rows that the summary names.
        max_skipped: Share of a source's rows that may be skipped, from 0 to 1; a larger one is a `SourceError`.

    Raises:
        SourceError: if `max_skipped` is not a share.
    """

    def __init__(self, shown: int = 5, max_skipped: float = MAX_SKIPPED):
        check_share(max_skipped)
        self.folder = Path(tempfile.mkdtemp(prefix="hf_vlm_skipped_"))
        self.shown = shown
        self.max_skipped = max_skipped
        self._at_exit = weakref.finalize(self, _close, self.folder, shown, os.getpid())

    def __getstate__(self) -> dict:  # a copy, as in a worker, adds to the same files and does not delete them
        return {name: value for name, value in vars(self).items() if name != "_at_exit"}

    def __deepcopy__(self, memo: dict) -> "SkipReport":
        return self  # datasets copies its transforms: all copies count together

    def source(self, label: str, rows: int | None = None) -> "SourceTally":
        """The counts of one more source.

        Args:
            label: What to call the source in an error.
            rows: The number of its rows; None for a stream.
        """
        handle, path = tempfile.mkstemp(dir=self.folder)
        os.close(handle)
        return SourceTally(self, label, rows, Path(path))

    def add(self, error: ValueError) -> None:
        """Records a bad row; the error begins with its place."""
        path = self.folder / "errors"
        if not path.exists():
            logger.warning("Skipped: %s Further bad rows are counted and reported at the end.", printable(error))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([reason_of(error), printable(error)]) + "\n")

    def once(self, name: str) -> bool:
        """Whether no process has asked for this name before."""
        try:
            (self.folder / f"once-{name}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @property
    def entries(self) -> list[tuple[str, str]]:
        """Reason and error of each skipped row, once however often the row was read."""
        return _entries(self.folder)

    @property
    def errors(self) -> list[str]:
        """The errors of the skipped rows, one per row, however often the row was read."""
        return sorted(error for _, error in self.entries)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of skipped rows by reason, the most frequent first."""
        return dict(Counter(reason for reason, _ in self.entries).most_common())

    @property
    def count(self) -> int:
        """Number of skipped rows."""
        return len(self.entries)

    def log(self) -> None:
        """Logs one warning with the counts by reason and the first places; nothing if no row was skipped."""
        _log(self.folder, self.shown)


class SourceTally:
    """The rows of one source that were read, and the bad ones among them; made by `SkipReport.source`.

    Rows with a number count once. Rows of a stream count whenever they are read.
    """

    def __init__(self, report: SkipReport, label: str, rows: int | None, path: Path):
        self.report = report
        self.label = label
        self.rows = rows
        self.path = path
        self._map: mmap.mmap | None = None
        self._owner = 0
        self._bad_here = 0
        if rows:
            with path.open("wb") as file:
                file.truncate(rows)

    def __getstate__(self) -> dict:
        return {**vars(self), "_map": None}

    def __deepcopy__(self, memo: dict) -> "SourceTally":
        return self

    def good(self, index: int = 0) -> None:
        """Counts a good row."""
        if self._mark(index, _GOOD) and self.rows is not None and self.rows <= ENOUGH:
            self._check()

    def bad(self, error: ValueError, index: int = 0) -> None:
        """Counts a bad row and records its error.

        Raises:
            SourceError: if too many rows of the source are bad.
        """
        if self._mark(index, _BAD):
            self.report.add(error)
            self._bad_here += 1
            if self._bad_here <= ENOUGH or self._bad_here % 100 == 0:  # to count the rows of a large source takes time
                self._check()

    def counts(self) -> tuple[int, int]:
        """Number of rows seen, and of bad ones among them, by all processes (of a stream: by this one)."""
        if self.rows is None:
            return _COUNTS.unpack(self._open()[:])
        states = self._open()[:] if self.rows else b""
        bad = states.count(_BAD)
        return states.count(_GOOD) + bad, bad

    def _mark(self, index: int, state: int) -> bool:
        """Counts a row; False if it was counted before."""
        memory = self._open()
        if self.rows is None:
            seen, bad = _COUNTS.unpack(memory[:])
            memory[:] = _COUNTS.pack(seen + 1, bad + (state == _BAD))
            return True
        is_new = memory[index] == _UNSEEN
        memory[index] = state
        return is_new

    def _open(self) -> mmap.mmap:
        if self._map is None or (self.rows is None and self._owner != os.getpid()):
            path = self.path if self.rows is not None else self.path.with_suffix(f".{os.getpid()}")
            with path.open("a+b") as file:
                size = _COUNTS.size if self.rows is None else self.rows
                file.truncate(max(size, file.seek(0, os.SEEK_END)))
                self._map, self._owner = mmap.mmap(file.fileno(), size), os.getpid()
        return self._map

    def _check(self) -> None:
        seen, bad = self.counts()
        if seen < min(ENOUGH, self.rows or ENOUGH) or bad <= min(MANY, self.report.max_skipped) * seen:
            return
        share = f"{self.label}: {bad} of the first {seen} rows read are bad ({bad / seen:.0%})"
        main = next(iter(self.report.reasons.items()))
        if bad > self.report.max_skipped * seen:
            raise SourceError(
                f"{share}, which is more than max_skipped={self.report.max_skipped}. Most frequent: {main[0]} "
                f"({main[1]}), such as {self.report.errors[0]} Correct the source, or raise max_skipped."
            )
        if self.report.once(self.path.name):
            logger.warning("%s and skipped. Most frequent: %s (%d). Check the source.", share, *main)


def check_share(max_skipped: float) -> None:
    """Raises a SourceError if `max_skipped` is not a number from 0 to 1."""
    if isinstance(max_skipped, bool) or not isinstance(max_skipped, int | float) or not 0 <= max_skipped <= 1:
        raise SourceError(f"max_skipped={quoted(max_skipped)} is no share; write a number from 0 to 1, such as 0.5.")


def reason_of(error: ValueError) -> str:
    """A short name of what is wrong with a row, the same for every row of which the same is wrong."""
    return error.reason if isinstance(error, RowError) else RowError.reason


def _entries(folder: Path) -> list[tuple[str, str]]:
    path = folder / "errors"
    lines = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
    return [tuple(json.loads(line)) for line in sorted(lines)]


def _log(folder: Path, shown: int) -> None:
    if entries := _entries(folder):
        reasons = Counter(reason for reason, _ in entries).most_common()
        counted = ", ".join(f"{reason}: {count}" for reason, count in reasons)
        more = f" and {len(entries) - shown} more" if len(entries) > shown else ""
        places = " | ".join(sorted(error for _, error in entries)[:shown])
        logger.warning("Skipped %d bad rows (%s): %s%s", len(entries), counted, places, more)
        (folder / "logged").write_text(str(len(entries)))


def _close(folder: Path, shown: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker inherits this finalizer
        logged = folder / "logged"
        if not logged.exists() or logged.read_text() != str(len(_entries(folder))):
            _log(folder, shown)
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["ENOUGH", "MANY", "MAX_SKIPPED", "SkipReport", "SourceTally", "check_share", "reason_of"]
