"""Writes the table of YAML keys into each recipe's page, from the dataclasses that the recipe parses.

    python docs/make_recipe_keys.py            # rewrites docs/recipes/*.md
    python docs/make_recipe_keys.py --check    # exits with 1 if a page is not current

The table stands between two comments. Options of transformers and TRL are listed where one of the recipe's YAML files
sets them; the others are described in the documentation of transformers and TRL.
"""

import dataclasses
import importlib
import sys
import typing
from pathlib import Path
from types import ModuleType

import yaml

PAGES = Path(__file__).parent / "recipes"
BEGIN, END = "<!-- keys: written by docs/make_recipe_keys.py -->", "<!-- end of keys -->"


def argument_groups(module: ModuleType) -> list[type]:
    """The dataclasses that a recipe's `main` takes, in order."""
    hints = typing.get_type_hints(module.main)
    return [hint for hint in hints.values() if dataclasses.is_dataclass(hint)]


def config_keys(module: ModuleType) -> set[str]:
    """Every key that a YAML file of the recipe sets."""
    files = sorted(Path(str(module.__file__)).with_suffix("").glob("*.yaml"))
    return {key for file in files for key in yaml.safe_load(file.read_text(encoding="utf-8"))}


def is_ours(group: type, name: str) -> bool:
    """Whether hf_vlm declares the field, or gives it another default or help than the class it comes from."""
    owner = next(cls for cls in group.__mro__ if name in vars(cls).get("__annotations__", {}))
    return owner.__module__.split(".")[0] not in ("transformers", "trl")


def default_of(field: dataclasses.Field) -> str:
    """The default of a field as YAML, or `required`."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return "none"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("\n...\n")
    return f"`{text.strip()}`"


def cell(text: str) -> str:
    """A text as one cell of a table."""
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", "&lt;")


def rows_of(group: type, used: set[str]) -> list[str]:
    """The lines of a group's table: our fields, and those of the libraries that the YAML files set."""
    rows = []
    for field in dataclasses.fields(group):
        if not field.init or not (is_ours(group, field.name) or field.name in used):
            continue
        text = field.metadata.get("help", "")
        if not is_ours(group, field.name):
            text = first_sentence(text) or "See transformers' `TrainingArguments`."
        rows.append(f"| `{field.name}` | {default_of(field)} | {cell(text)} |")
    return rows


def first_sentence(text: str) -> str:
    """The first sentence of a help text of another library."""
    text = " ".join(str(text).split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def key_tables(module: ModuleType) -> str:
    """All groups of a recipe as Markdown."""
    parts, used = [], config_keys(module)
    for group in argument_groups(module):
        rows = rows_of(group, used)
        if not rows:
            continue
        title = (group.__doc__ or group.__name__).strip().splitlines()[0]
        parts += [f"**{group.__name__}**: {cell(title)}", "", "| Key | Default | Meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(parts)


def updated(page: Path) -> str:
    """The text of a page with its tables current.

    Raises:
        ValueError: if the page lacks one of the two comments.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must hold {BEGIN!r} and {END!r} once each.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    module = importlib.import_module(f"hf_vlm.recipes.{page.stem}")
    return f"{before}{BEGIN}\n\n{key_tables(module)}\n{END}{after}"


def pages() -> list[Path]:
    """The pages of recipes."""
    return sorted(page for page in PAGES.glob("*.md") if page.stem != "index")


def main(arguments: list[str]) -> int:
    """Rewrites or checks every page; the exit code."""
    stale = []
    for page in pages():
        text = updated(page)
        if text != page.read_text(encoding="utf-8"):
            stale.append(page.name)
            if "--check" not in arguments:
                page.write_text(text, encoding="utf-8")
    print(f"{len(stale)} of {len(pages())} pages {'are not current' if '--check' in arguments else 'rewritten'}.")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
