"""Imports point one way, in no circle, and `models/` imports only what a checkpoint pushed with its code carries along.

A checker takes a tree, `{path: source}`, and returns what is wrong with it, one line each. Every checker is run on the
repository and on small trees that offend.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FRONT_ENDS = {"cli", "recipes"}
ANYTHING = None
DATA = {"data", "data.batches", "data.builtin", "data.features", "data.sources", "data.wheels", "paths", "terminal"}
# How images and messages are read: rules that travel with a model's code, import nothing, and are data's rules too.
RULES = {"models.images", "models.messages"}
# What each part of hf_vlm may import of hf_vlm. The part "" is hf_vlm/__init__.py, the part "data" its `__init__.py`.
ALLOWED = {
    "": ANYTHING,
    "lazy": {"lazy"},
    "files": {"files"},
    "checkpoints": {"checkpoints", "terminal"},
    "paths": {"paths"},
    "terminal": {"terminal"},
    "families": {"families", "models"},
    "registration": {"registration", "families"},
    "models": {"models", "lazy"},
    **dict.fromkeys(RULES, RULES),
    "metrics": {"metrics"},
    "data": {*DATA, "lazy"},
    "data.wheels": {"data.wheels", "paths", "terminal"},
    "data.sources": {"data.sources", "data.wheels", "paths", "terminal", *RULES},
    "data.batches": {"data.batches", "data.sources", "data.wheels", "paths", "terminal", *RULES},
    "data.builtin": {"data.builtin", "data.batches", "data.sources", "data.wheels", "paths", "terminal"},
    "data.features": {"data.features", "data.sources", "data.wheels", "paths", "terminal", *RULES},
    "training": {"training", "checkpoints", "models", "families", "files", "lazy", *DATA},
    "evaluation": {"evaluation", "checkpoints", "models", "families", "files", "metrics", "lazy", *DATA},
    "hub": {"hub", "checkpoints", "models", "families", "files", "metrics", "paths", "terminal"},
    "search": {"search", "checkpoints", "models", "evaluation", "files", "lazy", *DATA},
    "bootstrap": {"bootstrap", "checkpoints", "models", "files", "metrics", "evaluation", "hub", *DATA},
    "runs": {
        *{"runs", "models", "families", "files", "metrics", "training", "evaluation", "hub", "search", "bootstrap"},
        *{"terminal", *DATA},
    },
    "cli": ANYTHING,
    "recipes": ANYTHING,
}

IMPORT_IN_TEXT = re.compile(r"^\s*(from|import)\s+(\.|hf_vlm\b)", flags=re.MULTILINE)

Tree = dict[str, str]


def read_tree(*folders: str) -> Tree:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part_of(module: str) -> str:
    """The folder or file of hf_vlm that a module belongs to; those of data/ and RULES are parts of their own."""
    _, *parts = [*module.split("."), ""][:3]
    if ".".join(parts) in RULES:
        return ".".join(parts)
    return ".".join(parts) if parts[:1] == ["data"] and parts[1] else parts[0]


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of ours that a file imports: a module's name, or module and name within it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = PurePosixPath(path).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "hf_vlm")


def module_of(name: str, modules: set[str]) -> str:
    """The module that an imported dotted name comes from."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def wrong_directions(tree: Tree) -> list[str]:
    """Imports against ALLOWED, imports of a front end, and private names taken by programs outside the package."""
    modules = {module_name(path) for path in tree}
    wrong = []
    for path, source in tree.items():
        inside = path.startswith("hf_vlm/")
        own = part_of(module_name(path))
        if inside and own not in ALLOWED:
            wrong.append(f"{path}: hf_vlm.{own} is not in ALLOWED: say there what it may import")
            continue
        allowed = ALLOWED[own] if inside else ANYTHING
        for line, name in imported(path, source):
            part = part_of(module_of(name, modules))
            to_front_end = part in FRONT_ENDS and part != own
            among = {part, "models"} if part in RULES else {part}
            against_table = allowed is not ANYTHING and not among & allowed
            private = not inside and is_private(name)
            if to_front_end or against_table or private:
                wrong.append(f"{path}:{line}: must not import {name}")
    return wrong


def import_cycle(tree: Tree) -> list[str]:
    """The modules of one circle of imports, those inside functions included, or nothing."""
    modules = {module_name(path) for path in tree}
    graph = {
        module_name(path): {module_of(name, modules) for _, name in imported(path, source)}
        for path, source in tree.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def wrong_in_models(tree: Tree) -> list[str]:
    """Whatever in `models/` would not survive `push_to_hub` with the code: transformers copies the siblings that it
    finds by a regular expression for the text `from .sibling import name`, which also reads strings.
    """
    wrong = []
    for path, source in tree.items():
        folder = PurePosixPath(path).parent
        if not path.startswith("hf_vlm/models/"):
            continue
        if folder.name != "models":
            wrong.append(f"{path}: models/ is flat")
        if path == "hf_vlm/models/__init__.py":  # no file imports it as a sibling, so it stays at home
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "hf_vlm" for alias in node.names):
                wrong.append(f"{path}:{node.lineno}: write `from .sibling import name`")
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "hf_vlm"):
                sibling = node.level == 1 and f"{folder}/{node.module}.py" in tree
                if not sibling or any(alias.name == "*" for alias in node.names):
                    wrong.append(f"{path}:{node.lineno}: write `from .sibling import name`")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and IMPORT_IN_TEXT.search(node.value):
                wrong.append(f"{path}:{node.lineno}: a line of this string reads like an import")
    return wrong


def test_directions() -> None:
    wrong = wrong_directions(read_tree("hf_vlm", "recipes", "benchmarks"))
    assert not wrong, "\n".join(wrong)


def test_no_cycle() -> None:
    cycle = import_cycle(read_tree("hf_vlm"))
    assert not cycle, " -> ".join(cycle)


def test_models_travel_with_a_checkpoint() -> None:
    wrong = wrong_in_models(read_tree("hf_vlm"))
    assert not wrong, "\n".join(wrong)


MODULES = dict.fromkeys(
    [
        "hf_vlm/__init__.py",
        "hf_vlm/cli/__init__.py",
        "hf_vlm/cli/main.py",
        "hf_vlm/data/__init__.py",
        "hf_vlm/data/batches/pairs.py",
        "hf_vlm/data/builtin/emoji.py",
        "hf_vlm/data/sources/images.py",
        "hf_vlm/evaluation/reports.py",
        "hf_vlm/families.py",
        "hf_vlm/hub/push.py",
        "hf_vlm/metrics/retrieval.py",
        "hf_vlm/models/__init__.py",
        "hf_vlm/models/images.py",
        "hf_vlm/models/losses.py",
        "hf_vlm/models/messages.py",
        "hf_vlm/models/modeling_clip.py",
        "hf_vlm/training/trainer.py",
    ],
    "",
)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("hf_vlm/models/losses.py", "from ..data.builtin import emoji", "hf_vlm.data.builtin.emoji"),
        ("hf_vlm/models/losses.py", "import hf_vlm", "hf_vlm"),
        ("hf_vlm/models/images.py", "from .losses import clip_loss", "hf_vlm.models.losses.clip_loss"),
        (
            "hf_vlm/data/sources/images.py",
            "from hf_vlm.models.losses import clip_loss",
            "hf_vlm.models.losses.clip_loss",
        ),
        ("hf_vlm/data/sources/images.py", "from ..batches import pairs", "hf_vlm.data.batches.pairs"),
        (
            "hf_vlm/data/batches/pairs.py",
            "from ..builtin.emoji import load_emoji",
            "hf_vlm.data.builtin.emoji.load_emoji",
        ),
        ("hf_vlm/data/builtin/emoji.py", "from hf_vlm import load_emoji", "hf_vlm.load_emoji"),
        ("hf_vlm/data/builtin/emoji.py", "from hf_vlm.data import load_emoji", "hf_vlm.data.load_emoji"),
        ("hf_vlm/data/__init__.py", "def late():\n    from ..training import trainer", "hf_vlm.training.trainer"),
        ("hf_vlm/evaluation/reports.py", "import torch, hf_vlm.hub.push as e", "hf_vlm.hub.push"),
        ("hf_vlm/metrics/retrieval.py", "from hf_vlm.models import losses", "hf_vlm.models.losses"),
        (
            "hf_vlm/metrics/retrieval.py",
            "from hf_vlm.evaluation.reports import report",
            "hf_vlm.evaluation.reports.report",
        ),
        ("hf_vlm/training/trainer.py", "from hf_vlm.evaluation import reports", "hf_vlm.evaluation.reports"),
        ("hf_vlm/families.py", "from .hub.push import push_run", "hf_vlm.hub.push.push_run"),
        ("hf_vlm/hub/push.py", "from ..training import trainer", "hf_vlm.training.trainer"),
        ("hf_vlm/__init__.py", "from .cli.main import main", "hf_vlm.cli.main.main"),
        ("hf_vlm/runs/finish.py", "from ..cli.main import app", "hf_vlm.cli.main.app"),
        ("recipes/clip.py", "from hf_vlm.cli.main import app", "hf_vlm.cli.main.app"),
        ("recipes/clip.py", "from hf_vlm.models.losses import _gather", "hf_vlm.models.losses._gather"),
        ("hf_vlm/extras.py", "", "hf_vlm.extras is not in ALLOWED"),
    ],
)
def test_a_wrong_direction_is_seen(path: str, source: str, expected: str) -> None:
    (wrong,) = wrong_directions({**MODULES, path: source})
    assert wrong.startswith(path)
    assert expected in wrong


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hf_vlm/evaluation/reports.py", "from ..metrics.retrieval import recall"),
        (
            "hf_vlm/training/trainer.py",
            "import torch\nfrom ..models.losses import a\nfrom hf_vlm.data.builtin import emoji",
        ),
        ("hf_vlm/cli/main.py", "import hf_vlm.hub.push\nfrom ..training import trainer"),
        ("hf_vlm/data/builtin/emoji.py", "from ..sources.images import load_image\nimport hf_vlm_other"),
        ("hf_vlm/data/sources/images.py", "from ...models.images import load"),
        ("hf_vlm/training/trainer.py", "from ..models.messages import flat"),
        ("recipes/clip.py", "import hf_vlm\nfrom hf_vlm import __version__\nfrom hf_vlm.training.trainer import A"),
    ],
)
def test_a_right_direction_passes(path: str, source: str) -> None:
    assert wrong_directions({**MODULES, path: source}) == []


@pytest.mark.parametrize(
    "sources",
    [
        {
            "data/builtin/emoji": "from ..sources.images import a",
            "data/sources/images": "from hf_vlm.data.builtin.emoji import b",
        },
        {
            "data/builtin/emoji": "from ..sources import images",
            "data/sources/images": "def late():\n    import hf_vlm.data.builtin.emoji",
        },
        {"data/__init__": "from .builtin.emoji import a", "data/builtin/emoji": "from hf_vlm.data import b"},
        {"models/losses": "from .losses import a"},
    ],
)
def test_a_cycle_is_seen(sources: Tree) -> None:
    assert import_cycle({**MODULES, **{f"hf_vlm/{name}.py": source for name, source in sources.items()}})


def test_no_cycle_is_made_up() -> None:
    sources = {
        "hf_vlm/data/__init__.py": "from .builtin.emoji import a",
        "hf_vlm/data/builtin/emoji.py": "from ..sources import images",
    }
    assert import_cycle({**MODULES, **sources}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..data import emoji",
        "from . import losses",
        "from .losses import *",
        "from .missing import name",
        "from .sub.losses import name",
        "from hf_vlm.models.losses import name",
        "import hf_vlm.models.losses",
        "def late():\n    from hf_vlm import name",
        '"""Title.\n\n    from .losses import name\n"""',
        '"""Title.\n\nfrom hf_vlm import name\n"""',
        'TEXT = "a\\nimport .losses"',
    ],
)
def test_what_would_not_travel_is_seen(source: str) -> None:
    assert len(wrong_in_models({**MODULES, "hf_vlm/models/modeling_clip.py": source})) == 1


def test_what_travels_passes() -> None:
    source = '"""From .losses:\n\n>>> from hf_vlm import A\n"""\nimport torch\nfrom .losses import (\n    a,\n)\n'
    assert wrong_in_models({**MODULES, "hf_vlm/models/modeling_clip.py": source}) == []


def test_a_folder_in_models_is_seen() -> None:
    assert len(wrong_in_models({**MODULES, "hf_vlm/models/clip/modeling.py": ""})) == 1
