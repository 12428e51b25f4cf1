"""The size and shape of the code: lengths of files and functions, a docstring first, `__all__` last.

A checker takes one file's path and source and returns what is wrong with it, one line each. Every checker is run on the
repository and on small sources that offend.
"""

import ast
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES = {"hf_vlm": 300, "benchmarks": 300, "recipes": 150, "tests": 600}
MODELING_LINES = 600
FUNCTION_LINES = 40

Checker = Callable[[str, str], list[str]]


def long_file(path: str, source: str) -> list[str]:
    """A file longer than its folder allows."""
    limit = MODELING_LINES if PurePosixPath(path).name.startswith("modeling_") else FILE_LINES[path.split("/")[0]]
    count = len(source.splitlines())
    return [f"{path}: {count} lines, at most {limit}"] if count > limit else []


def long_functions(path: str, source: str) -> list[str]:
    """Functions outside tests with too many lines of code; docstring, comments and empty lines do not count."""
    if path.startswith("tests/"):
        return []
    lines = source.splitlines()
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        numbers = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            numbers -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
        code = [lines[number - 1].strip() for number in numbers]
        count = sum(bool(line) and not line.startswith("#") for line in code)
        if count > FUNCTION_LINES:
            wrong.append(f"{path}:{node.lineno}: {node.name} has {count} lines of code, at most {FUNCTION_LINES}")
    return wrong


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


CHECKERS: list[Checker] = [long_file, long_functions, no_docstring_first, no_all_last]


@pytest.mark.parametrize("checker", CHECKERS)
def test_repository(checker: Checker) -> None:
    paths = [path for folder in FILE_LINES for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [checker(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    wrong = [line for lines in found for line in lines]
    assert not wrong, "\n".join(wrong)


def function(code_lines: int) -> str:
    """A function with that many lines of code, and besides a long docstring, comments and empty lines."""
    docstring = ['    """Title.', *["    more"] * 50, '    """']
    return "\n".join(["def f():", *docstring, *["    # why"] * 50, *["    x = 1", ""] * (code_lines - 1)])


@pytest.mark.parametrize(
    ("checker", "path", "source", "wrong"),
    [
        (long_file, "hf_vlm/data/emoji.py", "x = 1\n" * 301, True),
        (long_file, "hf_vlm/data/emoji.py", "x = 1\n" * 300, False),
        (long_file, "hf_vlm/models/modeling_clip.py", "x = 1\n" * 601, True),
        (long_file, "hf_vlm/models/modeling_clip.py", "x = 1\n" * 600, False),
        (long_file, "recipes/clip_pretrain.py", "\n" * 151, True),
        (long_file, "recipes/clip_pretrain.py", "\n" * 150, False),
        (long_file, "tests/test_clip.py", "\n" * 601, True),
        (long_file, "benchmarks/clip.py", "\n" * 301, True),
        (long_functions, "hf_vlm/data/emoji.py", function(41), True),
        (long_functions, "hf_vlm/data/emoji.py", function(40), False),
        (long_functions, "recipes/clip_pretrain.py", "async " + function(41), True),
        (long_functions, "hf_vlm/data/emoji.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 40, True),
        (long_functions, "tests/test_clip.py", function(41), False),
        (no_docstring_first, "hf_vlm/data/emoji.py", 'import torch\n"""Late."""', True),
        (no_docstring_first, "hf_vlm/data/emoji.py", '"""First."""\nimport torch', False),
        (no_docstring_first, "hf_vlm/data/__init__.py", "", False),
        (no_all_last, "hf_vlm/data/emoji.py", "__all__ = ['x']\nx = 1", True),
        (no_all_last, "hf_vlm/data/emoji.py", "x = 1", True),
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
