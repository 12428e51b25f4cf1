"""BLIP on one task (arXiv 2201.12086, section 5): captions, question answering, or retrieval; in full or by LoRA.

After `blip_pretrain.py`, on scenes of the built-in pictures, a quarter of an hour each on two cores:

    python recipes/blip_finetune.py --config recipes/blip_finetune/vqa_small.yaml
    python recipes/blip_finetune.py --config recipes/blip_finetune/caption_small.yaml --lora_r 16

As published, on several GPUs:

    torchrun --nproc_per_node 8 recipes/blip_finetune.py --config recipes/blip_finetune/vqa_paper.yaml

Every scalar key of the YAML is also an option (`--learning_rate 1e-5`). A stopped run continues when started again.
By LoRA, the output folder holds the merged model, and `adapter` within it what was trained.
"""

import copy
from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, set_seed
from trl import TrlParser

import hf_vlm
from hf_vlm import VlmBlipForPreTraining, VlmBlipProcessor
from hf_vlm.data import (
    Augmentation,
    CaptionCollator,
    PairDataset,
    QuestionCollator,
    QuestionDataset,
    SceneRows,
    SceneStream,
    load_pairs,
    load_questions,
    resolve_part,
)
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import BlipTrainer, BlipTrainingArguments, last_checkpoint

HEADS = {
    "caption": hf_vlm.VlmBlipForConditionalGeneration,
    "vqa": hf_vlm.VlmBlipForQuestionAnswering,
    "retrieval": hf_vlm.VlmBlipForImageTextRetrieval,
}
AUGMENTATIONS = {"photo": Augmentation.photo(), "scene": Augmentation.scene(), "none": None}


@dataclass
class ModelArguments:
    """The pretrained model, and what is to become of it."""

    model: str = field(metadata={"help": "Folder or Hub id of a pretrained BLIP."})
    task: str = field(metadata={"help": f"One of {', '.join(HEADS)}."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images; positions are interpolated."})
    prompt: str = field(default="", metadata={"help": "Begins every caption and is not learned."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA; 0 trains everything."})
    lora_alpha: int = field(default=32, metadata={"help": "Its factor, over the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Its dropout."})


@dataclass
class DataArguments:
    """Where the rows come from: image and caption, or image, question and answer."""

    sources: list[dict] | None = field(
        default=None, metadata={"help": "Data sources (path, split, columns, ...); none: scenes of built-in pictures."}
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "The same for evaluation while training."})
    mix: str = field(default="size", metadata={"help": "Mix sources by their size or its square root (sqrt)."})
    on_error: str = field(default="raise", metadata={"help": "raise or skip broken images."})
    augmentation: str = field(default="photo", metadata={"help": "photo, scene or none."})
    train_scenes: int = field(default=100_000, metadata={"help": "Scenes to train on."})
    max_words: int | None = field(default=None, metadata={"help": "Longest caption of a scene in words."})
    scene_size: int | None = field(default=None, metadata={"help": "Pixels of a scene's side; the tower's."})
    num_scenes: int = field(default=500, metadata={"help": "Scenes of each test set."})


def build_model(args: ModelArguments) -> tuple:
    """The head for the task, perhaps with LoRA on its linear layers, and its processor."""
    if args.task not in HEADS:
        raise ValueError(f"There is no task {args.task!r}; choose one of {', '.join(HEADS)}.")
    source = resolve_part(args.model)
    pretrained = VlmBlipForPreTraining.from_pretrained(source)
    model = HEADS[args.task].from_pretraining(pretrained, image_size=args.image_size)
    processor = AutoProcessor.from_pretrained(source)
    if args.image_size is not None:
        processor.image_processor.size = {"height": args.image_size, "width": args.image_size}
    if args.lora_r > 0:
        lora = LoraConfig(
            r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules="all-linear"
        )
        model = get_peft_model(model, lora)
    return model, processor


def build_data(args: DataArguments, task: str, size: int, seed: int) -> tuple:
    """Rows to train on, and rows to watch the training with."""
    if args.sources is not None:
        load = load_questions if task == "vqa" else load_pairs
        train = load(args.sources, args.mix, seed, args.on_error)
        return train, load(args.eval_sources) if args.eval_sources else None
    rows = SceneRows(SceneStream("train", seed + 2, size), args.train_scenes, args.max_words)
    watched = SceneRows(SceneStream("validation", seed + 1, size), 512, args.max_words)
    dataset = QuestionDataset if task == "vqa" else PairDataset
    return dataset(rows, seed), dataset(watched, seed)


def build_collator(task: str, processor: VlmBlipProcessor, prompt: str, augmentation: Augmentation | None = None):
    """Examples to the batches of the task."""
    if task == "vqa":
        return QuestionCollator(processor, augmentation)
    return CaptionCollator(processor, augmentation, prompt, pair_ids=task == "retrieval")


def main(model_args: ModelArguments, data_args: DataArguments, training_args: BlipTrainingArguments) -> None:
    """Model, data, train; then, on the built-in pictures, the test sets."""
    set_seed(training_args.seed)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    task, size = model_args.task, data_args.scene_size or processor.image_processor.size["height"]
    train, watched = build_data(data_args, task, size, training_args.seed)

    # TRAIN
    trainer = BlipTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=watched,
        data_collator=build_collator(task, processor, model_args.prompt, AUGMENTATIONS[data_args.augmentation]),
        eval_collator=build_collator(task, processor, model_args.prompt),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    whole = copy.deepcopy(model).merge_and_unload() if model_args.lora_r > 0 else model
    if trainer.is_world_process_zero():
        if model_args.lora_r > 0:
            model.save_pretrained(f"{training_args.output_dir}/adapter")
        whole.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
        if data_args.sources is None:
            save_scene_report(training_args.output_dir, whole, processor, data_args.num_scenes, size)
    finish_run(trainer, "blip_finetune", model_args, data_args)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, BlipTrainingArguments)).parse_args_and_config())
