"""LLaVA, second stage (arXiv 2304.08485, section 4.2; 2310.03744, section 3): visual instruction tuning, with TRL.

A laptop, on conversations about the built-in scenes and on easy-VQA, after `llava_align`; several GPUs, on your own
conversations (LLaVA 1.0, 1.5 in full or with LoRA, 1.6):

    hf-vlm recipes run llava_instruct --config small
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.llava_instruct --config paper_1.5

The stage says which parts are trained, in full or with LoRA (`--stage llava-1.5-lora`). Its learning rates hold unless
`learning_rates` in the YAML overrides them. Every scalar key of the YAML is also an option. An interrupted run resumes
when started again.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.data import ConcatDataset
from transformers import AutoProcessor

from hf_vlm import VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.data import (
    ConversationCollator,
    QuestionConversations,
    SceneConversations,
    easy_vqa_images,
    easy_vqa_questions,
    open_conversations,
)
from hf_vlm.evaluation.test_sets import AFTER_TRAINING, save_scene_report
from hf_vlm.runs.arguments import LlavaInstructDataArguments, LlavaInstructModelArguments
from hf_vlm.runs.data import scene_rows
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.start import Run
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, apply_stage, save_trained, stage_named


def build_model(args: LlavaInstructModelArguments) -> tuple[VlmLlavaForConditionalGeneration, VlmLlavaProcessor]:
    """The first stage and its processor."""
    model = VlmLlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.model)
    if args.attn_implementation is not None:
        model.body.language_model.set_attn_implementation(args.attn_implementation)
    args.set_chat_template(processor)
    return model, processor


def build_data(args: LlavaInstructDataArguments, size: int, seed: int, check: Callable | None = None) -> ConcatDataset:
    """The conversations of all sources, one source after the other; the trainer shuffles them."""
    if args.sources is not None:
        options = {"on_error": args.on_error, "report": args.report, "check": check}
        return ConcatDataset([open_conversations(source, **options) for source in args.sources])
    scenes = SceneConversations(scene_rows(args, size, seed, args.scene_aspects), seed, args.scene_kinds)
    return ConcatDataset([scenes, QuestionConversations(easy_vqa_questions("train"), easy_vqa_images("train"))])


def main(
    model_args: LlavaInstructModelArguments, data_args: LlavaInstructDataArguments, training_args: VlmSFTConfig
) -> None:
    """Trains; on the built-in data, evaluates the model too."""
    run = Run("llava_instruct", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args)
    stage = stage_named(model_args.stage).with_rates(training_args.learning_rates)
    stage = stage.with_lora(model_args.lora_r, model_args.lora_dropout)
    training_args.learning_rates = dict(stage.rates)
    model = apply_stage(model, stage)

    # DATA
    size = data_args.scene_size or processor.image_processor.size["height"]
    collator = ConversationCollator(processor, data_args.max_tokens, data_args.packed, data_args.row_tokens)
    train = build_data(data_args, size, training_args.seed, collator.check)

    # TRAIN
    trainer = VlmSFTTrainer(
        model,
        training_args,
        train_dataset=train,
        data_collator=collator,
        processing_class=processor,
    )
    run.train(trainer)
    saved = save_trained(trainer)
    if data_args.sources is None and trainer.is_world_process_zero():
        settings = replace(AFTER_TRAINING, max_questions=data_args.num_questions, bf16=training_args.bf16)
        options = {"aspects": data_args.scene_aspects, "beside": {"lora": data_args.lora_run}}
        save_scene_report(training_args.output_dir, saved, processor, data_args.num_scenes, size, settings, **options)
    finish_run(trainer, "llava_instruct", model_args, data_args, has_easy_vqa=True)


if __name__ == "__main__":
    launch(main)
