"""Where a file really lies: whether it is inside a folder after links are resolved.

Data and checkpoints come from others. A path in a row, a name in a dataset card or a link in a folder must not make us
read or publish another file of this machine.
"""

import os
import re
from functools import lru_cache
from pathlib import Path

_OUTWARD = re.compile(r"^([/\\~]|[A-Za-z][A-Za-z0-9+.-]*:)|(^|[/\\])\.\.([/\\]|$)|::|\0")


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a file lies below a folder, or is the folder, after links are resolved.

    The folder of a commit in the Hub's cache holds links to the `blobs` of its repository, which count as inside.
    """
    return resolve_inside(path, folder) is not None


def resolve_inside(path: str | os.PathLike, folder: str | os.PathLike) -> str | None:
    """The path of a file after links are resolved, if it lies below a folder as in [`is_inside`]; otherwise None."""
    real = os.path.realpath(path)
    return real if os.path.join(real, "").startswith(_inner(os.path.abspath(folder))) else None


def leads_out(name: str) -> bool:
    """Whether a name or pattern may leave its folder by what it says: an absolute path, a URL, or one with `..`."""
    return _OUTWARD.search(name) is not None


@lru_cache(256)  # every row that names a file asks
def _inner(folder: str) -> tuple[str, ...]:
    """The beginnings of the real paths inside a folder."""
    root = _resolved(folder)
    return tuple(os.path.join(each, "") for each in (root, *_blobs(root)))


def _resolved(path: str | os.PathLike) -> Path:
    return Path(os.path.realpath(path))


def _blobs(root: Path) -> list[Path]:
    """The folder of the files that the links of a commit in the Hub's cache lead to; none for any other folder."""
    for commit in (root, *root.parents):
        repository = commit.parent.parent
        is_commit = commit.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
        if is_commit and _resolved(repository / "blobs") == repository / "blobs":  # and not itself a link to elsewhere
            return [repository / "blobs"]
    return []


__all__ = ["is_inside", "leads_out", "resolve_inside"]
