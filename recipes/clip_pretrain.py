"""CLIP pretraining (arXiv 2103.00020): two towers, symmetric contrastive loss over the global batch.

A laptop, on the built-in emoji images; several GPUs, on your own shards:

    hf-vlm recipes run clip_pretrain --config small
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.clip_pretrain --config paper

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). An interrupted run resumes when started again.
"""

from hf_vlm import VlmClipModel, VlmClipProcessor, VlmTextTowerConfig, VlmTextTowerModel, VlmTowerConfig, VlmTowerModel
from hf_vlm.data import ContrastiveCollator, PairDataset, PairStream, emoji_pairs, load_emoji, resolve_part
from hf_vlm.evaluation.test_sets import report_on_builtin_data
from hf_vlm.runs.arguments import ClipDataArguments, ClipModelArguments
from hf_vlm.runs.data import find_augmentation, own_pairs, recall
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.start import Run
from hf_vlm.training import ContrastiveTrainer, ContrastiveTrainingArguments, cache_text_features


def build_model(args: ClipModelArguments) -> tuple[VlmClipModel, VlmClipProcessor]:
    """Both towers, pretrained or new, and the processor that feeds them."""
    fields = {"image_size": args.image_size, **(args.vision_config or {})}
    vision = resolve_part(args.vision) if args.vision else VlmTowerModel(VlmTowerConfig(**fields))
    text_name = resolve_part(args.text or args.tokenizer or "openai/clip-vit-base-patch32")
    text = text_name if args.text else VlmTextTowerModel(VlmTextTowerConfig(**(args.text_config or {})))
    options = {"projection_dim": args.projection_dim, "loss_type": args.loss_type}
    model = VlmClipModel.from_parts(vision, text, logit_scale_init_value=args.logit_scale, **options)
    for tower in args.lock:
        model.lock_tower(tower)
    size = {"height": args.image_size, "width": args.image_size}
    images = {"size": size, "resize_mode": args.resize_mode}
    return model, VlmClipProcessor.from_parts(text_name, max_length=args.max_text_length, **images)


def build_data(args: ClipDataArguments, seed: int) -> tuple[PairDataset | PairStream, PairDataset | PairStream | None]:
    """Training pairs and validation pairs."""
    if args.sources is not None:
        return own_pairs(args, seed)
    splits = load_emoji()
    validation = PairDataset(emoji_pairs(splits["validation"], names_only=True), shuffle_captions=False)
    return PairDataset(emoji_pairs(splits["train"]), seed), validation


def main(
    model_args: ClipModelArguments, data_args: ClipDataArguments, training_args: ContrastiveTrainingArguments
) -> None:
    """Trains; on the built-in data, evaluates the model too."""
    run = Run("clip_pretrain", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    train, validation = build_data(data_args, training_args.seed)
    features = None
    if "text" in model_args.lock and data_args.sources is None:
        captions = (caption for pairs in (train, validation) for row in pairs.rows for caption in row["caption"])
        features = cache_text_features(model, processor, captions, bf16=training_args.bf16)
    augmentation = find_augmentation(data_args.augmentation)

    # TRAIN
    trainer = ContrastiveTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=ContrastiveCollator(processor, augmentation, features),
        eval_collator=ContrastiveCollator(processor, text_features=features),
        processing_class=processor,
        compute_metrics=recall,
    )
    run.train(trainer)
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        report_on_builtin_data(training_args.output_dir, data_args.num_scenes)
    finish_run(trainer, "clip_pretrain", model_args, data_args)


if __name__ == "__main__":
    launch(main)
