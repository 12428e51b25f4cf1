"""Text from outside (file names, cells, configs) made safe to show: in errors, reports, tables and cards.

- A terminal obeys control characters and escape sequences; bidirectional overrides and line separators forge lines; a
  lone surrogate cannot be written at all. All of these are shown as escapes, such as `\\x1b`.
- Letters of all scripts, spaces of all widths and emoji stay as they are. Text that is shown once stays the same when
  shown again.
"""

import reprlib
import unicodedata
from typing import Any

JOINERS = ("\u200c", "\u200d")  # between letters of Persian or Hindi, and within emoji
VALUE_LENGTH = 200
MESSAGE_LENGTH = 2000


def printable(text: Any, limit: int | None = None) -> str:
    """A text on one line, with everything that a terminal would obey escaped.

    Args:
        text: A text, or any object that `str` turns into one.
        limit: Maximum number of characters; a longer text ends with "…". None: no limit.

    Example:
        ```python
        >>> printable("a\\x1b[31mb\\n")
        'a\\\\x1b[31mb\\\\n'
        ```
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = text[: limit + 1]
    if not text.isascii() or not text.isprintable():
        text = "".join(each if _is_shown(each) else _escaped(each) for each in text)
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def quoted(value: Any) -> str:
    """A value as Python writes it, printable and at most 200 characters: a cell or an option in an error.

    Only the beginning and the end of a long text, and the beginning of a long list, are shown.

    Example:
        ```python
        >>> quoted(["a cat\\n", None])
        "['a cat\\\\n', None]"
        ```
    """
    return printable(_SHORT.repr(value), VALUE_LENGTH)


class InputError(ValueError):
    """A file, cell or option cannot be used; the message is one printable line of bounded length."""

    def __init__(self, message: str):
        super().__init__(printable(message, MESSAGE_LENGTH))


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = VALUE_LENGTH
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20
_SHORT.maxlevel = 4


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


__all__ = ["JOINERS", "InputError", "printable", "quoted"]
