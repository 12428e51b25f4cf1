"""BLIP-2, second stage (arXiv 2301.12597, section 3.3): what the Q-Former reads becomes the prompt of a frozen LLM.

A laptop, about 40 minutes on two cores, on scenes of the built-in pictures, after `blip2_stage1.py`:

    python recipes/blip2_stage2.py --config recipes/blip2_stage2/small.yaml

The published recipe on several GPUs, on your own shards:

    torchrun --nproc_per_node 8 recipes/blip2_stage2.py --config recipes/blip2_stage2/paper.yaml

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). A stopped run continues when started again.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoProcessor, set_seed
from trl import TrlParser

from hf_vlm import VlmBlip2ForConditionalGeneration, VlmBlip2Processor
from hf_vlm.data import Augmentation, CaptionPromptCollator, PairDataset, PairStream, SceneRows, SceneStream, load_pairs
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import (
    VlmTrainer,
    VlmTrainingArguments,
    cached_tower_features,
    last_checkpoint,
    open_language_model,
)

AUGMENTATIONS = {"photo": Augmentation.photo(), "scene": Augmentation.scene(), "none": None}


@dataclass
class ModelArguments:
    """The first stage and the LLM."""

    model: str = field(metadata={"help": "Hub id or folder of a first stage."})
    language_model: str = field(default="facebook/opt-2.7b", metadata={"help": "Hub id, folder or wheel:NAME."})
    language_model_dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: as bf16 says."})
    prompt: str = field(default="", metadata={"help": "Begins every text and is not learned."})
    max_length: int = field(default=32, metadata={"help": "Longest text in tokens."})


@dataclass
class DataArguments:
    """Where the pairs come from."""

    sources: list[dict] | None = field(
        default=None, metadata={"help": "Data sources (path, split, columns, ...); none: scenes of built-in pictures."}
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "The same for evaluation while training."})
    mix: str = field(default="size", metadata={"help": "Mix sources by their size or its square root (sqrt)."})
    on_error: str = field(default="raise", metadata={"help": "raise or skip broken images."})
    augmentation: str = field(default="photo", metadata={"help": "photo, scene or none."})
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder for the tower's features, computed once (without augmentation)."}
    )
    train_scenes: int = field(default=30_000, metadata={"help": "Scenes to train on."})
    max_words: int | None = field(default=None, metadata={"help": "Longest caption of a scene in words."})
    num_scenes: int = field(default=500, metadata={"help": "Scenes of each test set."})


def build_model(args: ModelArguments, bf16: bool) -> tuple[VlmBlip2ForConditionalGeneration, VlmBlip2Processor]:
    """The first stage with an LLM behind it, and their processor."""
    dtype = ("bfloat16" if bf16 else "float32") if args.language_model_dtype == "auto" else args.language_model_dtype
    language_model, tokenizer = open_language_model(args.language_model, dtype=getattr(torch, dtype))
    image_processor = AutoProcessor.from_pretrained(args.model).image_processor
    config = VlmBlip2ForConditionalGeneration.config_class.from_pretrained(args.model)
    num_queries = config.qformer_config.num_query_tokens
    processor = VlmBlip2Processor.for_language_model(image_processor, tokenizer, num_queries)
    model = VlmBlip2ForConditionalGeneration.from_parts(args.model, language_model, processor.image_token_id)
    return model, processor


def build_data(
    args: DataArguments, image_size: int, seed: int
) -> tuple[PairDataset | PairStream, PairDataset | PairStream | None]:
    """Pairs to train on, and pairs to watch the training with."""
    if args.sources is None:
        train = SceneRows(SceneStream("train", seed, image_size), args.train_scenes, args.max_words)
        validation = SceneRows(SceneStream("validation", seed + 1, image_size), 256, args.max_words)
        return PairDataset(train, seed), PairDataset(validation, shuffle_captions=False)
    train = load_pairs(args.sources, args.mix, seed, args.on_error)
    return train, load_pairs(args.eval_sources, shuffle_captions=False) if args.eval_sources else None


def main(model_args: ModelArguments, data_args: DataArguments, training_args: VlmTrainingArguments) -> None:
    """Model, data, train; then, on the built-in pictures, the test sets."""
    set_seed(training_args.seed)

    # MODEL
    model, processor = build_model(model_args, training_args.bf16)

    # DATA
    size = processor.image_processor.size["height"]
    train, validation = build_data(data_args, size, training_args.seed)
    features = None
    if data_args.feature_cache is not None:
        rows = train if isinstance(train, PairStream) else train.rows
        data = {"sources": data_args.sources, "mix": data_args.mix, "seed": training_args.seed}
        options = {"bf16": training_args.bf16, "num_workers": training_args.dataloader_num_workers}
        tower = model.model.vision_model
        features = cached_tower_features(data_args.feature_cache, rows, processor, tower, data, **options)
    texts = {
        "prompt": model_args.prompt,
        "is_encoder_decoder": model.model.language_model.config.is_encoder_decoder,
        "max_length": model_args.max_length,
    }
    augmentation = AUGMENTATIONS[data_args.augmentation]

    # TRAIN
    trainer = VlmTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionPromptCollator(processor, augmentation, vision_features=features, **texts),
        eval_collator=CaptionPromptCollator(processor, **texts),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, model, processor, data_args.num_scenes, size)
    finish_run(trainer, "blip2_stage2", model_args, data_args)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, VlmTrainingArguments)).parse_args_and_config())
