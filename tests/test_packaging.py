"""What a user installs: the wheel holds the package with everything it needs and nothing else."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    assert packaged == {path.relative_to(ROOT).as_posix() for path in written}
    assert "hf_vlm/py.typed" in packaged


@pytest.mark.slow
def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    texts = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "Apache License" in texts["LICENSE"]
    assert "hf-vlm = hf_vlm.cli.main:main" in texts["entry_points.txt"]


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
