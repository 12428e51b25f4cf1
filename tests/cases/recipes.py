"""Every recipe on tiny parts and eight rows of its own data, as the values of a YAML file."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2Processor,
    VlmLlavaForConditionalGeneration,
    VlmLlavaProcessor,
)

from . import tiny, tiny_blip2

SIZE, TEXT_LENGTH, ROWS = 48, 128, 8
TRAINING = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "warmup_steps": 0,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "learning_rate": 1e-3,
}


def save_parts(folder: Path) -> Path:
    """Saves the models that recipes start from, and the data: `pairs`, `questions` (parquet) and `talk` (JSON)."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tiny.clip_model().save_pretrained(folder / "clip")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    tiny.blip_model().save_pretrained(folder / "blip")
    tiny.blip_processor().save_pretrained(folder / "blip")
    tiny_blip2.bert(max_position_embeddings=TEXT_LENGTH).save_pretrained(folder / "bert")
    tiny_blip2.bert_tokenizer(TEXT_LENGTH).save_pretrained(folder / "bert")
    tiny_blip2.llm().save_pretrained(folder / "llm")
    tiny_blip2.llm_tokenizer().save_pretrained(folder / "llm")
    first = tiny_blip2.blip2_model(vision={"image_size": SIZE}, qformer={"max_position_embeddings": TEXT_LENGTH})
    first.save_pretrained(folder / "blip2_stage1")
    size = {"height": SIZE, "width": SIZE}
    VlmBlip2Processor.from_parts(tiny_blip2.bert_tokenizer(TEXT_LENGTH), size=size).save_pretrained(
        folder / "blip2_stage1"
    )
    second = VlmBlip2ForConditionalGeneration.from_parts(first, tiny_blip2.llm(), tiny_blip2.IMAGE_TOKEN_ID)
    second.save_pretrained(folder / "blip2_stage2")
    tokens = (tiny_blip2.image_processor(SIZE), tiny_blip2.llm_tokenizer(), tiny_blip2.QUERIES)
    VlmBlip2Processor.for_language_model(*tokens).save_pretrained(folder / "blip2_stage2")
    llava = VlmLlavaForConditionalGeneration.from_parts(
        tiny.clip_model(), tiny_blip2.llm(), tiny_blip2.IMAGE_TOKEN_ID, vision_feature_layer=-2
    )
    llava.save_pretrained(folder / "llava")
    VlmLlavaProcessor.from_parts(llava, tiny_blip2.llm_tokenizer()).save_pretrained(folder / "llava")
    save_data(folder)
    return folder


def save_data(folder: Path, rows: int = ROWS) -> None:
    """Saves the data only."""
    images = [tiny.image(seed=number) for number in range(rows)]
    captions = [tiny.CAPTIONS[number % len(tiny.CAPTIONS)] for number in range(rows)]
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    Dataset.from_dict({"image": images, "caption": captions}, features).to_parquet(folder / "pairs.parquet")
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": List(Value("string"))})
    table = {"image": images, "question": ["two cat on the left"] * rows, "answer": [["red", "red", "blue"]] * rows}
    Dataset.from_dict(table, features).to_parquet(folder / "questions.parquet")
    talk = []
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nthe red cat"}, {"from": "gpt", "value": captions[number]}]
        talk.append({"image": f"{number}.png", "conversations": turns})
    (folder / "talk.json").write_text(json.dumps(talk))


def clip_values(parts: Path) -> dict[str, Any]:
    """clip_pretrain from new towers."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "vision_config": {**tower, "patch_size": 16},
        "text_config": {**tiny.layer_sizes(), **tiny.TOKENS},
        "tokenizer": f"{parts}/tokenizer",
        "image_size": 32,
        "projection_dim": 16,
        "max_text_length": tiny.MAX_LENGTH,
    }


def tiny_values(name: str, parts: Path, output: Path) -> dict[str, Any]:
    """The values of a recipe's YAML file; `parts` is the folder of [`save_parts`]."""
    pairs = {"sources": [{"path": f"{parts}/pairs.parquet"}], "augmentation": "none"}
    captions = {"sources": [{"path": f"{parts}/pairs.parquet"}]}
    questions = {"sources": [{"path": f"{parts}/questions.parquet"}]}
    own = {
        "clip_pretrain": {**clip_values(parts), **pairs},
        "blip_pretrain": {
            "vision": f"{parts}/clip",
            "text": f"{parts}/bert",
            "image_size": SIZE,
            "queue_size": 8,
            **pairs,
        },
        "blip_finetune": {"model": f"{parts}/blip", "task": "vqa", **questions, "augmentation": "none"},
        "blip2_stage1": {
            "vision": f"{parts}/clip",
            "text": f"{parts}/bert",
            "image_size": SIZE,
            "projection_dim": 16,
            "num_query_tokens": tiny_blip2.QUERIES,
            **pairs,
        },
        "blip2_stage2": {"model": f"{parts}/blip2_stage1", "language_model": f"{parts}/llm", **pairs},
        "instructblip_finetune": {"model": f"{parts}/blip2_stage2", "text": f"{parts}/bert", **captions},
        "llava_align": {"vision": f"{parts}/clip", "language_model": f"{parts}/llm", **captions},
        "llava_instruct": {
            "model": f"{parts}/llava",
            "sources": [{"path": f"{parts}/talk.json", "image_folder": f"{parts}"}],
        },
        "blip_filter": {"checkpoint": f"{parts}/blip", **captions},
    }
    training = {} if name == "blip_filter" else TRAINING
    return {**own[name], **training, "output_dir": str(output)}


def write_yaml(path: Path, values: dict[str, Any]) -> Path:
    """Writes values to a YAML file and returns its path."""
    path.write_text(yaml.safe_dump(values))
    return path


def recipe_module(name: str) -> ModuleType:
    """The script of a recipe."""
    return importlib.import_module(f"recipes.{name}")


TRAINED = (
    *("clip_pretrain", "blip_pretrain", "blip_finetune", "blip2_stage1", "blip2_stage2", "instructblip_finetune"),
    *("llava_align", "llava_instruct"),
)
RECIPES = (*TRAINED, "blip_filter")
