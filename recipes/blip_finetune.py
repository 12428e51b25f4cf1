"""BLIP on one task (arXiv 2201.12086, section 5): captions, question answering or retrieval; in full or with LoRA.

A laptop, on the built-in scenes, after `blip_pretrain`; several GPUs, on your own data:

    hf-vlm recipes run blip_finetune --config vqa_small
    hf-vlm recipes run blip_finetune --config caption_small --lora_r 16
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.blip_finetune --config vqa_paper

Every scalar key of the YAML is also an option (`--learning_rate 1e-5`). An interrupted run resumes when started again.
With LoRA the output folder holds the merged model, and its subfolder `adapter` the adapter.
"""

from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor

import hf_vlm
from hf_vlm import VlmBlipForPreTraining, VlmBlipProcessor
from hf_vlm.data import (
    Augmentation,
    CaptionCollator,
    PairDataset,
    QuestionCollator,
    QuestionDataset,
    load_questions,
    resolve_part,
)
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.runs.arguments import BlipTaskArguments, BlipTaskDataArguments
from hf_vlm.runs.data import find_augmentation, own_pairs, scene_rows, validation_scenes
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.sources import check_streams
from hf_vlm.runs.start import Run
from hf_vlm.training import BlipTrainer, BlipTrainingArguments, save_trained

HEADS = {
    "caption": hf_vlm.VlmBlipForConditionalGeneration,
    "vqa": hf_vlm.VlmBlipForQuestionAnswering,
    "retrieval": hf_vlm.VlmBlipForImageTextRetrieval,
}


def build_model(args: BlipTaskArguments) -> tuple:
    """The head for the task, with LoRA on its linear layers if wanted, and its processor."""
    if args.task not in HEADS:
        raise ValueError(f"There is no task {args.task!r}; choose one of {', '.join(HEADS)}.")
    source = resolve_part(args.model)
    pretrained = VlmBlipForPreTraining.from_pretrained(source)
    model = HEADS[args.task].from_pretraining(pretrained, image_size=args.image_size)
    processor = AutoProcessor.from_pretrained(source)
    if args.image_size is not None:
        processor.image_processor.size = {"height": args.image_size, "width": args.image_size}
    if args.lora_r > 0:
        options = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", **options))
    return model, processor


def build_data(args: BlipTaskDataArguments, task: str, size: int, seed: int) -> tuple:
    """Training rows and validation rows."""
    if args.sources is None:
        dataset = QuestionDataset if task == "vqa" else PairDataset
        return dataset(scene_rows(args, size, seed + 2), seed), dataset(validation_scenes(args, size, seed), seed)
    if task != "vqa":
        return own_pairs(args, seed)
    train = load_questions(args.sources, args.mix, seed, args.on_error, args.report)
    return train, load_questions(args.eval_sources) if args.eval_sources else None


def build_collator(task: str, processor: VlmBlipProcessor, prompt: str, augmentation: Augmentation | None = None):
    """The collator that makes the batches of the task."""
    if task == "vqa":
        return QuestionCollator(processor, augmentation)
    return CaptionCollator(processor, augmentation, prompt, pair_ids=task == "retrieval")


def main(model_args: BlipTaskArguments, data_args: BlipTaskDataArguments, training_args: BlipTrainingArguments) -> None:
    """Trains; on the built-in data, evaluates the model too."""
    if model_args.task == "vqa":
        check_streams([*(data_args.sources or []), *(data_args.eval_sources or [])], "blip_finetune with task: vqa")
    run = Run("blip_finetune", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    task, size = model_args.task, data_args.scene_size or processor.image_processor.size["height"]
    train, validation = build_data(data_args, task, size, training_args.seed)
    augmentation = find_augmentation(data_args.augmentation)

    # TRAIN
    trainer = BlipTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=build_collator(task, processor, model_args.prompt, augmentation),
        eval_collator=build_collator(task, processor, model_args.prompt),
        processing_class=processor,
    )
    run.train(trainer)
    saved = save_trained(trainer)
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, saved, processor, data_args.num_scenes, size)
    finish_run(trainer, "blip_finetune", model_args, data_args)


if __name__ == "__main__":
    launch(main)
