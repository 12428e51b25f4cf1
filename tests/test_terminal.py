"""Text from outside as the terminal shows it: nothing that drives it, nothing endless, letters unchanged."""

import pickle

import pytest

from hf_vlm.data.sources.images import ImageError
from hf_vlm.data.sources.rows import CaptionError, SourceError
from hf_vlm.terminal import InputError, printable, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\nb\rc\td\0", "a\\nb\\rc\\td\\x00"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),
        ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\x85d"),
        ("half \ud83d emoji", "half \\ud83d emoji"),
        ("\u2066\u2069\u200b\ufeff\U000e0041", "\\u2066\\u2069\\u200b\\ufeff\\U000e0041"),
    ],
)
def test_what_drives_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert str(InputError(text)) == shown
    printable(text).encode("utf-8")


@pytest.mark.parametrize(
    "text",
    ["👩‍🚀 é ❤️", "naïve café", "東京　写真", "می‌خواهم", "שלום", "C:\\photos\\new", "1 000 €", 'it\'s "quoted"'],
)
def test_other_text_is_unchanged(text: str) -> None:
    assert printable(text) == text


def test_long_text_is_truncated() -> None:
    assert printable("a" * 10, 10) == "a" * 10
    assert printable("a" * 11, 10) == "a" * 9 + "…"
    assert printable("\x1b" * 1000, 10) == "\\x1b\\x1b\\…"
    assert len(str(InputError("a" * 10**6))) == 2000


def test_values_are_quoted_and_short() -> None:
    assert quoted("a\x1b") == "'a\\x1b'"
    assert quoted(["yes", None, 1.5]) == "['yes', None, 1.5]"
    assert quoted("") == "''"
    endless: list = []
    endless.append(endless)
    for value in ("a" * 10**6, b"a" * 10**6, list(range(10**6)), {i: i for i in range(10**4)}, endless):
        assert len(quoted(value)) <= 200


class Rude:
    """An object whose `repr` holds an escape sequence."""

    def __repr__(self) -> str:
        return "\x1b]0;title\x07"


def test_objects_cannot_smuggle_escapes() -> None:
    assert quoted(Rude()) == "\\x1b]0;title\\x07"


@pytest.mark.parametrize("kind", [ImageError, CaptionError, SourceError])
def test_errors_about_data_are_one_printable_line(kind: type[ValueError]) -> None:
    error = kind("a\x1b[2J.png\n: damaged")
    assert str(error) == "a\\x1b[2J.png\\n: damaged"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
