"""Every recipe: small.yaml runs, stops, resumes, saves and loads; paper.yaml says what was published."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor, TrainerCallback
from trl import TrlParser

import tiny
from hf_vlm.training import ContrastiveTrainingArguments, last_checkpoint
from recipes import clip_pretrain

SMALL = Path(clip_pretrain.__file__).with_suffix("") / "small.yaml"
PAPER = SMALL.with_name("paper.yaml")
ARGUMENTS = (clip_pretrain.ModelArguments, clip_pretrain.DataArguments, ContrastiveTrainingArguments)
TINY_TOWER = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 16}"


def parse(config: Path, *options: str):
    """The three groups of arguments of a YAML file and command-line options."""
    return TrlParser(ARGUMENTS).parse_args_and_config(["--config", str(config), *options])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A webdataset shard of pictures and captions, and a folder of the same to evaluate on."""
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as shard:
        for i in range(12):
            picture = io.BytesIO()
            tiny.image(seed=i).save(picture, format="JPEG")
            for suffix, data in (("jpg", picture.getvalue()), ("txt", tiny.CAPTIONS[i % 5].encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return tmp_path / "shards"


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A tokenizer such as `tokenizer:` names."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


class StopAfter(TrainerCallback):
    """Ends a run after a step, as a user would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def tiny_paper(tmp_path: Path, shards: Path, tokenizer_folder: Path) -> Path:
    """paper.yaml at shrunken sizes: every key of the original, other numbers."""
    config = yaml.safe_load(PAPER.read_text())
    config |= {
        "vision_config": yaml.safe_load(TINY_TOWER),
        "text_config": {**tiny.layer_sizes(), **tiny.TOKENS},
        "tokenizer": str(tokenizer_folder),
        "image_size": 32,
        "projection_dim": 16,
        "max_text_length": tiny.MAX_LENGTH,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "grad_cache_chunk": 2,
        "max_steps": 3,
        "warmup_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "bf16": False,
    }
    config["sources"][0]["path"] = f"{shards}/*.tar"
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_paper_says_what_was_published():
    model_args, data_args, training_args = parse(PAPER)
    assert model_args.image_size == 224
    assert model_args.vision_config["hidden_size"] == 768
    assert data_args.sources[0]["streaming"] is True
    assert training_args.per_device_train_batch_size * 8 == 32_768
    assert training_args.max_steps == round(32 * 400_000_000 / 32_768)
    optimiser = (training_args.adam_beta1, training_args.adam_beta2, training_args.adam_epsilon)
    assert optimiser == (0.9, 0.98, 1e-6)
    assert training_args.weight_decay == 0.2
    assert training_args.learning_rate == 5e-4
    assert training_args.warmup_steps == 2000


def test_paper_model_has_the_published_size(tokenizer_folder):
    """ViT-B/16: 86.2 and 63.4 million parameters in the towers, 149.6 million in all (CLIP's released model)."""
    model_args, *_ = parse(PAPER)
    model_args.tokenizer = str(tokenizer_folder)
    with torch.device("meta"):
        model, _ = clip_pretrain.build_model(model_args)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 149_620_737


def test_paper_runs_stops_and_resumes(tmp_path, shards, tokenizer_folder, monkeypatch):
    """The streaming recipe, two of three steps, then the rest: learning rates and the last weights are as published."""
    path = tiny_paper(tmp_path, shards, tokenizer_folder)
    kept = clip_pretrain.ContrastiveTrainer

    def stopping(*args, **kwargs):
        trainer = kept(*args, **kwargs)
        trainer.add_callback(StopAfter(2))
        return trainer

    monkeypatch.setattr(clip_pretrain, "ContrastiveTrainer", stopping)
    clip_pretrain.main(*parse(path))
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    monkeypatch.setattr(clip_pretrain, "ContrastiveTrainer", kept)
    clip_pretrain.main(*parse(path))
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    rates = [line["learning_rate"] for line in state["log_history"] if "learning_rate" in line]
    assert rates == pytest.approx([0.0, 5e-4, 2.5e-4], abs=1e-9)  # warm-up of one step, then the cosine
    model, info = AutoModel.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    logits = model.eval()(**processor(images=[tiny.image()], text=["a cat", "a dog"])).logits_per_image
    assert logits.shape == (1, 2)
    assert logits.isfinite().all()


@pytest.mark.slow
def test_small_runs_stops_and_resumes(tmp_path):
    """small.yaml as it is, two steps, then a third; then the reports on the built-in data."""
    options = ["--output_dir", str(tmp_path), "--save_steps", "1", "--eval_steps", "1", "--num_scenes", "20"]
    options += ["--per_device_train_batch_size", "8"]
    clip_pretrain.main(*parse(SMALL, *options, "--max_steps", "2"))
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    clip_pretrain.main(*parse(SMALL, *options, "--max_steps", "3"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["retrieval"]) == {"unseen_style", "unseen_emoji", "unseen_both"}
    assert 0 <= results["hard_negatives"]["unseen_style"]["accuracy"] <= 1
