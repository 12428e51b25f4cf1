"""LLaVA's recipes on tiny parts: what is trained, what is saved, and that a stopped run goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cases import tiny, tiny_blip2
from hf_vlm import VlmLlavaConfig, VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.data import SceneStream
from hf_vlm.data.builtin.scene_conversations import CAPTION
from hf_vlm.runs import data
from hf_vlm.runs.arguments import LlavaInstructDataArguments
from hf_vlm.runs.launch import parse_arguments
from hf_vlm.training import STAGES, apply_stage
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
    arguments = ["--config", config, "--output_dir", str(output), *OPTIONS, *options]
    recipe.main(*parse_arguments(recipe.main, arguments))


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


def test_the_llm_attends_as_it_is_told(folder, aligned):
    attended = []

    def attend(module, *args, **kwargs):
        attended.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("noted", attend)
    AttentionMaskInterface.register("noted", sdpa_mask)
    for recipe, config in ((llava_align, str(folder / "align.yaml")), (llava_instruct, talk(folder))):
        run(recipe, config, folder / f"attends-{recipe.__name__}", "--attn_implementation", "noted")
        assert set(attended) == {"LlamaAttention"}
        attended.clear()


def test_bad_rows_stop_the_run_or_are_left_out(folder, aligned, tmp_path):
    good = json.loads((folder / "talk.json").read_text())[0]
    (tmp_path / "bad.json").write_text(json.dumps([good, *[good | {"image": "absent.png"}] * 5]))
    source = f"{{path: {tmp_path}/bad.json, image_folder: {folder}}}"
    config = write(tmp_path / "bad.yaml", f"model: {aligned}\nsources:\n  - {source}\n")
    with pytest.raises(ValueError, match=r"absent\.png"):
        run(llava_instruct, config, tmp_path / "stopped")
    with pytest.raises(ValueError, match=r"bad\.json: 5 of the first 6 rows read are bad"):
        run(llava_instruct, config, tmp_path / "half", "--on_error", "skip")
    run(llava_instruct, config, tmp_path / "whole", "--on_error", "skip", "--max_skipped", "1")
    assert changed(aligned, tmp_path / "whole") == {"projector", "language_model"}


def test_scenes_are_of_the_size_that_is_given(folder, aligned, tmp_path, monkeypatch):
    """And of the tower's by default."""
    sizes = []

    def stream(split, seed, size, aspects):
        sizes.append(size)
        return SceneStream(split, seed, size, aspects=aspects)

    monkeypatch.setattr(data, "SceneStream", stream)
    config = write(tmp_path / "scenes.yaml", f"vision: {folder}/clip\nlanguage_model: {folder}/llm\nimage_size: 64\n")
    for options in ((), ("--scene_size", "96")):
        run(llava_align, config, tmp_path / f"{len(options)}", "--train_scenes", "8", *options)
    assert sizes == [64, 96]


def test_a_stopped_run_goes_on_to_the_same_weights(folder, aligned):
    run(llava_instruct, talk(folder), folder / "whole")
    run(llava_instruct, talk(folder), folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoint-3")
    run(llava_instruct, talk(folder), folder / "stopped")
    first, second = (load_file(folder / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_saves_an_adapter_with_the_projector_and_the_merged_model(folder, aligned):
    run(llava_instruct, talk(folder), folder / "lora", "--stage", "llava-1.5-lora", "--lora_r", "4")
    saved = load_file(folder / "lora" / "adapter" / "adapter_model.safetensors")
    assert any("projector" in name for name in saved)
    assert not any("vision_model" in name for name in saved)
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {4}
    assert changed(aligned, folder / "lora") == {"projector", "language_model"}
    assert isinstance(AutoProcessor.from_pretrained(folder / "lora" / "adapter"), VlmLlavaProcessor)
    base = VlmLlavaForConditionalGeneration.from_pretrained(aligned)
    adapted = PeftModel.from_pretrained(base, folder / "lora" / "adapter").eval()
    merged = AutoModelForImageTextToText.from_pretrained(folder / "lora").eval()
    inputs = AutoProcessor.from_pretrained(aligned)(images=[tiny.image()], text=["<image> the red cat"])
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-4)


def test_kinds_of_conversations_are_chosen():
    arguments = LlavaInstructDataArguments(train_scenes=8, scene_kinds={"caption": 1.0})
    rows = llava_instruct.build_data(arguments, 48, seed=0).datasets[0]
    assert {row["messages"][0]["content"] for row in (rows[i] for i in range(8))} == {f"<image>\n{CAPTION}"}


RECIPES = {"llava_align": llava_align, "llava_instruct": llava_instruct}
PAPERS = {
    # batch, epochs, tokens of a sample, and the first rate of each part after warm-up
    "llava_align/paper_1.0": (128, 1, 2048, {"projector": 2e-3}),
    "llava_align/paper_1.5": (256, 1, 2048, {"projector": 1e-3}),
    "llava_align/paper_1.6": (256, 1, 4096, {"projector": 1e-3}),
    "llava_instruct/paper_1.0": (32, 3, 2048, {"projector": 2e-5, "language_model": 2e-5}),
    "llava_instruct/paper_1.5": (128, 1, 2048, {"projector": 2e-5, "language_model": 2e-5}),
    "llava_instruct/paper_1.5_lora": (128, 1, 2048, {"projector": 2e-5, "language_model": 2e-4}),
    "llava_instruct/paper_1.6": (128, 1, 4096, {"projector": 1e-5, "language_model": 1e-5, "vision_model": 2e-6}),
}
SMALLS = ["small", "small_1.6"]
SIDE = 48  # of a tiny image in pixels
VISION, HIDDEN = 1024, 4096  # widths of ViT-L and of a LLM of 7B
LINEAR, MLP = VISION * HIDDEN + HIDDEN, VISION * HIDDEN + HIDDEN + HIDDEN**2 + HIDDEN


def config_of(name: str) -> Path:
    recipe, config = name.split("/")
    return Path(RECIPES[recipe].__file__).with_suffix("") / f"{config}.yaml"


def parse(name: str) -> tuple:
    """The three groups of arguments of a YAML file."""
    recipe = RECIPES[name.split("/")[0]]
    return parse_arguments(recipe.main, ["--config", str(config_of(name)), "--bf16", "false"])


def test_every_config_is_tested():
    found = {f"{name}/{file.stem}" for name in RECIPES for file in config_of(f"{name}/small").parent.glob("*.yaml")}
    smalls = {f"{name}/{config}" for name in RECIPES for config in SMALLS}
    assert found == {*PAPERS, *smalls, "llava_instruct/small_lora"}


@pytest.mark.parametrize("name", PAPERS)
def test_papers_say_what_was_published(name):
    model, data, args = parse(name)
    batch, epochs, tokens, rates = PAPERS[name]
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == batch
    assert (args.num_train_epochs, args.max_steps, data.max_tokens) == (epochs, -1, tokens)
    assert (args.weight_decay, args.warmup_steps, args.lr_scheduler_type) == (0.0, 0.03, "cosine")
    stage = STAGES[model.stage]
    assert stage.rates == rates
    assert args.learning_rates is None
    assert stage.lora == ({"r": 128, "alpha": 256, "dropout": 0.05} if "lora" in name else {})


@pytest.mark.parametrize(("name", "projector"), [("1.0", LINEAR), ("1.5", MLP), ("1.6", MLP + HIDDEN)])
def test_the_published_sizes_are_trained(name, projector):
    """What each stage trains of ViT-L/14 and a Vicuna of 7B, by number of parameters."""
    model_args, *_ = parse(f"llava_align/paper_{name}")
    side = 224 if name == "1.0" else 336
    tower = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=side,
        patch_size=14,
    )
    grids = [[int(side) for side in grid.split("x")] for grid in (model_args.image_grid_pinpoints or "").split()]
    config = VlmLlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(vocab_size=32_000),
        projector_type=model_args.projector_type,
        image_grid_pinpoints=grids or None,
    )
    with torch.device("meta"):
        model = VlmLlavaForConditionalGeneration(config)
    llm = sum(p.numel() for p in model.model.language_model.parameters())
    # Of the tower 23 layers are read, not the last, nor the norm behind it.
    layer = 4 * (VISION**2 + VISION) + 2 * VISION * 4096 + 4096 + VISION + 4 * VISION
    tower = 3 * 14 * 14 * VISION + VISION + ((side // 14) ** 2 + 1) * VISION + 2 * VISION + 23 * layer
    expected = {"align": projector, "instruct": projector + llm + (tower if name == "1.6" else 0)}
    for stage, count in expected.items():
        apply_stage(model, STAGES[f"llava-{name}-{stage}"])
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count, stage


def tiny_values(name: str, folder: Path, output: Path, **options) -> dict:
    """The values of a YAML file with tiny parts, few rows a step and no progress bars."""
    values = yaml.safe_load(config_of(name).read_text())
    if name.startswith("llava_align"):
        values |= {"vision": f"{folder}/clip", "language_model": f"{folder}/llm", "image_size": SIDE}
        if "image_grid_pinpoints" in values:
            values["image_grid_pinpoints"] = f"{SIDE}x{2 * SIDE} {2 * SIDE}x{SIDE}"
    values |= {"output_dir": str(output), "per_device_train_batch_size": 2, "disable_tqdm": True, "bf16": False}
    values |= {"max_steps": 3, "save_steps": 1, "logging_steps": 1, "dataloader_num_workers": 0, "report_to": "none"}
    return values | options


def run_values(name: str, values: dict, file: Path) -> Path:
    recipe = RECIPES[name.split("/")[0]]
    file.write_text(yaml.safe_dump(values))
    recipe.main(*parse_arguments(recipe.main, ["--config", str(file)]))
    return Path(values["output_dir"])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.0", "1.5", "1.5_lora", "1.6"])
def test_papers_run(version, folder, tmp_path):
    """Both stages at shrunken sizes, with sources of the kind that each names."""
    first = f"llava_align/paper_{version.removesuffix('_lora')}"
    values = tiny_values(first, folder, tmp_path / "align")
    values["sources"][0]["path"] = f"{folder}/pairs.parquet"
    aligned = run_values(first, values, tmp_path / "align.yaml")
    second = f"llava_instruct/paper_{version}"
    source = {"path": f"{folder}/talk.json", "image_folder": str(folder)}
    values = tiny_values(second, folder, tmp_path / "instruct", model=str(aligned), sources=[source])
    output = run_values(second, values, tmp_path / "instruct.yaml")
    trained = {"projector", "language_model", *(["vision_model"] if version == "1.6" else [])}
    assert changed(aligned, output) == trained
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    assert all(line["loss"] < 20 for line in state["log_history"] if "loss" in line)


@pytest.mark.slow
@pytest.mark.parametrize("config", SMALLS)
def test_small_runs_stops_and_resumes(config, folder, tmp_path):
    """On scenes and easy-VQA: LoRA, then full fine-tuning, whose card shows LoRA's results too."""
    name = f"llava_align/{config}"
    scenes = {"train_scenes": 24}
    aligned = run_values(name, tiny_values(name, folder, tmp_path / "align", **scenes), tmp_path / "align.yaml")
    name, options = f"llava_instruct/{config}", {**scenes, "model": str(aligned), "num_scenes": 2}
    lora = "llava_instruct/small_lora"
    run_values(lora, tiny_values(lora, folder, tmp_path / "lora", **options), tmp_path / "lora.yaml")
    values = tiny_values(name, folder, tmp_path / "full", lora_run=str(tmp_path / "lora"), **options)
    output = run_values(name, values, tmp_path / "full.yaml")
    shutil.rmtree(output / "checkpoint-3")
    weights = load_file(output / "model.safetensors")
    run_values(name, values, tmp_path / "full.yaml")
    again = load_file(output / "model.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    results, other = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("full", "lora"))
    assert set(results) == {"caption", "vqa", "vqa_unseen_wordings", "pope", "easy_vqa", "easy_vqa_unseen_wordings"}
    for task, report in results.items():
        for test_set, scores in report.items():
            own = {key: value for key, value in other[task][test_set].items() if not isinstance(value, dict)}
            assert scores["lora"] == own
            assert "blind" in scores
    card = (output / "README.md").read_text()
    assert "Object hallucination (POPE)" in card
    assert card.count("| the same stage with LoRA |") == sum(map(len, results.values()))
