"""BLIP-2, first stage (arXiv 2301.12597, section 3.2): the Q-Former learns to read a frozen image tower.

A laptop, on the built-in scenes, after `clip_pretrain`; several GPUs, on your own shards:

    hf-vlm recipes run blip2_stage1 --config small
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.blip2_stage1 --config paper

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). An interrupted run resumes when started again.
"""

from hf_vlm import VlmBlip2ForPreTraining, VlmBlip2Processor
from hf_vlm.data import CaptionCollator, resolve_part
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.runs.arguments import Blip2DataArguments, Blip2Stage1ModelArguments
from hf_vlm.runs.data import find_augmentation, open_features, open_pairs, recall
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.start import Run
from hf_vlm.training import Blip2Trainer, VlmTrainingArguments


def build_model(args: Blip2Stage1ModelArguments) -> tuple[VlmBlip2ForPreTraining, VlmBlip2Processor]:
    """The model on its pretrained parts, and its processor."""
    vision, text = resolve_part(args.vision), resolve_part(args.text)
    fields = "dropout num_query_tokens cross_attention_frequency projection_dim itc_weight itm_weight lm_weight".split()
    options = {name: getattr(args, name) for name in fields}
    model = VlmBlip2ForPreTraining.from_parts(vision, text, image_size=args.image_size, **options)
    size = {"height": args.image_size, "width": args.image_size}
    return model, VlmBlip2Processor.from_parts(text, args.max_text_length, size=size, resize_mode=args.resize_mode)


def main(
    model_args: Blip2Stage1ModelArguments, data_args: Blip2DataArguments, training_args: VlmTrainingArguments
) -> None:
    """Trains; on the built-in data, evaluates the model too."""
    run = Run("blip2_stage1", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    train, validation = open_pairs(data_args, model_args.image_size, training_args.seed)
    key = {"sources": data_args.sources, "mix": data_args.mix or "size", "seed": training_args.seed}
    tower = model.model.vision_model
    features = open_features(data_args.feature_cache, train, processor, tower, key, training_args)
    augmentation = find_augmentation(data_args.augmentation)

    # TRAIN
    trainer = Blip2Trainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionCollator(processor, augmentation, vision_features=features),
        eval_collator=CaptionCollator(processor),
        processing_class=processor,
        compute_metrics=recall,
    )
    run.train(trainer)
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, model, processor, data_args.num_scenes, model_args.image_size)
    finish_run(trainer, "blip2_stage1", model_args, data_args)


if __name__ == "__main__":
    launch(main)
