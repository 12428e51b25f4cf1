"""Errors of data sources: those of a whole source, and those of one row."""

from typing import ClassVar

from ...terminal import InputError


class SourceError(InputError):
    """A data source cannot be used as described; one line that says what to write instead."""


class RowError(InputError):
    """A row cannot be used; one line that names the row. `reason` is what a skip report counts the row under."""

    reason: ClassVar[str] = "unusable row"


class CaptionError(RowError):
    """A row has no usable caption, question or answer."""

    reason = "unusable text"


class ConversationError(RowError):
    """A row holds no conversation that can be learned."""

    reason = "no conversation"


class LengthError(RowError):
    """A row has more tokens than a sample may have, and cannot be truncated."""

    reason = "too many tokens"


__all__ = ["CaptionError", "ConversationError", "LengthError", "RowError", "SourceError"]
