"""InstructBLIP (arXiv 2305.06500): a BLIP-2 that learns to follow instructions, with TRL's `SFTTrainer`.

A laptop, on the built-in scenes and easy-VQA, after `blip2_stage2`; several GPUs, on your own data:

    hf-vlm recipes run instructblip_finetune --config small
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.instructblip_finetune --config paper

The Q-Former is trained; `--lora_r 16` adds LoRA on the LLM. Every scalar key of the YAML is also an option. An
interrupted run resumes when started again.
"""

from datasets import Dataset
from transformers import AutoProcessor, AutoTokenizer

from hf_vlm import VlmInstructBlipForConditionalGeneration, VlmInstructBlipProcessor
from hf_vlm.data import (
    DataSource,
    InstructionRows,
    PromptCollator,
    caption_instructions,
    easy_vqa_images,
    easy_vqa_questions,
    load_source,
    load_unchecked,
    mix_by_sqrt,
    question_instructions,
    question_source,
    resolve_part,
    scene_instructions,
)
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.models import cast_weights
from hf_vlm.runs.arguments import InstructBlipDataArguments, InstructBlipModelArguments
from hf_vlm.runs.data import open_features, scene_rows
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.start import Run
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, add_lora, base_of, save_trained

TASKS = {"caption": caption_instructions, "vqa": question_instructions}


def build_model(args: InstructBlipModelArguments, bf16: bool) -> tuple:
    """The second stage with a Q-Former that reads instructions, LoRA on the LLM if wanted, and its processor."""
    model = VlmInstructBlipForConditionalGeneration.from_blip2(args.model)
    cast_weights(model.model.language_model, args.torch_dtype(bf16))
    blip2 = AutoProcessor.from_pretrained(args.model)
    reader = AutoTokenizer.from_pretrained(resolve_part(args.text))
    processor = VlmInstructBlipProcessor.from_blip2(blip2, reader)
    args.set_chat_template(processor)
    return add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout) if args.lora_r > 0 else model, processor


def build_data(args: InstructBlipDataArguments, size: int, seed: int) -> tuple[Dataset | InstructionRows, dict]:
    """The instructions, and for each source the rows that hold its images."""
    if args.sources is None:
        scenes = scene_rows(args, size, seed)
        tables = scene_instructions(scenes, seed=seed)
        tables["easy_vqa"] = question_instructions(easy_vqa_questions("train"), "easy_vqa", seed)
        return mix_by_sqrt(tables, seed, args.train_rows), {"scenes": scenes, "easy_vqa": easy_vqa_images("train")}
    tables, images = {}, {}
    for number, source in enumerate(args.sources):
        name, task = f"{number} {source['path']}", source.get("task", "caption")
        if task not in TASKS:
            raise ValueError(f"The source {source['path']} has the task {task!r}: use one of {', '.join(TASKS)}.")
        fields = {key: value for key, value in source.items() if key != "task"}
        load = load_source if args.report is None else load_unchecked
        images[name] = load(question_source(fields) if task == "vqa" else DataSource(**fields))
        tables[name] = TASKS[task](images[name], name, seed, report=args.report)
    table = mix_by_sqrt(tables, seed, args.train_rows)
    return table if args.report is None else InstructionRows(table, images, args.report), images


def main(
    model_args: InstructBlipModelArguments, data_args: InstructBlipDataArguments, training_args: VlmSFTConfig
) -> None:
    """Trains; on the built-in data, evaluates the model too."""
    run = Run("instructblip_finetune", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args, training_args.bf16)

    # DATA
    size = processor.image_processor.size["height"]
    train, images = build_data(data_args, size, training_args.seed)
    features = None
    if data_args.feature_cache is not None:  # one cache a source; the first is shared with the stages before
        tower, features = base_of(model).body.vision_model, {}
        for number, (name, rows) in enumerate(images.items()):
            folder = f"{data_args.feature_cache}-{number}" if number else data_args.feature_cache
            key = {"source": data_args.sources[number] if data_args.sources else name}
            features[name] = open_features(folder, rows, processor, tower, key, training_args)

    # TRAIN
    trainer = VlmSFTTrainer(
        model,
        training_args,
        train_dataset=train,
        data_collator=PromptCollator(processor, images, features, model_args.max_text_length, with_qformer=True),
        processing_class=processor,
    )
    run.train(trainer)
    saved = save_trained(trainer)
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, saved, processor, data_args.num_scenes, size)
    finish_run(trainer, "instructblip_finetune", model_args, data_args, has_easy_vqa=True)


if __name__ == "__main__":
    launch(main)
