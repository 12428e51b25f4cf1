"""The shape of every file: a docstring first, `__all__` last.

A checker takes one file's path and source and returns what is wrong with it, one line each. Every checker is run on the
repository and on small sources that offend.
"""

import ast
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("hf_vlm", "benchmarks", "recipes", "tests")

Checker = Callable[[str, str], list[str]]


def no_docstring_first(path: str, source: str) -> list[str]:
    """A file with code that does not begin with a docstring."""
    module = ast.parse(source)
    return [f"{path}: begin with a docstring"] if module.body and ast.get_docstring(module) is None else []


def no_all_last(path: str, source: str) -> list[str]:
    """A public module of the package that does not end with `__all__ = [...]`; a docstring alone passes."""
    stem = PurePosixPath(path).stem
    body = ast.parse(source).body
    if not path.startswith("hf_vlm/") or (stem.startswith("_") and stem != "__init__"):
        return []
    if all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body):
        return []
    match body[-1]:
        case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List()):
            return []
    return [f"{path}:{body[-1].lineno}: end with `__all__ = [...]`"]


def next_without_default(path: str, source: str) -> list[str]:
    """`next(x)` where rows are read or batches are built: its StopIteration would end an epoch as if it were over.

    Passes with `except StopIteration` around it, and of a dict: `next(iter(x.values()))`.
    """
    if not path.startswith(("hf_vlm/data/", "hf_vlm/models/", "hf_vlm/training/")):
        return []
    tree = ast.parse(source)
    tried = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and "StopIteration" in ast.unparse(node)]
    caught = {id(child) for node in tried for child in ast.walk(node)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in caught]
    bare = [call for call in calls if ast.unparse(call.func) == "next" and len(call.args) == 1]
    wrong = [call for call in bare if not ast.unparse(call.args[0]).endswith((".values())", ".items())"))]
    return [f"{path}:{call.lineno}: give next() a default, and raise an error that says what to do" for call in wrong]


CHECKERS: list[Checker] = [no_docstring_first, no_all_last, next_without_default]


@pytest.mark.parametrize("checker", CHECKERS)
def test_repository(checker: Checker) -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [checker(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    wrong = [line for lines in found for line in lines]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("checker", "path", "source", "wrong"),
    [
        (no_docstring_first, "hf_vlm/data/builtin/emoji.py", 'import torch\n"""Late."""', True),
        (no_docstring_first, "hf_vlm/data/builtin/emoji.py", '"""First."""\nimport torch', False),
        (no_docstring_first, "hf_vlm/data/__init__.py", "", False),
        (no_all_last, "hf_vlm/data/builtin/emoji.py", "__all__ = ['x']\nx = 1", True),
        (next_without_default, "hf_vlm/data/sources/rows.py", "a = next(iter(rows))", True),
        (next_without_default, "hf_vlm/data/sources/rows.py", "a = next(x for x in y)", True),
        (next_without_default, "hf_vlm/data/sources/rows.py", "a = next(x, None)", False),
        (next_without_default, "hf_vlm/training/rows.py", "a = next(iter(batch.values()))", False),
        (no_all_last, "hf_vlm/data/builtin/emoji.py", "x = 1", True),
        (no_all_last, "hf_vlm/data/__init__.py", "from .emoji import x", True),
        (no_all_last, "hf_vlm/data/__init__.py", "from .emoji import x\n__all__ = NAMES", True),
        (no_all_last, "hf_vlm/data/__init__.py", "from .emoji import x\n__all__ = ['x']", False),
        (no_all_last, "hf_vlm/data/__init__.py", '"""Title."""', False),
        (no_all_last, "hf_vlm/data/_hidden.py", "x = 1", False),
        (no_all_last, "recipes/clip_pretrain.py", "x = 1", False),
    ],
)
def test_checker(checker: Checker, path: str, source: str, wrong: bool) -> None:
    assert len(checker(path, source)) == wrong
