"""A mistake of a recipe's user is one line and the exit code 1; Ctrl-C is one line and 130. Every recipe, own data."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cases.recipes import RECIPES, TRAINED, recipe_module, save_data, save_parts, tiny_values, write_yaml
from hf_vlm.runs.launch import launch
from hf_vlm.runs.quiet import HideLogged
from hf_vlm.training.trainer import VlmTrainer

PARTS = ("vision", "text", "tokenizer", "model", "language_model", "checkpoint")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parts(tmp_path_factory.mktemp("parts"))


class Started:
    """Starts a recipe with some values of its tiny YAML replaced, and returns its line."""

    def __init__(self, name: str, parts: Path, folder: Path, capsys: pytest.CaptureFixture):
        self.name, self.parts, self.folder, self.capsys = name, parts, folder, capsys
        self.values = tiny_values(name, parts, folder / "run")

    def source(self, **changes: Any) -> dict[str, Any]:
        """`sources` with keys of the one source replaced."""
        return {"sources": [{**self.values["sources"][0], **changes}]}

    def __call__(self, *options: str, code: int = 1, **changes: Any) -> str:
        path = write_yaml(self.folder / "tiny.yaml", {**self.values, **changes})
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            launch(recipe_module(self.name).main, ["--config", str(path), *options])
        assert end.value.code == code
        errors = self.capsys.readouterr().err
        assert "Traceback" not in errors
        return errors.splitlines()[-1]


@pytest.fixture
def start(request: pytest.FixtureRequest, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Started:
    return Started(request.param, parts, tmp_path, capsys)


@pytest.mark.parametrize("start", RECIPES, indirect=True)
def test_before_anything_is_built(start: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *args, **kwargs: pytest.fail("a model was built"))
    assert "has the unknown key 'otput_dir'. Did you mean output_dir?" in start(otput_dir="x")
    assert "has 'colums'" in (line := start(**start.source(colums={}))) or "unknown key 'colums'" in line
    assert "sources must be a list of mappings, each with a path" in start(**start.source(path=None))
    assert "sources holds talk.json: write a list, [talk.json]." in start(sources="talk.json")
    assert "There is no option --otput_dir. Did you mean --output_dir?" in start("--otput_dir", "x")
    assert "/proc/run cannot be written to" in start(output_dir="/proc/run")
    for part in PARTS:
        if part in start.values:
            assert f"{part} is '/absent': there is no such folder" in start(**{part: "/absent"})
            assert f"{part} is 'nobody/nothing': the repository, or no network" in start(**{part: "nobody/nothing"})
    if "model" in start.values:
        assert "llm', which is a llama: give a vlm_" in start(model=f"{start.parts}/llm")
    if "vision" in start.values:
        assert "bert', which is a bert without an image tower" in start(vision=f"{start.parts}/bert")
    if start.name in TRAINED:
        assert "max_steps is 0: give a positive number" in start(max_steps=0)
        assert "gradient_accumulation_steps is 0: give a positive" in start(gradient_accumulation_steps=0)
        assert "max_steps holds [3]: write one value" in start(max_steps=[3])
        assert "max_steps has no value" in start(max_steps=None)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "training_record.json").write_text('{"recipe": "another"}')
        assert f"run holds a run of another: choose another output_dir for {start.name}." in start()


@pytest.mark.slow
@pytest.mark.parametrize("start", RECIPES, indirect=True)
def test_of_the_data(start: Started, tmp_path: Path) -> None:
    own = start.values["sources"][0]["path"]
    is_talk = start.name == "llava_instruct"
    assert "absent.json: no such file or folder; correct the path." in start(**start.source(path="absent.json"))
    for name in ("empty.json",) if is_talk else ("empty.parquet", "empty.csv", "empty.jsonl"):
        (tmp_path / name).write_text("")
        line = start(**start.source(path=str(tmp_path / name)))
        assert f"{name}: " in line
        assert "has no rows" in line or "0 bytes" in line or "empty" in line
    broken = tmp_path / "images"
    broken.mkdir()
    shutil.copy(start.parts / "0.png", broken)
    (broken / "1.png").write_bytes(b"no image")
    (broken / "metadata.csv").write_text("file_name,caption,question,answer\n0.png,a,b,c\n1.png,a,b,c\n")
    turns = [{"from": "human", "value": "<image>\nthe cat"}, {"from": "gpt", "value": "a cat"}]
    talk = [{"image": "1.png", "conversations": turns}] * 2
    (broken / "talk.json").write_text(json.dumps(talk))
    source = {"path": f"{broken}/talk.json", "image_folder": str(broken)} if is_talk else {"path": str(broken)}
    assert "1.png" in start(sources=[source], **({"max_steps": 4} if start.name in TRAINED else {}))
    if not is_talk:
        assert f"{own}: no column 'picture'; it has image" in start(**start.source(columns={"image": "picture"}))
    if start.name in TRAINED and start.name != "instructblip_finetune":  # which draws 100,000 instructions
        line = start(per_device_train_batch_size=100, dataloader_drop_last=True)
        assert "There are 8 rows to train on, fewer than a batch of 100, and dataloader_drop_last drops them" in line


@pytest.mark.slow
@pytest.mark.parametrize("start", ["clip_pretrain", "blip_pretrain", "blip2_stage1", "blip_finetune"], indirect=True)
def test_a_contrastive_loss_needs_two_rows(start: Started, tmp_path: Path) -> None:
    start.values |= {"task": "retrieval"} if start.name == "blip_finetune" else {}
    save_data(tmp_path, 1)
    line = start(sources=[{"path": f"{tmp_path}/pairs.parquet"}])
    assert "compares a pair with others and needs two rows, but the training data has 1" in line
    pairs = [{"path": f"{start.parts}/pairs.parquet"}]
    assert "needs two rows, but a batch has 1" in start(sources=pairs, per_device_train_batch_size=1)


@pytest.mark.parametrize("start", ["clip_pretrain"], indirect=True)
def test_names(start: Started) -> None:
    assert "Field 'loss_type' expected one of ('softmax', 'sigmoid'), got sofmax" in start(loss_type="sofmax")
    assert "There is no tower 'txt' to lock; choose one of" in start(lock=["txt"])
    assert "resize_mode is 'crp': use one of crop, squash, pad, anyres." in start(resize_mode="crp")
    assert "--vision_config/--vision-config: '{width:8}' has no space" in start("--vision_config", "{width:8}")
    assert "is not a mapping or list: write '{key: value}'" in start("--vision_config", "{width")
    assert "learning_rates is 'high': write learning rates by module" in start("--learning_rates", "high")


@pytest.mark.parametrize("start", ["clip_pretrain"], indirect=True)
def test_any_error_is_one_line(start: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> None:
        def train(self, resume_from_checkpoint=None):
            raise error

        monkeypatch.setattr(VlmTrainer, "train", train)

    for error, line in (
        (StopIteration(), "Error: StopIteration in start.py, line "),
        (KeyError("image"), "Error: KeyError in start.py, line "),
        (RuntimeError("size mismatch\nfor a\nfor b"), ": size mismatch (HF"),
        (MemoryError(), "MemoryError in start.py"),
        (OSError(28, "No space left on device"), "no space is left on the disk"),
        (ValueError("a\x1b[31m red name"), "Error: a\\x1b[31m red name"),
    ):
        fail(error)
        assert line in start()
    fail(KeyboardInterrupt("Interrupted at step 7."))
    assert start(code=130) == "Interrupted at step 7. There is no checkpoint yet: the same command begins anew."
    for step in (9, 100):
        (Path(start.values["output_dir"]) / f"checkpoint-{step}").mkdir()
    monkeypatch.setattr("hf_vlm.runs.start.last_checkpoint", lambda folder: None)
    line = start(code=130)
    assert line.startswith("Interrupted at step 7. Run the same command to resume from ")
    assert line.endswith("run/checkpoint-100.")
    monkeypatch.setenv("HF_VLM_TRACEBACK", "1")
    fail(KeyError("image"))
    with pytest.raises(KeyError):
        start()


def run(name: str, parts: Path, folder: Path, **changes: Any) -> None:
    values = {**tiny_values(name, parts, folder / "run"), **changes}
    launch(recipe_module(name).main, ["--config", str(write_yaml(folder / "tiny.yaml", values))])


@pytest.mark.parametrize("start", ["clip_pretrain"], indirect=True)
def test_a_run_of_other_arguments_is_not_resumed(start: Started, parts: Path, tmp_path: Path) -> None:
    """Before anything is built. What happens after training, and moved folders, may change."""
    run("clip_pretrain", parts, tmp_path)
    moved = Path(shutil.copytree(parts, tmp_path / "moved"))
    run("clip_pretrain", moved, tmp_path, num_scenes=3, max_steps=3)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    line = start(projection_dim=8, image_size=64)
    assert "checkpoint-3 cannot be resumed: image_size was 32 and is 64 (and 1 more changes). Set it back" in line
    assert "sources was [{'path': 'pairs.parquet'}] and is [{'path': 'x.parquet'}]" in start(
        **start.source(path="x.parquet")
    )
    assert "augmentation was 'none' and is 'photo'" in start(augmentation="photo")
    assert "rows of a step was 2 and is 4" in start(per_device_train_batch_size=4)
    record = tmp_path / "run" / "training_record.json"
    record.write_text('{"recipe": ')
    (tmp_path / "run" / "results.json").write_text("[]")
    run("clip_pretrain", moved, tmp_path, max_steps=3)
    assert json.loads(record.read_text())["training"]["steps"] == 3
    assert (tmp_path / "run" / "damaged-results.json").is_file()


@pytest.mark.parametrize("name", ["blip2_stage2", "blip_finetune"])
def test_no_warning_that_a_user_cannot_act_on(
    name: str, parts: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture
) -> None:
    run(name, parts, tmp_path, **({"lora_r": 2} if name == "blip_finetune" else {}))
    shown = capfd.readouterr().err
    assert "[transformers]" not in shown
    assert "Warning:" not in shown


def test_what_is_hidden() -> None:
    def shows(message: str) -> bool:
        return HideLogged().filter(logging.LogRecord("transformers", logging.WARNING, "", 0, message, None, None))

    assert not shows("VlmBlip2Model LOAD REPORT from: x\nlm_head.bias | UNEXPECTED |")
    assert shows("VlmBlip2Model LOAD REPORT from: x\nlm_head.bias | MISSING |")
    assert not shows("Model config: sep_token_id must be `None` or an integer within the vocabulary (between 0 and 2)")
    assert shows("the loss is not finite")
