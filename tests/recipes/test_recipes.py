"""Every recipe: small.yaml runs, stops, resumes, saves and loads; paper.yaml says what was published."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoProcessor,
    BertConfig,
    BertModel,
    TrainerCallback,
    ViTConfig,
    ViTModel,
)

from cases import tiny
from hf_vlm import VlmBlipForPreTraining, VlmTowerModel
from hf_vlm.runs.arguments import BlipModelArguments, ClipModelArguments
from hf_vlm.runs.launch import parse_arguments
from hf_vlm.training import last_checkpoint
from recipes import blip_pretrain, clip_pretrain

SMALL = Path(clip_pretrain.__file__).with_suffix("") / "small.yaml"
PAPER = SMALL.with_name("paper.yaml")
TINY_TOWER = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 16}"


def parse(config: Path, *options: str):
    """The three groups of arguments of a YAML file and command-line options."""
    return parse_arguments(clip_pretrain.main, ["--config", str(config), *options])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A webdataset shard of images and captions, and a folder of the same for evaluation."""
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


def test_a_named_tower_may_have_another_patch_size(tmp_path, tokenizer_folder, blip_parts):
    """A size that is no multiple of a new tower's 16 pixels."""
    vision = tmp_path / "patch-6"
    VlmTowerModel(tiny.tower_config(image_size=18, patch_size=6)).save_pretrained(vision)
    sizes = {"vision": str(vision), "image_size": 18}
    text = {"text_config": tiny.layer_sizes(), "tokenizer": str(tokenizer_folder)}
    clip, _ = clip_pretrain.build_model(ClipModelArguments(**sizes, **text))
    blip, _ = blip_pretrain.build_model(BlipModelArguments(**sizes, text=blip_parts[1]))
    assert clip.vision_model.config.patch_size == blip.model.vision_model.config.patch_size == 6


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
    """small.yaml unchanged, two steps, then a third; then the reports on the built-in data."""
    options = ["--output_dir", str(tmp_path), "--save_steps", "1", "--eval_steps", "1", "--num_scenes", "20"]
    options += ["--per_device_train_batch_size", "8"]
    clip_pretrain.main(*parse(SMALL, *options, "--max_steps", "2"))
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    clip_pretrain.main(*parse(SMALL, *options, "--max_steps", "3"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["retrieval"]) == {"unseen_style", "unseen_emoji", "unseen_both"}
    assert 0 <= results["hard_negatives"]["unseen_style"]["accuracy"] <= 1


# BLIP pretraining

BLIP_SMALL = Path(blip_pretrain.__file__).with_suffix("") / "small.yaml"
BLIP_PAPER = BLIP_SMALL.with_name("paper.yaml")


def parse_blip(config: Path, *options: str):
    """The three groups of arguments of a YAML file and command-line options."""
    return parse_arguments(blip_pretrain.main, ["--config", str(config), *options])


@pytest.fixture
def blip_parts(tmp_path: Path) -> tuple[str, str]:
    """Folders of a two-tower model, whose image tower is taken, and of a BERT with its tokenizer."""
    vision, text = str(tmp_path / "clip"), str(tmp_path / "bert")
    tiny.clip_model().save_pretrained(vision)
    words = len(tiny.BLIP_VOCABULARY) - 2
    sizes = tiny.layer_sizes(width=24, heads=2)
    BertModel(BertConfig(vocab_size=words, max_position_embeddings=64, **sizes)).save_pretrained(text)
    tiny.blip_tokenizer().save_pretrained(text)
    return vision, text


def tiny_blip(config: Path, tmp_path: Path, parts: tuple[str, str]) -> Path:
    """A YAML file at shrunken sizes: every key of the original, other numbers."""
    values = yaml.safe_load(config.read_text())
    values |= dict(zip(("vision", "text"), parts, strict=True))
    values |= {"image_size": 48, "projection_dim": 16, "queue_size": 8, "output_dir": str(tmp_path / "run")}
    values |= {"per_device_train_batch_size": 4, "dataloader_num_workers": 0, "bf16": False}
    values |= {"save_steps": 1, "logging_steps": 1}
    path = tmp_path / "tiny_blip.yaml"
    for source in values.get("sources", []):
        name = Path(source["path"]).name
        columns = source["columns"]
        rows = [
            {columns["image"]: tiny.image(seed=i), columns["caption"]: f"{tiny.CAPTIONS[i % 5]} {name}"}
            for i in range(4)
        ]
        features = Features({columns["image"]: ImageFeature(), columns["caption"]: Value("string")})
        (tmp_path / name).mkdir()
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / name / "train-0.parquet")
        source["path"] = str(tmp_path / name)
    path.write_text(yaml.safe_dump(values))
    return path


def run_blip_in_two_parts(
    monkeypatch: pytest.MonkeyPatch, path: Path, stop: int, *options: str
) -> tuple[Path, list[dict]]:
    """Runs the recipe to a step, then to its end; the output folder and the log."""
    kept = blip_pretrain.BlipTrainer

    def stopping(*args, **kwargs):
        trainer = kept(*args, **kwargs)
        trainer.add_callback(StopAfter(stop))
        return trainer

    monkeypatch.setattr(blip_pretrain, "BlipTrainer", stopping)
    blip_pretrain.main(*parse_blip(path, *options))
    folder = Path(parse_blip(path)[2].output_dir)
    assert last_checkpoint(folder).endswith(f"checkpoint-{stop}")
    monkeypatch.setattr(blip_pretrain, "BlipTrainer", kept)
    blip_pretrain.main(*parse_blip(path, *options))
    state = json.loads((Path(last_checkpoint(folder)) / "trainer_state.json").read_text())
    return folder, [line for line in state["log_history"] if "loss" in line]


def assert_loads(folder: Path) -> None:
    """That a saved pretraining model and its processor come back whole and give finite matching logits."""
    model, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(folder)
    logits = model.eval()(**processor(images=[tiny.image()], text=["a red cat"])).itm_logits
    assert logits.shape == (1, 2)
    assert logits.isfinite().all()


def test_blip_paper_says_what_was_published():
    model_args, data_args, training_args = parse_blip(BLIP_PAPER)
    assert (model_args.image_size, model_args.projection_dim) == (224, 256)
    assert (model_args.queue_size, model_args.momentum, model_args.soft_target_weight) == (57_600, 0.995, 0.4)
    assert (model_args.itc_weight, model_args.itm_weight, model_args.lm_weight) == (1, 1, 1)
    assert training_args.per_device_train_batch_size * 32 == 2880
    assert (training_args.num_train_epochs, training_args.soft_target_ramp_epochs) == (20, 2)
    assert (training_args.learning_rate, training_args.min_learning_rate) == (3e-4, 1e-6)
    assert (training_args.lr_decay_per_epoch, training_args.warmup_steps) == (0.9, 3000)
    assert training_args.weight_decay == 0.05
    streaming = {source.get("streaming", False) for source in data_args.sources}
    assert len(streaming) == 1, "sources are mixed all streaming or none"
    assert streaming == {False} or training_args.max_steps > 0, "a stream needs max_steps"


def test_blip_paper_model_has_the_published_size():
    """ViT-B/16, BERT-base with cross-attention, the decoder's self-attention, and the heads; no pooler is trained."""
    model_args, *_ = parse_blip(BLIP_PAPER)
    with torch.device("meta"):
        model = VlmBlipForPreTraining.from_parts(
            ViTModel(ViTConfig()), BertModel(BertConfig()), image_size=model_args.image_size
        )
    model.train()  # as the trainer does, which freezes what no loss depends on
    hidden, words = 768, 30_524
    attention = 4 * (hidden**2 + hidden) + 2 * hidden
    text = (words + 512 + 2) * hidden + 12 * (7_087_872 + attention)
    lm_head = hidden**2 + hidden + 2 * hidden + (hidden + 1) * words
    others = 2 * (hidden * 256 + 256) + 1 + 2 * hidden + 2
    expected = 85_798_656 + text + 12 * attention + lm_head + others
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_blip_paper_runs_stops_and_resumes(tmp_path, blip_parts, monkeypatch):
    """Twelve rows, three steps an epoch, for 20 epochs: the rates of the first and the last are as published."""
    path = tiny_blip(BLIP_PAPER, tmp_path, blip_parts)
    folder, lines = run_blip_in_two_parts(monkeypatch, path, 2, "--warmup_steps", "2", "--save_steps", "2")
    rates = [line["learning_rate"] for line in lines]
    decayed = [3e-4 * 0.9**epoch for epoch in range(20) for _ in range(3)]
    assert rates == pytest.approx([1e-6, (1e-6 + 3e-4) / 2, *decayed[2:]], rel=1e-6)
    assert_loads(folder)


@pytest.mark.slow
def test_blip_small_runs_stops_and_resumes(tmp_path, blip_parts, monkeypatch):
    """small.yaml on the built-in scenes, two of three steps, then the rest and the reports."""
    path = tiny_blip(BLIP_SMALL, tmp_path, blip_parts)
    options = ["--max_steps", "3", "--eval_steps", "1", "--train_scenes", "64", "--num_scenes", "6"]
    folder, lines = run_blip_in_two_parts(monkeypatch, path, 2, *options)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert_loads(folder)
    results = json.loads((folder / "results.json").read_text())
    assert {"retrieval", "hard_negatives", "caption"} <= set(results)
