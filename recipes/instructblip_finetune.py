"""InstructBLIP (arXiv 2305.06500): a BLIP-2 that learns to follow instructions, by TRL's `SFTTrainer`.

A laptop, about 25 minutes on two cores, on scenes of the built-in pictures and on easy-VQA, after `blip2_stage2.py`:

    python recipes/instructblip_finetune.py --config recipes/instructblip_finetune/small.yaml

The published recipe on several GPUs, on your own data:

    torchrun --nproc_per_node 8 recipes/instructblip_finetune.py --config recipes/instructblip_finetune/paper.yaml

The Q-Former is trained; `--lora_r 16` adds LoRA on the LLM. Every scalar key of the YAML is also an option. A stopped
run continues when started again.
"""

import copy
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import AutoProcessor, AutoTokenizer, set_seed
from trl import TrlParser

from hf_vlm import VlmInstructBlipForConditionalGeneration, VlmInstructBlipProcessor
from hf_vlm.data import (
    DataSource,
    PromptCollator,
    QuestionRows,
    SceneRows,
    SceneStream,
    caption_instructions,
    easy_vqa_images,
    easy_vqa_questions,
    load_source,
    mix_by_sqrt,
    question_instructions,
    question_source,
    resolve_part,
    scene_instructions,
)
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.models import cast_weights
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, add_lora, cached_tower_features, last_checkpoint


@dataclass
class ModelArguments:
    """The second stage, and what of it is trained."""

    model: str = field(metadata={"help": "Hub id or folder of a second stage that has kept its text branch."})
    text: str = field(default="google-bert/bert-base-uncased", metadata={"help": "Whose tokenizer the Q-Former has."})
    language_model_dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: as bf16 says."})
    max_text_length: int = field(default=128, metadata={"help": "Longest instruction and response, in tokens."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the LLM; 0 trains the Q-Former alone."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA."})


@dataclass
class DataArguments:
    """Where the instructions come from."""

    sources: list[dict] | None = field(
        default=None,
        metadata={"help": "Data sources (path, task: caption or vqa, columns, ...); none: scenes and easy-VQA."},
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "Not used; the test sets are at the end."})
    train_rows: int = field(default=100_000, metadata={"help": "Instructions, by the square root of a source's size."})
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder for the tower's features; of scenes the one of the earlier stages."}
    )
    train_scenes: int = field(default=30_000, metadata={"help": "Scenes to make instructions of."})
    max_words: int | None = field(default=None, metadata={"help": "Longest caption of a scene in words."})
    num_scenes: int = field(default=500, metadata={"help": "Scenes of each test set."})


def build_model(args: ModelArguments, bf16: bool) -> tuple:
    """The second stage with a Q-Former that reads instructions, perhaps LoRA on the LLM, and its processor."""
    dtype = ("bfloat16" if bf16 else "float32") if args.language_model_dtype == "auto" else args.language_model_dtype
    model = VlmInstructBlipForConditionalGeneration.from_blip2(args.model)
    cast_weights(model.model.language_model, getattr(torch, dtype))
    before = AutoProcessor.from_pretrained(args.model)
    reader = AutoTokenizer.from_pretrained(resolve_part(args.text))
    parts = (before.image_processor, before.tokenizer, reader)
    processor = VlmInstructBlipProcessor(*parts, num_query_tokens=before.num_query_tokens)
    return add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout) if args.lora_r > 0 else model, processor


def build_data(args: DataArguments, size: int, seed: int) -> tuple[Dataset, dict]:
    """Instructions, and the rows by source that have their pictures."""
    if args.sources is None:
        scenes = SceneRows(SceneStream("train", seed, size), args.train_scenes, args.max_words)
        tables = scene_instructions(scenes, seed=seed)
        tables["easy_vqa"] = question_instructions(easy_vqa_questions("train"), "easy_vqa", seed)
        return mix_by_sqrt(tables, seed, args.train_rows), {"scenes": scenes, "easy_vqa": easy_vqa_images("train")}
    tables, pictures = {}, {}
    for number, source in enumerate(args.sources):
        name, task = f"{number} {source['path']}", source.get("task", "caption")
        fields = {key: value for key, value in source.items() if key != "task"}
        rows = load_source(question_source(fields) if task == "vqa" else DataSource(**fields))
        pictures[name] = rows
        make = question_instructions if task == "vqa" else caption_instructions
        tables[name] = make(QuestionRows(rows, name) if task == "vqa" else rows, name, seed)
    return mix_by_sqrt(tables, seed, args.train_rows), pictures


def main(model_args: ModelArguments, data_args: DataArguments, training_args: VlmSFTConfig) -> None:
    """Model, data, train; then, on the built-in pictures, the test sets."""
    set_seed(training_args.seed)

    # MODEL
    model, processor = build_model(model_args, training_args.bf16)

    # DATA
    size = processor.image_processor.size["height"]
    train, pictures = build_data(data_args, size, training_args.seed)
    features = None
    if data_args.feature_cache is not None:
        features = {}
        tower = (model.get_base_model() if model_args.lora_r > 0 else model).body.vision_model
        for number, (name, rows) in enumerate(pictures.items()):
            folder = f"{data_args.feature_cache}-{number}" if number else data_args.feature_cache
            data = {"source": data_args.sources[number] if data_args.sources else name}
            options = {"bf16": training_args.bf16, "num_workers": training_args.dataloader_num_workers}
            features[name] = cached_tower_features(folder, rows, processor, tower, data, **options)

    # TRAIN
    trainer = VlmSFTTrainer(
        model,
        training_args,
        train_dataset=train,
        data_collator=PromptCollator(processor, pictures, features, model_args.max_text_length, with_qformer=True),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    whole = copy.deepcopy(model).merge_and_unload() if model_args.lora_r > 0 else model
    if trainer.is_world_process_zero():
        if model_args.lora_r > 0:
            model.save_pretrained(f"{training_args.output_dir}/adapter")
            processor.save_pretrained(f"{training_args.output_dir}/adapter")
        whole.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
        if data_args.sources is None:
            save_scene_report(training_args.output_dir, whole, processor, data_args.num_scenes, size)
    finish_run(trainer, "instructblip_finetune", model_args, data_args, has_easy_vqa=True)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, VlmSFTConfig)).parse_args_and_config())
