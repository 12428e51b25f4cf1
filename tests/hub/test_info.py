"""`hf-vlm info`: what it says of a checkpoint is what the loaded model has, and it loads no weights to say it."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel
from typer.testing import CliRunner

from cases import tiny, tiny_blip2
from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmBlip2Model,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipModel,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipModel,
    VlmTextTowerModel,
    VlmTowerModel,
)
from hf_vlm.checkpoints import check_config
from hf_vlm.cli.main import app
from hf_vlm.evaluation.tasks import load_checkpoint
from hf_vlm.hub.cards.card import RESULTS_NAME, write_card
from hf_vlm.hub.info import checkpoint_info, format_info
from hf_vlm.hub.record import RECORD_NAME, write_record
from loopback_hub import File, LoopbackHub, Repo

MODELS = {
    "vlm_clip": tiny.clip_model,
    "vlm_clip with a sigmoid": lambda: tiny.clip_model(loss_type="sigmoid"),
    "vlm_blip": lambda: tiny.blip_model(VlmBlipModel),
    "vlm_blip2": lambda: tiny_blip2.blip2_model(VlmBlip2Model),
    "vlm_blip2 with an LLM": lambda: tiny_blip2.blip2_model(VlmBlip2Model, "t5"),
    "vlm_instructblip": lambda: tiny_blip2.blip2_model(VlmInstructBlipModel, "llama, tied"),
    "vlm_tower": lambda: VlmTowerModel(tiny.tower_config()),
    "vlm_text_tower": lambda: VlmTextTowerModel(tiny.text_config()),
}
RESULTS = {"retrieval": {"unseen_style": {"text_to_image_r1": 0.4459, "num_images": 7, "chance": {}}}}
RECORD = {
    "recipe": "clip_pretrain",
    "training": {"steps": 4800, "minutes": 39.41},
    "data": [{"name": "openmoji \x1b[31m", "licence": "CC-BY-SA-4.0", "rows": {"train": 1178}}],
    "parts": [{"part": "text", "id": "org/minilm", "licence": "Apache-2.0"}],
    "licence": "apache-2.0",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny CLIP with all that a run leaves."""
    tiny.clip_model().save_pretrained(tmp_path / "clip")
    tiny.clip_processor().save_pretrained(tmp_path / "clip")
    write_record(tmp_path / "clip", RECORD)
    (tmp_path / "clip" / RESULTS_NAME).write_text(json.dumps(RESULTS))
    write_card(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_loaded_model(tmp_path, name):
    """By part and in all; every stored tensor is counted in bytes; no weights are read."""
    MODELS[name]().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    info = checkpoint_info(str(tmp_path))
    parts = info["parameters"]["parts"]
    assert info["parameters"]["total"] == sum(parts.values()) == loaded.num_parameters()
    for part, count in parts.items():
        of_part = [p for n, p in loaded.named_parameters() if n == part or n.startswith(f"{part}.")]
        assert count == sum(p.numel() for p in of_part)
    assert info["weights"] == {"bytes": 2 * loaded.num_parameters(), "dtypes": {"BF16": loaded.num_parameters()}}
    assert info["model_type"] == name.split()[0]
    assert info["head"] == type(loaded).__name__


@pytest.mark.parametrize("head", [VlmBlipForPreTraining, VlmBlipForImageTextRetrieval, VlmBlipForQuestionAnswering])
def test_heads_of_a_blip(tmp_path, head):
    """Shared parts count once, the momentum encoders not at all; the scenes' numbers are called what they are."""
    model = tiny.blip_model(head)
    model.save_pretrained(tmp_path)
    tiny.blip_processor().save_pretrained(tmp_path)
    results = {"retrieval": {"unseen_both": {"text_to_image_r1": 0.5, "reranked": {"text_to_image_r1": 0.75}}}}
    (tmp_path / RESULTS_NAME).write_text(json.dumps(results))
    info = checkpoint_info(str(tmp_path))
    assert (info["architecture"], info["head"]) == ("BLIP", head.__name__)
    assert info["parameters"]["total"] == model.num_parameters()
    assert [(found["metric"], found["value"]) for found in info["results"]] == [
        ("text to image R@1", 0.5),
        ("text to image R@1, re-ranked by ITM", 0.75),
    ]
    assert {found["dataset"] for found in info["results"]} == {"Scenes of built-in emoji drawings"}
    assert head.__name__ in format_info(info)


@pytest.mark.parametrize(
    ("head", "llm"),
    [
        (VlmBlip2ForPreTraining, None),
        (VlmBlip2ForImageTextRetrieval, None),
        (VlmBlip2ForConditionalGeneration, "opt"),
        (VlmInstructBlipForConditionalGeneration, "llama"),
    ],
)
def test_heads_of_blip2(tmp_path, head, llm):
    """The LLM is a part with its own count; questions of easy-VQA are called what they are."""
    model = tiny_blip2.blip2_model(head, llm)
    model.save_pretrained(tmp_path)
    asked = {"questions": 7.0, "vqa_accuracy": 0.5}
    (tmp_path / RESULTS_NAME).write_text(json.dumps({"easy_vqa_unseen_wordings": {"test": asked}}))
    info = checkpoint_info(str(tmp_path))
    assert info["head"] == head.__name__
    assert info["architecture"] == ("InstructBLIP" if "Instruct" in head.__name__ else "BLIP-2")
    assert info["parameters"]["total"] == model.num_parameters()
    parts = info["parameters"]["parts"]
    assert ("language_model" in parts) == (llm is not None)
    if llm is not None:
        assert parts["language_model"] == model.model.language_model.num_parameters()
    (result,) = info["results"]
    assert (result["dataset"], result["metric"]) == ("easy-VQA, unseen wordings", "accuracy")
    assert head.__name__ in format_info(info)


def test_weights_are_not_read(folder):
    """With nothing behind the header, loading fails and info does not."""
    weights = folder / "model.safetensors"
    whole = checkpoint_info(str(folder))
    content = weights.read_bytes()
    weights.write_bytes(content[: 8 + struct.unpack("<Q", content[:8])[0]])
    assert checkpoint_info(str(folder)) == whole


def test_a_model_that_fits_no_memory_is_counted(tmp_path):
    """Nothing is allocated: an embedding of a thousand terabytes takes no longer than a small one."""
    tiny.clip_config(text={"vocab_size": 10**13}).save_pretrained(tmp_path)
    assert checkpoint_info(str(tmp_path))["parameters"]["parts"]["text_model"] > 24 * 10**13


def test_info_of_a_run(folder):
    info = checkpoint_info(str(folder))
    assert info["architecture"] == "CLIP"
    assert info["inputs"] == {"images": "32 x 32 pixels", "texts": f"at most {tiny.MAX_LENGTH} tokens"}
    assert info["training"] == RECORD["training"]
    assert info["data"] == RECORD["data"]
    assert info["licence"] == "apache-2.0"
    (result,) = info["results"]
    assert (result["split"], result["metric"], result["value"]) == ("unseen_style", "text to image R@1", 0.4459)
    text = format_info(info)
    for shown in (
        "vlm_clip",
        "39.41",
        "openmoji",
        "train 1178",
        "CC-BY-SA-4.0",
        "org/minilm",
        "text to image R@1 0.446",
    ):
        assert shown in text
    assert "\x1b" not in text


def test_numbers_of_a_card_stand_in_for_results(folder):
    """What a pushed repository has when its results.json was left out."""
    before = checkpoint_info(str(folder))["results"]
    (folder / RESULTS_NAME).unlink()
    assert checkpoint_info(str(folder))["results"] == before
    (folder / "README.md").unlink()
    assert "results" not in checkpoint_info(str(folder))


def test_a_bare_checkpoint_says_what_it_has(tmp_path):
    tiny.clip_config().save_pretrained(tmp_path)
    info = checkpoint_info(str(tmp_path))
    assert info["head"] == "VlmClipModel"
    assert not {"weights", "training", "data", "results", "revision", "inputs"} & set(info)
    assert "MB" not in format_info(info)


def test_a_cached_repository_has_a_revision(folder, monkeypatch, tmp_path):
    """Hub ids go through the Hub's cache; the commit is named."""
    snapshot = tmp_path / "hub" / "models--org--clip-small" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    info = checkpoint_info("org/clip-small")
    assert info["revision"] == "0123abc"
    assert {**info, "checkpoint": str(folder)} == {**checkpoint_info(str(folder)), "revision": "0123abc"}


def test_of_a_hub_repository_no_weights_are_fetched(folder, tmp_path):
    """Over HTTP in a process of its own: the same answer as for the folder, and a cache without weights."""
    files = {p.name: File(p.read_bytes(), p.suffix == ".safetensors") for p in folder.iterdir()}
    repo = Repo(private=False)
    sha = repo.add("main", "Upload", None, files)
    home = tmp_path / "home"
    code = "from hf_vlm.cli.main import main; main()"
    with LoopbackHub({}) as hub:
        hub.repos["org/clip-tiny"] = repo
        hub.storage |= {file.sha256: file.data for file in files.values() if file.is_large}
        inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        env = {**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_COLOR": "1"}
        command = [sys.executable, "-c", code, "info", "org/clip-tiny", "--json"]
        found = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        command[-2] = "org/absent"
        absent = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    expected = {**checkpoint_info(str(folder)), "checkpoint": "org/clip-tiny", "revision": sha}
    assert json.loads(found.stdout) == expected
    assert expected["weights"]["bytes"] > 1000
    assert list(home.rglob("config.json"))
    assert not list(home.rglob("*.safetensors"))
    assert absent.returncode == 1
    assert "Traceback" not in absent.stderr
    (line,) = [line for line in absent.stderr.splitlines() if line.startswith("Error")]
    assert "org/absent is neither a folder nor a Hub repository" in line


def test_command(folder):
    result = CliRunner().invoke(app, ["info", str(folder), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == checkpoint_info(str(folder))
    assert CliRunner().invoke(app, ["info", str(folder)]).stdout == format_info(checkpoint_info(str(folder))) + "\n"
    shown = CliRunner().invoke(app, ["info", "--help"])
    assert "hf-vlm info" in shown.stdout.split("Example")[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", None, "no config.json"),
        ("config.json", '{"model_type": "vlm_clip", "architectures": ["Other"]}', "names the unknown class Other"),
        ("config.json", '{"model_type": "resnet"}', "resnet checkpoint: give one of this package"),
        (RECORD_NAME, '{"data": 3}', "training_record.json: 'data'"),
        (RESULTS_NAME, "[]", "results.json holds no JSON object"),
        ("model.safetensors", "short", "weights are damaged"),
    ],
)
def test_broken_files_are_one_line(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint_info(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "org/not-cached"])
def test_what_is_not_there_is_one_line(source):
    with pytest.raises(ValueError, match=source) as caught:
        checkpoint_info(source)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_one_line(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert checkpoint") as caught:
        checkpoint_info(str(tmp_path))
    assert "\n" not in str(caught.value)


def put(folder: Path, file: str, name: str, value: object) -> None:
    """Sets one entry of a JSON file by its dotted name."""
    content = json.loads((folder / file).read_text())
    *parents, last = name.split(".")
    entry = content
    for parent in parents:
        entry = entry[parent]
    entry[last] = value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vision_config.num_hidden_layers", 10**8, "num_hidden_layers = 100000000; at most 1000 layers"),
        ("text_config.num_hidden_layers", 10**30, "num_hidden_layers = 1000000000000000000000000000000; at most"),
        ("vision_config.num_attention_heads", 0, "config.json holds impossible values (ZeroDivisionError"),
        ("vision_config.patch_size", 0, "config.json holds impossible values (ZeroDivisionError"),
        ("text_config.vocab_size", -1, "config.json holds impossible values (RuntimeError"),
        ("vision_config.hidden_act", "\x1b[31m", "config.json holds impossible values (KeyError"),
        ("architectures", 5, "config.json has the architectures 5"),
        ("architectures", ["\x1b[31m"], r"names the unknown class \x1b[31m"),
        ("model_type", [], "is a [] checkpoint"),
        ("vision_config.model_type", {}, "config.json holds impossible values (TypeError"),
    ],
)
def test_impossible_configs_are_one_line_at_once(folder, name, value, message):
    put(folder, "config.json", name, value)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        checkpoint_info(str(folder))
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()
    if name != "model_type" and "names the unknown" not in message:  # the same line by whoever loads it
        with pytest.raises(ValueError, match=re.escape(message)):
            load_checkpoint(str(folder))


def test_layers_that_are_counted_from_the_end_are_possible():
    check_config({"vision_feature_layer": -2, "num_hidden_layers": 1000, "head_dim": None, "window_size": -1}, "a")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("processor_config.json", "image_processor", 5),
        ("processor_config.json", "image_processor.size", None),
        ("training_record.json", "data", [{"name": "a", "rows": [1]}]),
        ("training_record.json", "data", [{"name": "a", "rows": None}]),
    ],
)
def test_impossible_values_elsewhere_are_one_line(folder, file, name, value):
    put(folder, file, name, value)
    with pytest.raises(ValueError, match=rf"{file}.* holds impossible values") as caught:
        format_info(checkpoint_info(str(folder)))
    assert len(str(caught.value).splitlines()) == 1


def header(content: object) -> bytes:
    data = json.dumps(content).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"1234",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**8) + b"{",
        struct.pack("<Q", 10**6) + b"[" * 10**6,
        header([]),
        header({"a": 5}),
        header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}),
    ],
)
def test_damaged_headers_of_weights_are_one_line(folder, weights):
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"the weights are damaged|the header of its weights holds") as caught:
        checkpoint_info(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_files_nested_without_end_are_one_line(folder):
    for file in ("config.json", "training_record.json", "results.json"):
        kept = (folder / file).read_text()
        (folder / file).write_text("[" * 100_000)
        with pytest.raises(ValueError, match=f"{file} is not valid JSON"):
            checkpoint_info(str(folder))
        (folder / file).write_text(kept)
