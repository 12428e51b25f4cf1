"""BLIP-2's and InstructBLIP's recipes: small.yaml runs, resumes, saves and loads; paper.yaml says what it must.

Parts are tiny, images have 48 pixels; tests with the built-in images are slow.
"""

import csv
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    TrainerCallback,
    get_scheduler,
)
from trl import SFTTrainer

from cases import tiny, tiny_blip2
from hf_vlm import (
    VlmBlip2Config,
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForPreTraining,
    VlmBlip2Processor,
    VlmInstructBlipConfig,
    VlmInstructBlipForConditionalGeneration,
)
from hf_vlm.data import PromptCollator
from hf_vlm.runs.launch import parse_arguments
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, add_lora, last_checkpoint
from processes import curve, equal
from recipes import blip2_stage1, blip2_stage2, instructblip_finetune

SIZE, TEXT_LENGTH = 48, 128
RECIPES: dict[str, tuple[ModuleType, str]] = {
    "blip2_stage1": (blip2_stage1, "Blip2Trainer"),
    "blip2_stage2": (blip2_stage2, "VlmTrainer"),
    "instructblip_finetune": (instructblip_finetune, "VlmSFTTrainer"),
}
STEPS = 4
# What each stage trains; all else must stay as it was.
TRAINED = {
    "blip2_stage1": {"vision_norm", "qformer", "similarity", "itm_head", "lm_head"},
    "blip2_stage2": {"vision_norm", "qformer", "language_projection"},
    "instructblip_finetune": {"vision_norm", "qformer", "language_projection"},
}


def config_of(name: str, kind: str) -> Path:
    return Path(RECIPES[name][0].__file__).with_suffix("") / f"{kind}.yaml"


def parse(name: str, config: Path, *options: str) -> tuple:
    """The three groups of arguments of a YAML file and command-line options."""
    return parse_arguments(RECIPES[name][0].main, ["--config", str(config), *options])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP (`clip`), a BERT, an LLM, and checkpoints of the first and the second stage."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    tiny.clip_model().save_pretrained(folder / "clip")
    tiny_blip2.bert(max_position_embeddings=TEXT_LENGTH).save_pretrained(folder / "bert")
    tiny_blip2.bert_tokenizer(TEXT_LENGTH).save_pretrained(folder / "bert")
    tiny_blip2.llm().save_pretrained(folder / "llm")
    tiny_blip2.llm_tokenizer().save_pretrained(folder / "llm")
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "max_position_embeddings": TEXT_LENGTH}
    first = tiny_blip2.blip2_model(vision={"image_size": SIZE}, qformer=dropout)
    first.save_pretrained(folder / "blip2_stage1")
    size = {"height": SIZE, "width": SIZE}
    processor = VlmBlip2Processor.from_parts(tiny_blip2.bert_tokenizer(TEXT_LENGTH), size=size)
    processor.save_pretrained(folder / "blip2_stage1")
    second = VlmBlip2ForConditionalGeneration.from_parts(first, tiny_blip2.llm(), tiny_blip2.IMAGE_TOKEN_ID)
    second.save_pretrained(folder / "blip2_stage2")
    tokens = (tiny_blip2.image_processor(SIZE), tiny_blip2.llm_tokenizer(), tiny_blip2.QUERIES)
    VlmBlip2Processor.for_language_model(*tokens).save_pretrained(folder / "blip2_stage2")
    return folder


def tiny_values(name: str, config: Path, parts: Path, output: Path) -> dict:
    """The values of a YAML file with tiny parts, few rows a step and no evaluation."""
    values = yaml.safe_load(config.read_text())
    own = {
        "blip2_stage1": {"vision": "clip", "text": "bert"},
        "blip2_stage2": {"model": "blip2_stage1", "language_model": "llm"},
        "instructblip_finetune": {"model": "blip2_stage2", "text": "bert"},
    }
    values |= {argument: str(parts / part) for argument, part in own[name].items()}
    if name == "blip2_stage1":
        values |= {"image_size": SIZE, "projection_dim": 16, "num_query_tokens": tiny_blip2.QUERIES, "dropout": 0.1}
    values |= {"output_dir": str(output), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    values |= {"max_steps": STEPS, "warmup_steps": 1, "save_steps": 1, "logging_steps": 1, "bf16": False}
    values |= {"dataloader_num_workers": 0, "eval_strategy": "no", "disable_tqdm": True}
    if "feature_cache" in values:
        values["feature_cache"] = str(output.parent / "features")
    return values


def image_folder(folder: Path, rows: int = 12) -> Path:
    """Images with `metadata.csv`."""
    folder.mkdir()
    with (folder / "metadata.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "words"])
        for row in range(rows):
            tiny.image(seed=row).save(folder / f"{row}.png")
            writer.writerow([f"{row}.png", tiny.CAPTIONS[row % len(tiny.CAPTIONS)]])
    return folder


def parquet(folder: Path, columns: dict[str, str], rows: int = 6) -> Path:
    """Images with captions, or with questions that several people answered, under the column names of a source."""
    texts = {"caption": [tiny.CAPTIONS[row % 5] for row in range(rows)], "question": ["the tree on the left"] * rows}
    texts["answer"] = [["red", "red", "blue"], ["green", "dog", "green"]] * (rows // 2)
    types = {"image": ImageFeature(), "answer": List(Value("string"))}
    table = {columns["image"]: [tiny.image(seed=row) for row in range(rows)]}
    table |= {column: texts[role] for role, column in columns.items() if role != "image"}
    features = Features({column: types.get(role, Value("string")) for role, column in columns.items()})
    folder.mkdir()
    Dataset.from_dict(table, features=features).to_parquet(folder / "train-0.parquet")
    return folder


def own_sources(name: str, folder: Path) -> list[dict]:
    """An image folder, and for instructions questions in parquet as well."""
    columns = {"image": "image", "caption": "words"}
    sources: list[dict] = [{"path": str(image_folder(folder / "pictures")), "columns": columns}]
    if name == "instructblip_finetune":
        columns = {"image": "image", "question": "asked", "answer": "said"}
        sources.append({"path": str(parquet(folder / "asked", columns)), "columns": columns, "task": "vqa"})
    return sources


class StopAfter(TrainerCallback):
    """Ends a run after a step, as a user would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def run(name: str, values: dict, file: Path, stop: int | None = None, *options: str) -> Path:
    """Runs a recipe, perhaps to a step only; the output folder."""
    recipe, trainer_name = RECIPES[name]
    trainer_class = getattr(recipe, trainer_name)

    def stopping(*args, **kwargs):
        trainer = trainer_class(*args, **kwargs)
        trainer.add_callback(StopAfter(stop))
        return trainer

    file.write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            patch.setattr(recipe, trainer_name, stopping)
        recipe.main(*parse(name, file, *options))
    return Path(values["output_dir"])


def part_of(parameter: str) -> str:
    return parameter.removeprefix("model.").split(".")[0]


def assert_loads(name: str, folder: Path) -> PreTrainedModel:
    """That every Auto class gives all weights, and that the head compares or writes; the head."""
    auto_class = AutoModelForPreTraining if name == "blip2_stage1" else AutoModelForImageTextToText
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    heads_own = ("similarity.", "itm_head.", "lm_head.") if name == "blip2_stage1" else ()
    assert all(key.startswith(heads_own) for key in info["unexpected_keys"])
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert equal(base.state_dict(), model.model.state_dict())
    processor = AutoProcessor.from_pretrained(folder)
    if name == "blip2_stage1":
        assert model(**processor(images=[tiny.image()], text=["a red cat"])).itm_logits.isfinite().all()
    else:
        inputs = processor(images=[tiny.image()], text=["<image> a cat"])
        assert model(**inputs).logits.isfinite().all()
        assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
    return model


def begin(name: str, parts: Path) -> dict[str, torch.Tensor]:
    """What the checkpoint that a recipe begins with has, under the names of the one that it writes."""
    if name == "blip2_stage1":
        return {}
    if name == "instructblip_finetune":
        return load_file(parts / "blip2_stage2" / "model.safetensors")
    llm = load_file(parts / "llm" / "model.safetensors")
    own = {f"model.language_model.{key}": tensor for key, tensor in llm.items()}
    return load_file(parts / "blip2_stage1" / "model.safetensors") | own


@pytest.mark.parametrize(("name", "rank"), [*((name, 0) for name in RECIPES), ("instructblip_finetune", 2)])
def test_own_data_stopped_and_resumed_equals_uninterrupted(name, rank, tmp_path, parts):
    """small.yaml on the user's own files, with dropout, accumulation and cached features; LoRA on the LLM too."""
    values = tiny_values(name, config_of(name, "small"), parts, tmp_path / "whole")
    values |= {"sources": own_sources(name, tmp_path)}
    if name == "instructblip_finetune":
        values |= {"train_rows": 20, "lora_r": rank}
    whole = run(name, values, tmp_path / "run.yaml")
    values["output_dir"] = str(tmp_path / "stopped")
    stopped = run(name, values, tmp_path / "run.yaml", stop=2)
    assert last_checkpoint(stopped).endswith("checkpoint-2")
    run(name, values, tmp_path / "run.yaml")
    last = [folder / f"checkpoint-{STEPS}" for folder in (whole, stopped)]
    losses = [line["loss"] for line in curve(last[0])]
    assert len(set(losses)) == STEPS
    assert all(map(math.isfinite, losses))
    assert curve(last[0]) == curve(last[1])
    weights = [load_file(folder / "model.safetensors") for folder in (whole, stopped)]
    assert equal(*weights)
    assert equal(*(torch.load(folder / "optimizer.pt", weights_only=False) for folder in last))
    assert (tmp_path / "features").exists() or (tmp_path / "features-0").exists()
    record = json.loads((stopped / "training_record.json").read_text())
    assert record["training"]["steps"] == STEPS
    assert "## How to use" in (stopped / "README.md").read_text()
    assert_loads(name, stopped)
    before = begin(name, parts)
    moved = {part_of(key) for key, tensor in weights[1].items() if key in before and not equal(tensor, before[key])}
    expected = (TRAINED[name] if before else set()) | ({"language_model"} if rank else set())
    # The second stage's projection is new: there is nothing to compare it with.
    assert moved == expected - ({"language_projection"} if name == "blip2_stage2" else set())


def test_an_adapter_holds_all_that_was_trained(tmp_path, parts):
    """Loaded on the second stage, it gives the logits of the merged folder; the LLM's weights are not in it."""
    name = "instructblip_finetune"
    values = tiny_values(name, config_of(name, "small"), parts, tmp_path / "run")
    values |= {"sources": own_sources(name, tmp_path), "train_rows": 20, "lora_r": 2}
    folder = run(name, values, tmp_path / "run.yaml")
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    kinds = {key.removeprefix("base_model.model.model.").split(".")[0] for key in saved}
    assert kinds == TRAINED[name] | {"language_model"}
    assert all("lora_" in key for key in saved if "language_model" in key)
    merged = VlmInstructBlipForConditionalGeneration.from_pretrained(folder)
    fresh = VlmInstructBlipForConditionalGeneration.from_blip2(str(parts / "blip2_stage2")).eval()
    inputs = AutoProcessor.from_pretrained(folder)(images=[tiny.image()], text=["<image> a cat"])
    before = fresh(**inputs).logits.detach()
    adapted = PeftModel.from_pretrained(fresh, folder / "adapter").eval()
    logits = adapted(**inputs).logits
    assert (logits - before).abs().max() > 1e-3
    torch.testing.assert_close(logits, merged(**inputs).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
    assert AutoProcessor.from_pretrained(folder / "adapter").tokenizer.get_vocab()


@pytest.mark.parametrize("rank", [0, 2])
def test_trl_itself_gives_the_same_losses(rank, tmp_path):
    """TRL's own way to the loss, from logits at all positions, and the model's: two steps of two micro-batches."""
    rows = Dataset.from_dict(
        {
            "instruction": [tiny.CAPTIONS[row % 5] for row in range(8)],
            "response": ["a red cat", "tree", "two dog and a blue house", "the left"] * 2,
            "source": ["pictures"] * 8,
            "index": list(range(8)),
        }
    )
    pictures = {"pictures": [{"image": tiny.image(seed=row)} for row in range(8)]}
    logs, weights = [], []
    for trainer_class in (SFTTrainer, VlmSFTTrainer):
        torch.manual_seed(0)
        model = tiny_blip2.blip2_model(VlmInstructBlipForConditionalGeneration, "llama")
        processor = tiny_blip2.instruct_processor()
        args = VlmSFTConfig(
            output_dir=str(tmp_path / trainer_class.__name__),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",  # Adam would amplify the rounding error of a zero gradient
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = trainer_class(
            add_lora(model, rank, 4) if rank else model,
            args,
            train_dataset=rows,
            data_collator=PromptCollator(processor, pictures, max_length=24, with_qformer=True),
            processing_class=processor,
        )
        trainer.train()
        logs.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        weights.append(trained)
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert logs[1][0] != logs[1][1]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-5, atol=1e-6)


PAPER_RATES = {  # of the first step, at the end of the warm-up, of the last step
    "blip2_stage1": (1e-6, 1e-4, 1e-5),
    "blip2_stage2": (0.0, 1e-4, 5e-5),
    "instructblip_finetune": (1e-8, 1e-5, 0.0),
}
PAPER_BATCH = {"blip2_stage1": 2320, "blip2_stage2": 1920, "instructblip_finetune": 128}
PAPER_STEPS = {"blip2_stage1": 250_000, "blip2_stage2": 80_000, "instructblip_finetune": 60_000}
PAPER_WARMUP = {"blip2_stage1": 2000, "blip2_stage2": 2000, "instructblip_finetune": 1000}


@pytest.mark.parametrize("name", RECIPES)
def test_paper_says_what_was_published(name):
    model_args, data_args, args = parse(name, config_of(name, "paper"), "--bf16", "false")
    assert args.per_device_train_batch_size * 16 == PAPER_BATCH[name]
    assert (args.max_steps, args.warmup_steps) == (PAPER_STEPS[name], PAPER_WARMUP[name])
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.999 if name == "instructblip_finetune" else 0.98)
    assert args.weight_decay == 0.05
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    options = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps, **options)
    rates = [scheduler.lr_lambdas[0](step) * args.learning_rate for step in (0, args.warmup_steps, args.max_steps - 1)]
    assert rates == pytest.approx(PAPER_RATES[name], rel=1e-4, abs=1e-12)
    assert all(not source.get("streaming") for source in data_args.sources)
    if name == "blip2_stage1":
        sizes = (model_args.image_size, model_args.num_query_tokens, model_args.cross_attention_frequency)
        assert (*sizes, model_args.projection_dim, model_args.max_text_length) == (224, 32, 2, 256, 32)
    if name == "instructblip_finetune":
        assert data_args.train_rows == PAPER_BATCH[name] * PAPER_STEPS[name]
        assert model_args.lora_r == 0


# Numbers of parameters of a BERT-base with queries that look at ViT-L's states.
HIDDEN, MEMORY, INNER = 768, 1024, 3072
NORM = 2 * HIDDEN
SELF_ATTENTION = 4 * (HIDDEN**2 + HIDDEN) + NORM
CROSS_ATTENTION = 2 * (HIDDEN**2 + HIDDEN) + 2 * (MEMORY * HIDDEN + HIDDEN) + NORM
FEED_FORWARD = 2 * HIDDEN * INNER + INNER + HIDDEN + NORM
QUERY_BRANCH = 32 * HIDDEN + NORM + 12 * (SELF_ATTENTION + FEED_FORWARD) + 6 * CROSS_ATTENTION


def test_the_published_sizes_are_trained():
    """Trained parameters of each stage by name and number; the paper counts 104 million in its second stage."""
    model_args, *_ = parse("blip2_stage1", config_of("blip2_stage1", "paper"), "--bf16", "false")
    tower = CLIPVisionConfig(
        hidden_size=MEMORY, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    names = ("image_size", "num_query_tokens", "cross_attention_frequency", "projection_dim")
    with torch.device("meta"):
        options = {field: getattr(model_args, field) for field in names}
        first = VlmBlip2ForPreTraining.from_parts(CLIPVisionModel(tower), BertModel(BertConfig()), **options)
        fields = {**first.config.to_dict(), "image_token_id": 60_000}
        opt = OPTConfig(hidden_size=2560, ffn_dim=10_240, num_hidden_layers=32, num_attention_heads=32)
        opt.word_embed_proj_dim = 2560
        second = VlmBlip2ForConditionalGeneration(VlmBlip2Config(**{**fields, "text_config": opt}))
        fields["model_type"] = "vlm_instructblip"
        third = VlmInstructBlipForConditionalGeneration(
            VlmInstructBlipConfig(**{**fields, "text_config": LlamaConfig(vocab_size=32_000)})
        )
    counts = []
    for name, model in zip(RECIPES, (first, second, third), strict=True):
        trained = {key: p.numel() for key, p in model.train().named_parameters() if p.requires_grad}
        assert {part_of(key) for key in trained} == TRAINED[name]
        counts.append(sum(trained.values()))
    heads = 2 * (HIDDEN * 256 + 256) + 1 + 2 * HIDDEN + 2
    words = first.config.qformer_config.vocab_size
    lm_head, embeddings = HIDDEN**2 + HIDDEN + NORM + words, (words + 512) * HIDDEN
    read = QUERY_BRANCH + 2 * MEMORY
    assert counts[0] == read + embeddings + 12 * FEED_FORWARD + heads + lm_head
    assert counts[1] == read + HIDDEN * 2560 + 2560
    assert counts[2] == read + embeddings + 11 * FEED_FORWARD + HIDDEN * 4096 + 4096
    assert round(counts[1] / 1e6) == 104


@pytest.mark.parametrize("name", RECIPES)
def test_paper_runs(name, tmp_path, parts):
    """paper.yaml at shrunken sizes, each source a small file with the columns that it names."""
    values = tiny_values(name, config_of(name, "paper"), parts, tmp_path / "run")
    values |= {"max_steps": 2, **({"train_rows": 16} if name == "instructblip_finetune" else {})}
    for source in values["sources"]:
        source["path"] = str(parquet(tmp_path / Path(source["path"]).name, source["columns"]))
    folder = run(name, values, tmp_path / "run.yaml")
    lines = curve(folder / "checkpoint-2")
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert len(lines) == 2
    assert_loads(name, folder)
    record = json.loads((folder / "training_record.json").read_text())
    assert [entry["name"] for entry in record["data"]] == [Path(source["path"]).name for source in values["sources"]]
    card = (folder / "README.md").read_text()
    assert ("InstructBLIP" if name == "instructblip_finetune" else "BLIP-2") in card


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_small_runs_stops_and_resumes(name, tmp_path, parts):
    """small.yaml on the built-in scenes and easy-VQA, two of three steps, then the rest and the reports."""
    values = tiny_values(name, config_of(name, "small"), parts, tmp_path / "run")
    values |= {"max_steps": 3, "train_scenes": 24, "num_scenes": 3}
    if name == "instructblip_finetune":
        values |= {"train_rows": 64}
    run(name, values, tmp_path / "run.yaml", stop=2)
    folder = run(name, values, tmp_path / "run.yaml")
    assert [line["step"] for line in curve(folder / "checkpoint-3") if "loss" in line] == [1, 2, 3]
    assert_loads(name, folder)
    results = json.loads((folder / "results.json").read_text())
    written = {"caption", "vqa", "vqa_unseen_wordings", "pope", "easy_vqa", "easy_vqa_unseen_wordings"}
    assert set(results) == ({"retrieval", "hard_negatives"} if name == "blip2_stage1" else written)
    record = json.loads((folder / "training_record.json").read_text())
    assert ("easy-VQA" in [entry["name"] for entry in record["data"]]) == (name == "instructblip_finetune")
    assert record["training"]["steps"] == 3
    card = (folder / "README.md").read_text()
    assert "## Results" in card
