"""What a user installs: the wheel holds the package with everything it needs and nothing else."""

import ast
import json
import os
import site
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cases import tiny
from loopback_hub import Account, LoopbackHub

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("hf_vlm-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    written = {path for path in (ROOT / "hf_vlm").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".py", ".yaml")]
    expected = {path.relative_to(ROOT).as_posix() for path in written} - {"hf_vlm/recipes.py"}
    assert packaged == expected | {f"hf_vlm/{path.relative_to(ROOT).as_posix()}" for path in recipes}
    assert "hf_vlm/py.typed" in packaged


@pytest.mark.slow
def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    texts = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "Apache License" in texts["LICENSE"]
    assert "hf-vlm = hf_vlm.cli.main:main" in texts["entry_points.txt"]


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel; the dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # without their own .pth files
    python = folder / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel.filename)]
    subprocess.run([sys.executable, *install], check=True)
    return python


def tiny_run(folder: Path) -> Path:
    """A YAML file of clip_pretrain with a tiny model on eight rows of a parquet file."""
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"image": tiny.image(seed=i), "caption": tiny.CAPTIONS[i % 5]} for i in range(8)]
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    layers = tiny.layer_sizes()
    values = {"vision_config": {**layers, "patch_size": 16}, "text_config": {**layers, **tiny.TOKENS}}
    values |= {"tokenizer": "tokenizer", "max_text_length": tiny.MAX_LENGTH, "image_size": 32, "projection_dim": 16}
    values |= {"sources": [{"path": "rows.parquet"}], "augmentation": "none", "output_dir": "my-clip"}
    values |= {"per_device_train_batch_size": 4, "save_steps": 1, "bf16": False, "report_to": "none"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


@pytest.mark.slow
def test_a_newcomers_walk_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """In an empty folder: list, show, copy, run two steps, resume under torchrun, evaluate, push."""
    tiny_run(tmp_path)
    with LoopbackHub({"hf_token": Account("ada")}) as hub:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env = {
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_token",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

        def run(*command: str, code: int = 0) -> str:
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == code, done.stderr
            return done.stdout if code == 0 else done.stderr

        command = str(installed.with_name("hf-vlm"))
        where = run(str(installed), "-c", "import hf_vlm; print(hf_vlm.__file__)")
        assert installed.parents[1] in Path(where).parents
        listed = run(command, "train")
        assert listed.startswith(run(command, "recipes", "list").rstrip("\n"))
        assert all(path.stem in listed for path in (ROOT / "recipes").glob("*_*.py") if path.stem != "__init__")
        assert run(command, "recipes", "show", "clip_pretrain", "--config", "small").startswith("# A small CLIP")
        run(command, "recipes", "copy", "clip_pretrain", "mine")
        assert "exists" in run(command, "recipes", "copy", "clip_pretrain", "mine", code=1)
        assert (tmp_path / "mine" / "clip_pretrain" / "paper.yaml").is_file()

        run(command, "recipes", "run", "clip_pretrain", "--config", "tiny.yaml", "--max_steps", "2")
        torchrun = [str(installed), "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"]
        run(*torchrun, "-m", "hf_vlm.recipes.clip_pretrain", "--config", "tiny.yaml", "--max_steps", "3")
        state = json.loads((tmp_path / "my-clip" / "checkpoint-3" / "trainer_state.json").read_text())
        assert state["global_step"] == 3
        resumed = json.loads((tmp_path / "my-clip" / "training_record.json").read_text())
        assert resumed["training"]["steps"] == 3

        own = ["--data", "rows.parquet", "--split", "train", "--task", "retrieval", "--json"]
        assert json.loads(run(command, "evaluate", "my-clip", *own))["train"]["retrieval"]["num_images"] == 8
        assert "ada/my-clip" in run(command, "push", "my-clip", "ada/my-clip")
        assert {"README.md", "config.json", "model.safetensors"} <= hub.files("ada/my-clip").keys()


def imported_packages() -> set[str]:
    """Top-level names of the modules that the package imports, without the standard library and without itself."""
    names = set()
    for path in (ROOT / "hf_vlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).split(".")[0])
    return names - set(sys.stdlib_module_names) - {"hf_vlm"}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    declared = {canonicalize_name(Requirement(one).name) for one in requirements}
    distributions = packages_distributions()
    for name in sorted(imported_packages()):
        names = {canonicalize_name(found) for found in distributions.get(name, [name])}
        assert names & declared, f"{name} is imported and not declared in pyproject.toml"
