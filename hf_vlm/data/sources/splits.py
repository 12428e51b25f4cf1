"""Split expressions of `datasets` ("train", "train[:50%]", "train+test[10:20]") for every kind of source.

- Rows by number: all expressions. Streams have no row numbers: they take names ("train", "train+test", "all").
- An expression that names a split that does not exist is refused, and so is one that leaves no rows.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets

from .rows import SourceError

TRAIN = "train"


def split_names(split: str) -> list[str]:
    """The names in an expression, in order."""
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def find_rows(path: str, split: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The rows of an expression: the split, the first row and the row before which to end.

    Args:
        path: The source in errors.
        split: The expression.
        lengths: Split to number of rows.

    Raises:
        SourceError: if a split does not exist, the expression is wrong, or leaves no rows.
    """
    check_names(path, split, lengths)
    if split == "all":
        split = "+".join(lengths)
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise SourceError(f"{path}: the split {split!r} cannot be read: {error}") from None
    found = [(part.splitname, part.from_, part.to) for part in parts if part.to > part.from_]
    if not found:
        rows = ", ".join(f"{name} has {length} rows" for name, length in lengths.items())
        raise SourceError(f"{path}: has no rows in split {split!r}; {rows}.")
    return found


def find_streams(path: str, split: str, known: Iterable[str]) -> list[str]:
    """The splits of an expression for a stream.

    Raises:
        SourceError: if a split does not exist, or the expression takes a slice.
    """
    if set(split) & set("[("):
        raise SourceError(f"{path}: the split {split!r} is a slice, but streams have no slices: leave out streaming.")
    check_names(path, split, known)
    return list(known) if split == "all" else split_names(split)


def check_names(path: str, split: str, known: Iterable[str]) -> None:
    """Raises a SourceError if an expression names another split than the known ones."""
    unknown = [name for name in split_names(split) if name not in known and split != "all"]
    if unknown:
        raise SourceError(f"{path}: no split {unknown[0]!r}; it has {', '.join(known)}.")


def split_of_files(path: str, split: str, files: Iterable[Path]) -> str:
    """The name of the one split that files hold: train, or the one that their names say, as `test.parquet` does.

    Raises:
        SourceError: if an expression names another one.
    """
    names = sorted(set(split_names(split)))
    if len(names) == 1 and (names[0] in (TRAIN, "all") or all(_says(file, names[0]) for file in files)):
        return TRAIN if names[0] == "all" else names[0]
    wrong = next((name for name in names if name != TRAIN), names[0])
    raise SourceError(f"{path}: no split {wrong!r}; files hold one split, train, or the one in their names (test.csv).")


def one_split(path: str) -> bool:
    """Whether a path names files, which hold one split, and not a folder or a dataset on the Hub."""
    return "*" in Path(path).name or Path(path).expanduser().is_file()


def _says(file: Path, name: str) -> bool:
    letters = "[a-zA-Z]"
    found = re.search(rf"(?<!{letters}){re.escape(name)}(?!{letters})", file.name)
    return found is not None or file.parent.name == name


__all__ = ["TRAIN", "check_names", "find_rows", "find_streams", "one_split", "split_names", "split_of_files"]
