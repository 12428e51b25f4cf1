"""README and docs: links lead somewhere, snippets run, commands exist, the tables of keys are current.

A Python block runs on tiny checkpoints in the folders that the pages name. The comment `<!-- no-run: reason -->` before
a block exempts it. Every `hf-vlm` command is parsed by the command line itself, without being run.
"""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import hf_vlm.data
from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm.cli.main import app
from hf_vlm.runs.catalogue import find_recipe, load_recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "model_cards" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"(?:<!-- no-run: (?P<reason>[^>]+?) -->\s+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE_COMMAND = re.compile(r"`(hf-vlm [^`]+)`")
README_LINES = 150
USAGE_ERROR = typer.BadParameter.__mro__[1]  # Typer has a copy of Click of its own


def load_script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_recipe_keys = load_script("make_recipe_keys")


def blocks(text: str, language: str) -> Iterator[tuple[str, str | None]]:
    """Code and reason not to run it, of each fenced block in a language."""
    for match in FENCE.finditer(text):
        if match["language"] == language:
            yield match["code"], match["reason"]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file or no heading."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    wrong = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    assert not broken_links(ROOT / name)


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](other.md) [d](https://example.org)\n```\n[e](code.md)\n```\n")
    assert broken_links(page) == ["#two", "other.md"]


def recipe_keys(name: str) -> set[str]:
    """All keys of a recipe."""
    module = importlib.import_module(f"hf_vlm.recipes.{name}")
    fields = (group.__dataclass_fields__ for group in make_recipe_keys.argument_groups(module))
    return set().union(*fields)


def check_recipe(name: str, options: list[str]) -> None:
    """Raises if there is no such recipe, config or option."""
    recipe, keys = find_recipe(name), recipe_keys(name)
    for number, option in enumerate(options):
        if option == "--config":
            recipe.find_config(options[number + 1])
        elif option.startswith("--"):
            assert option.removeprefix("--") in keys, f"{name} has no option {option}"


def check_command(line: str) -> None:
    """Raises if a line that calls hf-vlm, or a recipe as a module, could not be parsed."""
    words = shlex.split(line, comments=True)
    if match := re.search(r"-m hf_vlm\.recipes\.(\w+)(.*)", shlex.join(words)):
        return check_recipe(match[1], shlex.split(match[2]))
    if words[0] != "hf-vlm":
        return None
    if words[1:3] == ["recipes", "run"]:
        return check_recipe(words[3], words[4:])
    if words[1] == "train":
        return check_recipe(words[2], words[3:]) if words[2:] else None
    command, arguments = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"hf-vlm has no command {name}"
        command = command.commands[name]
    if arguments != ["--help"]:
        command.make_context(command.name, arguments)
    return None


def commands(text: str) -> list[str]:
    """Command lines of a page that are shown whole."""
    lines = [line for code, _ in blocks(text, "bash") for line in code.replace("\\\n", " ").splitlines()]
    lines += [line for line in INLINE_COMMAND.findall(text) if "NAME" not in line and len(line.split()) > 2]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("name", NAMES)
def test_commands(name: str) -> None:
    for line in commands((ROOT / name).read_text(encoding="utf-8")):
        for part in line.split(" && "):
            check_command(part)
            if match := re.match(r"python (\S+\.py)", part):
                assert (ROOT / match[1]).is_file(), part


@pytest.mark.parametrize(
    "line",
    [
        "hf-vlm evaluate my-clip --no-such-option 1",
        "hf-vlm no-such-command",
        "hf-vlm recipes run clip_pretrain --config no-such-config",
        "hf-vlm recipes run clip_pretrain --no_such_key 1",
        "torchrun -m hf_vlm.recipes.no_such_recipe --config small",
    ],
)
def test_wrong_commands_are_found(line: str) -> None:
    with pytest.raises((AssertionError, ValueError, USAGE_ERROR)):
        check_command(line)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny checkpoints under the names that the pages use."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.clip_model(vision={"image_size": 64, "patch_size": 16}).save_pretrained(folder / "clip-small")
    tiny.clip_processor(size=64).save_pretrained(folder / "clip-small")
    tiny.blip_model(hf_vlm.VlmBlipForPreTraining).save_pretrained(folder / "blip-small")
    tiny.blip_processor().save_pretrained(folder / "blip-small")
    tiny_llava.llava_model().save_pretrained(folder / "llava-small")
    tiny_llava.llava_processor().save_pretrained(folder / "llava-small")
    tiny_blip2.bert().save_pretrained(folder / "minilm")
    tiny_blip2.bert_tokenizer().save_pretrained(folder / "minilm")
    return folder


def runnable_pages() -> list[str]:
    """Pages with a Python block that is not exempt."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
    return [name for name, text in texts.items() if any(reason is None for _, reason in blocks(text, "python"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", runnable_pages())
def test_python_blocks_run(name: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint in checkpoints.iterdir():
        (tmp_path / checkpoint.name).symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_vlm.data, "resolve_part", lambda part: str(tmp_path / part.removeprefix("wheel:")))
    namespace = {"__name__": "__main__"}
    for number, (code, reason) in enumerate(blocks((ROOT / name).read_text(encoding="utf-8"), "python")):
        if reason is None:
            exec(compile(code, f"{name}, Python block {number}", "exec"), namespace)


def test_exempt_blocks_compile() -> None:
    for page in PAGES:
        for code, _ in blocks(page.read_text(encoding="utf-8"), "python"):
            compile(code, str(page), "exec")


def test_every_recipe_has_a_current_page() -> None:
    recipes = {recipe.name: recipe for recipe in load_recipes()}
    pages = {page.stem: page for page in make_recipe_keys.pages()}
    assert pages.keys() == recipes.keys()
    for name, page in pages.items():
        text = page.read_text(encoding="utf-8")
        assert text == make_recipe_keys.updated(page), f"{page}: run python docs/make_recipe_keys.py"
        missing = [config for config in recipes[name].configs if f"`{config}`" not in text]
        assert not missing, f"{page} does not mention {missing}"


def test_images_of_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all((ROOT / source).is_file() for source in re.findall(r'<img src="([^"]+)"', text))
