"""The packaged recipes as `hf-vlm recipes` lists, shows and copies them; nothing here imports torch.

The first line of a recipe's docstring says what it trains. The comment at the top of a YAML file says what the file
needs: a description in free text, and lines that begin with `Hardware:`, `Data:` or `After:`.
"""

import ast
import difflib
import importlib
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FIELD = re.compile(r"(Hardware|Data|After): +(.+)")


def nearest(name: str, names: Iterable[str]) -> str:
    """` Did you mean ...?` with the most similar of the names; empty if none is similar."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {found[0]}?" if found else ""


@dataclass(frozen=True)
class RecipeConfig:
    """One YAML file of a recipe.

    Args:
        path: The file.
        description: The free text of its first comment.
        hardware: Machine and time.
        data: The data that the run reads.
        after: The recipe whose output the run starts from; empty if there is none.
    """

    path: Path
    description: str
    hardware: str = ""
    data: str = ""
    after: str = ""

    @property
    def name(self) -> str:
        """The file's name without its suffix, as `--config` takes it."""
        return self.path.stem

    @classmethod
    def read(cls, path: Path) -> "RecipeConfig":
        """The first comment of a YAML file."""
        fields, text = {}, []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment = line.removeprefix("#").strip()
            if match := FIELD.fullmatch(comment):
                fields[match[1].lower()] = match[2]
            else:
                text.append(comment)
        return cls(path, " ".join(text), **fields)


@dataclass(frozen=True)
class Recipe:
    """One recipe: a script, and next to it a folder of YAML files with the same name."""

    path: Path

    @property
    def name(self) -> str:
        """The script's name without its suffix."""
        return self.path.stem

    @cached_property
    def title(self) -> str:
        """What the recipe trains: the first line of its docstring."""
        docstring = ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""
        return docstring.partition("\n")[0]

    @cached_property
    def configs(self) -> dict[str, RecipeConfig]:
        """Its YAML files by name, the small ones first."""
        files = sorted(self.path.with_suffix("").glob("*.yaml"), key=lambda path: ("small" not in path.stem, path.stem))
        return {path.stem: RecipeConfig.read(path) for path in files}

    def find_config(self, name: str) -> Path:
        """The YAML file of this name, or the file at this path.

        Raises:
            ValueError: if there is neither.
        """
        if name in self.configs:
            return self.configs[name].path
        if Path(name).is_file():
            return Path(name)
        if Path(name).suffix in (".yaml", ".yml") or "/" in name:
            raise ValueError(f"There is no file {name}.{nearest(Path(name).stem, self.configs)}")
        names = ", ".join(self.configs) or "none"
        raise ValueError(f"{self.name} has no config {name!r}; it has {names}.{nearest(name, self.configs)}")


def load_recipes() -> list[Recipe]:
    """All packaged recipes, in an order in which they can be run: no recipe stands before the one it starts from."""
    (folder,) = importlib.import_module("hf_vlm.recipes").__path__
    found = {path.stem: Recipe(path) for path in sorted(Path(folder).glob("*.py")) if path.stem != "__init__"}

    def depth(recipe: Recipe) -> int:
        before = {name for config in recipe.configs.values() for name in config.after.split()[:1] if name in found}
        return max((1 + depth(found[name]) for name in before), default=0)

    return sorted(found.values(), key=lambda recipe: (depth(recipe), recipe.name))


def find_recipe(name: str) -> Recipe:
    """The packaged recipe of this name.

    Raises:
        ValueError: if there is none.

    Example:

        >>> find_recipe("clip_pretrain").configs["small"].hardware
        '2 CPU cores, 40 minutes'
    """
    recipes = {recipe.name: recipe for recipe in load_recipes()}
    if name not in recipes:
        raise ValueError(f"There is no recipe {name!r}; there are {', '.join(recipes)}.{nearest(name, recipes)}")
    return recipes[name]


def format_recipes(recipes: Iterable[Recipe]) -> str:
    """One paragraph for each recipe: name and title, then hardware, time and data of each of its YAML files."""
    lines = []
    for recipe in recipes:
        lines += [recipe.name, f"    {recipe.title}"]
        width = max((len(name) for name in recipe.configs), default=0)
        for config in recipe.configs.values():
            needs = [config.hardware, config.data, f"after {config.after}" if config.after else ""]
            lines.append(f"    --config {config.name:{width}}  {'; '.join(filter(None, needs))}")
        lines.append("")
    return "\n".join(lines)


def copy_recipe(recipe: Recipe, folder: str | Path) -> list[Path]:
    """Copies a recipe's script and YAML files into a folder, which is created if it does not exist.

    Returns:
        The copies; the script is first and finds its YAML files in the folder next to it.

    Raises:
        ValueError: if one of the files exists already; then nothing is copied.
    """
    sources = [recipe.path, *(config.path for config in recipe.configs.values())]
    copies = [Path(folder) / source.relative_to(recipe.path.parent) for source in sources]
    if existing := [path for path in copies if path.exists()]:
        raise ValueError(f"{existing[0]} exists and is not overwritten: name another folder.")
    for source, copied in zip(sources, copies, strict=True):
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copied)
    return copies


__all__ = [
    "Recipe",
    "RecipeConfig",
    "copy_recipe",
    "find_recipe",
    "format_recipes",
    "load_recipes",
    "nearest",
]
