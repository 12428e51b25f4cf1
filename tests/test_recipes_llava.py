"""LLaVA's recipes on tiny parts: what is trained, what is saved, and that a stopped run goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import TrlParser

import tiny
import tiny_blip2
from hf_vlm import VlmLlavaForConditionalGeneration
from hf_vlm.training import STAGES, VlmSFTConfig
from recipes import llava_align, llava_instruct

OPTIONS = (
    *("--per_device_train_batch_size", "2", "--max_steps", "3", "--bf16", "false", "--report_to", "none"),
    *("--logging_steps", "1", "--save_steps", "2"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower, an LLM, pairs and conversations."""
    path = tmp_path_factory.mktemp("llava")
    tiny.clip_model().save_pretrained(path / "clip")
    torch.manual_seed(0)
    tiny_blip2.llm().save_pretrained(path / "llm")
    tiny_blip2.llm_tokenizer().save_pretrained(path / "llm")
    pictures = [tiny.image(seed=number) for number in range(8)]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    captions = [tiny.CAPTIONS[number % len(tiny.CAPTIONS)] for number in range(8)]
    Dataset.from_dict({"image": pictures, "caption": captions}, features=features).to_parquet(path / "pairs.parquet")
    rows = []
    for number, picture in enumerate(pictures):
        picture.save(path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nthe red cat"}, {"from": "gpt", "value": captions[number]}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    rows.append({"conversations": [{"from": "human", "value": "a dog"}, {"from": "gpt", "value": "tree"}]})
    (path / "talk.json").write_text(json.dumps(rows))
    return path


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def run(recipe, config: str, output: Path, *options: str) -> None:
    groups = (recipe.ModelArguments, recipe.DataArguments, VlmSFTConfig)
    arguments = ["--config", config, "--output_dir", str(output), *OPTIONS, *options]
    recipe.main(*TrlParser(groups).parse_args_and_config(arguments))


@pytest.fixture(scope="module")
def aligned(folder: Path) -> Path:
    """What the first stage gives."""
    text = f"vision: {folder}/clip\nlanguage_model: {folder}/llm\nsources:\n  - {{path: {folder}/pairs.parquet}}\n"
    run(llava_align, write(folder / "align.yaml", text), folder / "aligned")
    return folder / "aligned"


def talk(folder: Path) -> str:
    source = f"{{path: {folder}/talk.json, image_folder: {folder}}}"
    return write(folder / "talk.yaml", f"model: {folder}/aligned\nsources:\n  - {source}\n")


def changed(before: Path, after: Path) -> set[str]:
    first, second = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert first.keys() == second.keys()
    return {name.split(".")[1] for name, tensor in first.items() if not torch.equal(tensor, second[name])}


def test_the_first_stage_trains_the_projector_alone(folder, aligned):
    model = AutoModelForImageTextToText.from_pretrained(aligned)
    assert type(model) is VlmLlavaForConditionalGeneration
    llm = model.model.language_model.state_dict()
    for name, tensor in load_file(folder / "llm" / "model.safetensors").items():
        assert torch.equal(llm[name][: len(tensor)], tensor), name
    record = json.loads((aligned / "training_record.json").read_text())
    assert record["recipe"] == "llava_align"
    state = json.loads((aligned / "checkpoint-3" / "trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "loss" in entry]) == 3


@pytest.mark.parametrize("packed", ["true", "false"])
def test_the_second_stage_trains_projector_and_llm(folder, aligned, packed):
    run(llava_instruct, talk(folder), folder / f"full-{packed}", "--packed", packed)
    assert changed(aligned, folder / f"full-{packed}") == {"projector", "language_model"}
    processor = AutoProcessor.from_pretrained(folder / f"full-{packed}")
    model = AutoModelForImageTextToText.from_pretrained(folder / f"full-{packed}")
    inputs = processor(images=[tiny.image()], text=["<image> the red cat"])
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_packing_changes_no_loss(folder, aligned):
    losses = []
    for packed in ("true", "false"):
        run(llava_instruct, talk(folder), folder / f"loss-{packed}", "--packed", packed)
        state = json.loads((folder / f"loss-{packed}" / "checkpoint-3" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_stopped_run_goes_on_to_the_same_weights(folder, aligned):
    run(llava_instruct, talk(folder), folder / "whole")
    run(llava_instruct, talk(folder), folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoint-3")
    run(llava_instruct, talk(folder), folder / "stopped")
    first, second = (load_file(folder / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_saves_an_adapter_with_the_projector_and_the_merged_model(folder, aligned):
    run(llava_instruct, talk(folder), folder / "lora", "--stage", "llava-1.5-lora")
    saved = load_file(folder / "lora" / "adapter" / "adapter_model.safetensors")
    assert any("projector" in name for name in saved)
    assert not any("vision_model" in name for name in saved)
    assert changed(aligned, folder / "lora") == {"projector", "language_model"}
    base = VlmLlavaForConditionalGeneration.from_pretrained(aligned)
    adapted = PeftModel.from_pretrained(base, folder / "lora" / "adapter").eval()
    merged = AutoModelForImageTextToText.from_pretrained(folder / "lora").eval()
    inputs = AutoProcessor.from_pretrained(aligned)(images=[tiny.image()], text=["<image> the red cat"])
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava_align", "llava_instruct"])
def test_every_config_is_read_and_names_a_stage(name):
    recipe = {"llava_align": llava_align, "llava_instruct": llava_instruct}[name]
    groups = (recipe.ModelArguments, recipe.DataArguments, VlmSFTConfig)
    configs = sorted(Path(recipe.__file__).with_suffix("").glob("*.yaml"))
    assert len(configs) == 4
    for config in configs:
        model, _, training = TrlParser(groups).parse_args_and_config(["--config", str(config), "--bf16", "false"])
        assert model.stage in STAGES
        assert training.weight_decay == 0.0
