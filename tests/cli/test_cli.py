"""The command line as a user meets it: help with examples, results, and errors of one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, CLIPModel
from typer.testing import CliRunner

from cases import tiny
from hf_vlm.cli.main import app
from hf_vlm.evaluation.test_sets import evaluate_checkpoint, format_reports


def hf_vlm(*args: str) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own."""
    code = "from hf_vlm.cli.main import main; main()"
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, check=False)


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny CLIP with its processor."""
    tiny.clip_model().save_pretrained(tmp_path / "clip")
    tiny.clip_processor().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("command", ["quickstart", "evaluate", "convert"])
def test_help_has_an_example(command):
    result = hf_vlm(command, "--help")
    assert result.returncode == 0
    assert f"hf-vlm {command}" in result.stdout.split("Example")[-1]


def test_convert_there_and_back(checkpoint, tmp_path):
    assert hf_vlm("convert", str(checkpoint), str(tmp_path / "native"), "--to", "native").returncode == 0
    native = CLIPModel.from_pretrained(tmp_path / "native").eval()
    assert hf_vlm("convert", str(tmp_path / "native"), str(tmp_path / "back")).returncode == 0
    back = AutoModel.from_pretrained(tmp_path / "back").eval()
    inputs = tiny.clip_inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            back(**inputs).logits_per_image, native(**inputs).logits_per_image, rtol=1e-5, atol=1e-5
        )


def test_another_architecture_is_one_line(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "bert")
    for args in (("convert", str(tmp_path / "bert"), str(tmp_path / "out")), ("evaluate", str(tmp_path / "bert"))):
        result = hf_vlm(*args)
        assert result.returncode == 1
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert len(lines) == 1
        assert "bert" in lines[0]
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    result = hf_vlm("evaluate", str(tmp_path / "nothing"))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("Error") for line in result.stderr.splitlines()) == 1


def test_evaluate_own_data(checkpoint, tmp_path):
    """Four images with a metadata file; the report has both directions and chance."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i, caption in enumerate(tiny.CAPTIONS):
        tiny.image(seed=i).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "words": caption})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reports = evaluate_checkpoint(str(checkpoint), str(folder), "train", "image=image,caption=words", 0)
    report = reports["train"]["retrieval"]
    assert report["num_images"] == len(tiny.CAPTIONS)
    assert report["chance"]["text_to_image_r1"] == pytest.approx(1 / len(tiny.CAPTIONS))
    title, *table = format_reports(reports).splitlines()
    assert title == "retrieval"
    assert len(table) == 2
    assert "text>image R@1" in table[0]
    with pytest.raises(ValueError, match="columns"):
        evaluate_checkpoint(str(checkpoint), str(folder), "train", "image=image,caption=absent", 0)


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "a", "--limit", "-1"),
        ("evaluate", "a", "--questions", "-1"),
        ("evaluate", "a", "--rerank", "-1"),
        ("evaluate", "a", "--beams", "0"),
        ("evaluate", "a", "--scene-size", "-1"),
        ("evaluate", "a", "--scene-aspects", "0"),
        ("evaluate", "a", "--scene-aspects", "1", "--scene-aspects", "1e9"),
        ("cache-features", "a", "--output", "b", "--limit", "-1"),
        ("cache-features", "a", "--output", "b", "--image-size", "0"),
        ("cache-features", "a", "--output", "b", "--seed", "-1"),
        ("cache-features", "a", "--output", "b", "--batch-size", "0"),
        ("cache-features", "a", "--output", "b", "--workers", "-1"),
        ("quickstart", "--max-minutes", "-1"),
        ("quickstart", "--seed", "-1"),
        ("index", "search", "a", "b", "--k", "0"),
    ],
)
def test_impossible_numbers_are_refused_at_once(command):
    result = CliRunner().invoke(app, list(command))
    assert result.exit_code == 2
    assert "Invalid value" in result.output
