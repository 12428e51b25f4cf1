"""BLIP pretraining (arXiv 2201.12086): contrastive, matching and language-modelling losses in one step.

A laptop, about 75 minutes on two cores, on scenes of the built-in pictures, after `clip_pretrain.py` (whose image tower
it begins with):

    python recipes/blip_pretrain.py --config recipes/blip_pretrain/small.yaml

The published recipe on several GPUs, on your own shards:

    torchrun --nproc_per_node 8 recipes/blip_pretrain.py --config recipes/blip_pretrain/paper.yaml

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). A stopped run continues when started again.
"""

from dataclasses import dataclass, field

from transformers import EvalPrediction, set_seed
from trl import TrlParser

from hf_vlm import VlmBlipForPreTraining, VlmBlipProcessor, VlmTowerConfig, VlmTowerModel
from hf_vlm.data import (
    Augmentation,
    CaptionCollator,
    PairDataset,
    PairStream,
    SceneRows,
    SceneStream,
    load_pairs,
    resolve_part,
)
from hf_vlm.evaluation import retrieval_metrics
from hf_vlm.evaluation.test_sets import save_scene_report
from hf_vlm.models import BLIP_VISION
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import BlipTrainer, BlipTrainingArguments, last_checkpoint

AUGMENTATIONS = {
    "blip": Augmentation.blip(),
    "photo": Augmentation.photo(),
    "scene": Augmentation.scene(),
    "none": None,
}


@dataclass
class ModelArguments:
    """The image tower, the BERT that the text transformers begin as, and the objectives."""

    vision: str | None = field(default=None, metadata={"help": "Hub id, folder or wheel:NAME of a vision encoder."})
    vision_config: dict | None = field(default=None, metadata={"help": "Fields of VlmTowerConfig for a new one."})
    text: str = field(default="google-bert/bert-base-uncased", metadata={"help": "The same of a BERT."})
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    resize_mode: str = field(default="squash", metadata={"help": "crop, squash or pad."})
    max_text_length: int = field(default=30, metadata={"help": "Longest caption in tokens."})
    projection_dim: int = field(default=256, metadata={"help": "Size of the shared embedding."})
    queue_size: int = field(default=57600, metadata={"help": "Embeddings of earlier steps to contrast with."})
    momentum: float = field(default=0.995, metadata={"help": "Decay of the averaged encoders."})
    soft_target_weight: float = field(default=0.4, metadata={"help": "Their share of the contrastive targets."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the text; the BERT's own by default."})
    itc_weight: float = field(default=1.0, metadata={"help": "Weight of the contrastive loss; 0 leaves it out."})
    itm_weight: float = field(default=1.0, metadata={"help": "The same of the matching loss."})
    lm_weight: float = field(default=1.0, metadata={"help": "The same of the language-modelling loss."})


@dataclass
class DataArguments:
    """Where the pairs come from."""

    sources: list[dict] | None = field(
        default=None, metadata={"help": "Data sources (path, split, columns, ...); none: scenes of built-in pictures."}
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "The same for evaluation while training."})
    mix: str = field(default="size", metadata={"help": "Mix sources by their size or its square root (sqrt)."})
    on_error: str = field(default="raise", metadata={"help": "raise or skip broken images."})
    augmentation: str = field(default="blip", metadata={"help": "blip, photo, scene or none."})
    train_scenes: int = field(default=100_000, metadata={"help": "Scenes to train on."})
    max_words: int | None = field(default=None, metadata={"help": "Longest caption of a scene in words."})
    scene_size: int | None = field(default=None, metadata={"help": "Pixels of a scene's side; the tower's."})
    num_scenes: int = field(default=500, metadata={"help": "Scenes of each test set."})


def build_model(args: ModelArguments) -> tuple[VlmBlipForPreTraining, VlmBlipProcessor]:
    """The model on its pretrained parts, and its processor."""
    text = resolve_part(args.text)
    if args.vision is None:
        config = {**BLIP_VISION, "image_size": args.image_size, **(args.vision_config or {})}
        vision = VlmTowerModel(VlmTowerConfig(**config))
    else:
        vision = resolve_part(args.vision)
    fields = "projection_dim queue_size momentum soft_target_weight itc_weight itm_weight lm_weight".split()
    options = {name: getattr(args, name) for name in fields}
    model = VlmBlipForPreTraining.from_parts(vision, text, image_size=args.image_size, dropout=args.dropout, **options)
    size = {"height": args.image_size, "width": args.image_size}
    processor = VlmBlipProcessor.from_parts(text, args.max_text_length, size=size, resize_mode=args.resize_mode)
    return model, processor


def build_data(
    args: DataArguments, size: int, seed: int
) -> tuple[PairDataset | PairStream, PairDataset | PairStream | None]:
    """Pairs to train on, and pairs to watch the training with."""
    if args.sources is None:
        train = SceneRows(SceneStream("train", seed, size), args.train_scenes, args.max_words)
        validation = SceneRows(SceneStream("validation", seed + 1, size), 512, args.max_words)
        return PairDataset(train, seed), PairDataset(validation, shuffle_captions=False)
    train = load_pairs(args.sources, args.mix, seed, args.on_error)
    return train, load_pairs(args.eval_sources, shuffle_captions=False) if args.eval_sources else None


def recall(predictions: EvalPrediction) -> dict[str, float]:
    """Retrieval by embeddings within the validation pairs."""
    (image_embeds, text_embeds), ids = predictions.predictions, predictions.label_ids
    metrics = retrieval_metrics(image_embeds, text_embeds, ids, ids)
    return {name: value for name, value in metrics.items() if name.startswith(("text_to_image_r", "mean"))}


def main(model_args: ModelArguments, data_args: DataArguments, training_args: BlipTrainingArguments) -> None:
    """Model, data, train; then, on the built-in pictures, the test sets."""
    set_seed(training_args.seed)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    size = data_args.scene_size or model_args.image_size
    train, validation = build_data(data_args, size, training_args.seed)

    # TRAIN
    trainer = BlipTrainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionCollator(processor, AUGMENTATIONS[data_args.augmentation]),
        eval_collator=CaptionCollator(processor),
        processing_class=processor,
        compute_metrics=recall,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, model, processor, data_args.num_scenes, size)
    finish_run(trainer, "blip_pretrain", model_args, data_args)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, BlipTrainingArguments)).parse_args_and_config())
