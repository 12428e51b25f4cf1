"""The recipes, importable as `hf_vlm.recipes.NAME`: in a checkout they lie in the top-level folder `recipes`.

The wheel contains that folder in place of this file (see the build section of pyproject.toml).
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "recipes")]  # makes this module a package

__all__ = []
