"""Lazy package namespaces: a public name is imported from its module when it is first used (PEP 562).

The static imports under `if TYPE_CHECKING:` in a package's `__init__.py` are the only table. Type checkers read them as
they stand, and `lazy_names` reads them to learn which module defines which name.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` for a package.

    Args:
        package: `__name__` of the package.
        file: `__file__` of the package.

    Example:
        ```python
        if TYPE_CHECKING:
            from .modeling_clip import VlmClipModel
        else:
            __getattr__, __dir__ = lazy_names(__name__, __file__)
        ```
    """
    modules = static_imports(Path(file).read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names


def static_imports(source: str) -> dict[str, str]:
    """The relative module of every name that is imported under `if TYPE_CHECKING:`."""
    blocks = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: "." * node.level + (node.module or "") for node in imports for alias in node.names}


__all__ = ["lazy_names", "static_imports"]
