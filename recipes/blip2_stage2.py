"""BLIP-2, second stage (arXiv 2301.12597, section 3.3): the Q-Former's queries become the prompt of a frozen LLM.

A laptop, on the built-in scenes, after `blip2_stage1`; several GPUs, on your own shards:

    hf-vlm recipes run blip2_stage2 --config small
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.blip2_stage2 --config paper

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). An interrupted run resumes when started again.
"""

from transformers import AutoProcessor

from hf_vlm import VlmBlip2ForConditionalGeneration, VlmBlip2Processor
from hf_vlm.data import CaptionPromptCollator
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.runs.arguments import Blip2DataArguments, Blip2Stage2ModelArguments
from hf_vlm.runs.data import find_augmentation, open_features, open_pairs
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.start import Run
from hf_vlm.training import VlmTrainer, VlmTrainingArguments, open_language_model


def build_model(
    args: Blip2Stage2ModelArguments, bf16: bool
) -> tuple[VlmBlip2ForConditionalGeneration, VlmBlip2Processor]:
    """The first stage with an LLM behind it, and their processor."""
    language_model, tokenizer = open_language_model(args.language_model, dtype=args.torch_dtype(bf16))
    image_processor = AutoProcessor.from_pretrained(args.model).image_processor
    config = VlmBlip2ForConditionalGeneration.config_class.from_pretrained(args.model)
    num_queries = config.qformer_config.num_query_tokens
    has_encoder = language_model.config.is_encoder_decoder
    processor = VlmBlip2Processor.for_language_model(image_processor, tokenizer, num_queries, has_encoder)
    args.set_chat_template(processor)
    model = VlmBlip2ForConditionalGeneration.from_parts(args.model, language_model, processor.image_token_id)
    return model, processor


def main(
    model_args: Blip2Stage2ModelArguments, data_args: Blip2DataArguments, training_args: VlmTrainingArguments
) -> None:
    """Trains; on the built-in data, evaluates the model too."""
    run = Run("blip2_stage2", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args, training_args.bf16)

    # DATA
    size = processor.image_processor.size["height"]
    train, validation = open_pairs(data_args, size, training_args.seed, validation_rows=256)
    key = {"sources": data_args.sources, "mix": data_args.mix or "size", "seed": training_args.seed}
    tower = model.model.vision_model
    features = open_features(data_args.feature_cache, train, processor, tower, key, training_args)
    augmentation = find_augmentation(data_args.augmentation)
    texts = {
        "prompt": model_args.prompt,
        "is_encoder_decoder": model.model.language_model.config.is_encoder_decoder,
        "max_length": model_args.max_length,
    }

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
    run.train(trainer)
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, model, processor, data_args.num_scenes, size)
    finish_run(trainer, "blip2_stage2", model_args, data_args)


if __name__ == "__main__":
    launch(main)
