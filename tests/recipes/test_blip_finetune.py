"""BLIP's fine-tuning recipe on every task, in full and by LoRA: resumed, saved, loaded; and its YAML files."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoProcessor

from cases import tiny
from hf_vlm.runs.launch import parse_arguments
from hf_vlm.training import last_checkpoint
from recipes import blip_finetune

FOLDER = Path(blip_finetune.__file__).parent / "blip_finetune"
PUBLISHED = {"caption": (384, 1e-5, 5), "vqa": (480, 2e-5, 10), "retrieval": (384, 1e-5, 6)}


def parse(config: Path, *options: str) -> tuple:
    return parse_arguments(blip_finetune.main, ["--config", str(config), *options])


def tiny_config(tmp_path: Path, task: str) -> Path:
    """The small YAML of a task on a tiny model and eight rows of a parquet file."""
    tiny.blip_model().save_pretrained(tmp_path / "blip")
    tiny.blip_processor().save_pretrained(tmp_path / "blip")
    texts = {"question": "two cat on the left", "answer": ["red", "red", "blue"]} if task == "vqa" else {}
    rows = [{"image": tiny.image(seed=i), **(texts or {"caption": tiny.CAPTIONS[i % 5]})} for i in range(8)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    values = yaml.safe_load((FOLDER / f"{task}_small.yaml").read_text())
    values |= {"model": str(tmp_path / "blip"), "sources": [{"path": str(tmp_path / "rows.parquet")}]}
    values |= {"per_device_train_batch_size": 4, "bf16": False, "eval_strategy": "no", "save_steps": 1}
    values |= {"max_steps": 3, "warmup_steps": 0, "logging_steps": 1, "output_dir": str(tmp_path / "run")}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("task", blip_finetune.HEADS)
def test_it_runs_goes_on_and_saves_a_model_that_loads(task: str, rank: int, tmp_path: Path) -> None:
    path, output = tiny_config(tmp_path, task), tmp_path / "run"
    blip_finetune.main(*parse(path, "--lora_r", str(rank)))
    assert last_checkpoint(output).endswith("checkpoint-3")
    blip_finetune.main(*parse(path, "--lora_r", str(rank), "--max_steps", "4"))
    state = json.loads((Path(last_checkpoint(output)) / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [1, 2, 3, 4]
    assert (output / "adapter" / "adapter_model.safetensors").is_file() == (rank > 0)
    model, info = blip_finetune.HEADS[task].from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    pretrained = blip_finetune.VlmBlipForPreTraining.from_pretrained(tmp_path / "blip")
    before = blip_finetune.HEADS[task].from_pretraining(pretrained).state_dict()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert rank == 0 or not any("norm" in name for name in changed)
    batch = AutoProcessor.from_pretrained(output)(images=[tiny.image()], text=["a red cat"])
    if task == "retrieval":
        assert model.eval()(**batch).itm_logits.isfinite().all()
    else:
        assert model.eval().generate(**batch, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("task", PUBLISHED)
def test_paper_says_what_was_published(task: str) -> None:
    model_args, _, training_args = parse(FOLDER / f"{task}_paper.yaml", "--bf16", "false")
    published = (model_args.image_size, training_args.learning_rate, training_args.num_train_epochs)
    assert published == PUBLISHED[task]
    assert training_args.per_device_train_batch_size * 8 == 256
    assert training_args.weight_decay == 0.05


def test_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'sorting'; choose one of caption, vqa, retrieval"):
        blip_finetune.main(*parse(tiny_config(tmp_path, "vqa"), "--task", "sorting"))
