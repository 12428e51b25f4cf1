"""`hf-vlm index ...` as a user meets it, and the search benchmark at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cases import tiny
from hf_vlm.cli.main import app

pytest.importorskip("lancedb")
ROOT = Path(__file__).resolve().parents[2]
RUN = "from hf_vlm.cli.main import main; main()"


def run(*args: str) -> Result:
    """A command that must succeed, in this process."""
    result = CliRunner().invoke(app, ["index", *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def folder(tmp_path):
    """A model, some images and a file of descriptions."""
    tiny.clip_model().save_pretrained(tmp_path / "clip")
    tiny.clip_processor().save_pretrained(tmp_path / "clip")
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        tiny.image(seed=i).save(tmp_path / "pictures" / f"{i}.png")
    rows = [{"text": text, "style": "short" if len(text) < 8 else "lo'ng"} for text in tiny.CAPTIONS]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_build_search_delete(folder):
    index, model, pictures = str(folder / "index"), str(folder / "clip"), str(folder / "pictures")
    assert "9 added" in run("build", index, "--model", model, pictures, str(folder / "texts.jsonl")).stdout
    assert "0 added, 0 replaced, 9 there already" in run("build", index, pictures, str(folder / "texts.jsonl")).stdout
    assert "4 replaced" in run("add", index, pictures).stdout
    facts = json.loads(run("info", index, "--json").stdout)
    assert (facts["images"], facts["texts"], facts["model"]) == (4, 5, model)
    assert "metadata" in run("info", index).stdout

    lines = run("search", index, "a red cat", "--k", "3").stdout.splitlines()
    assert lines[0].split() == ["score", "kind", "text", "id"]
    assert len(lines) == 4
    picture = str(folder / "pictures" / "2.png")
    found = json.loads(run("search", index, "--image", picture, "--kind", "image", "--json").stdout)
    assert found[0]["path"] == picture
    assert found[0]["score"] == pytest.approx(1, abs=1e-4)
    found = json.loads(run("search", index, "a red cat", "--where", "style=lo'ng", "--json").stdout)
    assert {match["text"] for match in found} == {text for text in tiny.CAPTIONS if len(text) >= 8}
    assert found == json.loads(run("search", index, "a red cat", "--sql", "style = 'lo''ng'", "--json").stdout)

    sheet = folder / "results.html"
    run("search", index, "tree", "--image", picture, "--minus", "a <b>dog</b>", "--sheet", str(sheet))
    page = sheet.read_text()
    assert "tree + like 2.png − a &lt;b&gt;dog&lt;/b&gt;" in page
    assert page.count("data:image/png") == 5

    assert run("delete", index, picture).stdout == "1 deleted\n"
    assert run("delete", index, "--where", "style=short").stdout == "2 deleted\n"
    assert json.loads(run("info", index, "--json").stdout)["items"] == 6


def test_bad_pictures(folder):
    index, model, pictures = str(folder / "index"), str(folder / "clip"), str(folder / "pictures")
    (folder / "pictures" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1\.png"):
        run("build", index, "--model", model, pictures)
    output = run("build", index, "--model", model, pictures, "--on-error", "skip").stdout
    assert "1 left out" in output
    assert "1.png" in output


def test_data_set_on_disk(folder):
    import datasets

    rows = {"image": [tiny.image(seed=i) for i in range(3)], "text": tiny.CAPTIONS[:3], "id": ["x", "y", "z"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(folder / "data")
    index = str(folder / "index")
    run("build", index, "--model", str(folder / "clip"), str(folder / "data"), "--kind", "both")
    facts = json.loads(run("info", index, "--json").stdout)
    assert (facts["images"], facts["texts"]) == (3, 3)


@pytest.mark.slow
def test_errors_are_one_line(folder):
    torch.manual_seed(1)
    tiny.clip_model().save_pretrained(folder / "other")
    tiny.clip_processor().save_pretrained(folder / "other")
    index, texts = str(folder / "index"), str(folder / "texts.jsonl")
    run("build", index, "--model", str(folder / "clip"), texts)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    blocked = "import sys; sys.modules['lancedb'] = None; " + RUN
    for code, args, message in [
        (RUN, ("search", index, "tree", "--model", str(folder / "other")), "use that model"),
        (RUN, ("search", str(folder / "nothing"), "tree"), "build one first"),
        (RUN, ("search", index, "tree", "--where", "colour=red"), "use one of id, kind, text, path, style"),
        (RUN, ("build", str(folder / "new"), texts), "--model"),
        (blocked, ("search", index, "tree"), 'pip install "hf-vlm[search]"'),
    ]:
        result = subprocess.run(
            [sys.executable, "-c", code, "index", *args], capture_output=True, text=True, env=env, check=False
        )
        assert result.returncode == 1
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert message in line
        assert "Traceback" not in result.stderr
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize("command", ["build", "add", "delete", "search", "info"])
def test_help_has_an_example(command):
    assert f"hf-vlm index {command}" in run(command, "--help").stdout.split("Example")[-1]


def test_help_imports_no_search_engine():
    code = "import sys, hf_vlm.cli.main; print('lancedb' in sys.modules, 'datasets' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    output = tmp_path / "search.json"
    command = [sys.executable, "benchmarks/search.py", "--rows", "3000", "--dim", "64", "--queries", "20"]
    result = subprocess.run(
        [*command, "--threads", "1", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    recalls = {name: each["recall"] for name, each in report["results"].items()}
    assert all(recalls[name] == 1 for name in ("numpy, in memory", "torch, in memory", "index, every row"))
    assert min(recalls.values()) >= 0.95
    assert all(each["milliseconds"]["median"] > 0 for each in report["results"].values())
    assert report["vector_bytes"] < report["table_bytes"] < report["table_and_graph_bytes"]
    assert report["build_seconds"] > 0
    assert "Goals" in result.stdout
