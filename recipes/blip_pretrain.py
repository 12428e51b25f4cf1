"""BLIP pretraining (arXiv 2201.12086): contrastive, matching and language-modelling losses in one step.

A laptop, on the built-in scenes, after `clip_pretrain`; several GPUs, on your own shards:

    hf-vlm recipes run blip_pretrain --config small
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.blip_pretrain --config paper

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). An interrupted run resumes when started again.
"""

from hf_vlm import VlmBlipForPreTraining, VlmBlipProcessor, VlmTowerConfig, VlmTowerModel
from hf_vlm.data import CaptionCollator, resolve_part
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.models import BLIP_VISION
from hf_vlm.runs.arguments import BlipDataArguments, BlipModelArguments
from hf_vlm.runs.data import find_augmentation, open_pairs, recall
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.start import Run
from hf_vlm.training import BlipTrainer, BlipTrainingArguments


def build_model(args: BlipModelArguments) -> tuple[VlmBlipForPreTraining, VlmBlipProcessor]:
    """The model on its pretrained parts, and its processor."""
    new_tower = {**BLIP_VISION, "image_size": args.image_size, **(args.vision_config or {})}
    vision = resolve_part(args.vision) if args.vision else VlmTowerModel(VlmTowerConfig(**new_tower))
    text = resolve_part(args.text)
    fields = "projection_dim queue_size momentum soft_target_weight dropout itc_weight itm_weight lm_weight".split()
    options = {name: getattr(args, name) for name in fields}
    model = VlmBlipForPreTraining.from_parts(vision, text, image_size=args.image_size, **options)
    size = {"height": args.image_size, "width": args.image_size}
    return model, VlmBlipProcessor.from_parts(text, args.max_text_length, size=size, resize_mode=args.resize_mode)


def main(model_args: BlipModelArguments, data_args: BlipDataArguments, training_args: BlipTrainingArguments) -> None:
    """Trains; on the built-in data, evaluates the model too."""
    run = Run("blip_pretrain", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    size = data_args.scene_size or model_args.image_size
    train, validation = open_pairs(data_args, size, training_args.seed)

    # TRAIN
    trainer = BlipTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionCollator(processor, find_augmentation(data_args.augmentation)),
        eval_collator=CaptionCollator(processor),
        processing_class=processor,
        compute_metrics=recall,
    )
    run.train(trainer)
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, model, processor, data_args.num_scenes, size)
    finish_run(trainer, "blip_pretrain", model_args, data_args)


if __name__ == "__main__":
    launch(main)
