"""BLIP-2, first stage (arXiv 2301.12597, section 3.2): the Q-Former learns to read a frozen image tower.

A laptop, about 25 minutes on two cores, on scenes of the built-in pictures, after `clip_pretrain.py` (whose image tower
it reads):

    python recipes/blip2_stage1.py --config recipes/blip2_stage1/small.yaml

The published recipe on several GPUs, on your own shards:

    torchrun --nproc_per_node 8 recipes/blip2_stage1.py --config recipes/blip2_stage1/paper.yaml

Every scalar key of the YAML is also an option (`--learning_rate 1e-4`). A stopped run continues when started again.
"""

from dataclasses import dataclass, field

from transformers import EvalPrediction, set_seed
from trl import TrlParser

from hf_vlm import VlmBlip2ForPreTraining, VlmBlip2Processor
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
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import Blip2Trainer, VlmTrainingArguments, cached_tower_features, last_checkpoint

AUGMENTATIONS = {"photo": Augmentation.photo(), "scene": Augmentation.scene(), "none": None}


@dataclass
class ModelArguments:
    """The frozen image tower, the BERT that the Q-Former begins as, and the objectives."""

    vision: str = field(default="openai/clip-vit-large-patch14", metadata={"help": "Hub id or folder of the tower."})
    text: str = field(default="google-bert/bert-base-uncased", metadata={"help": "Hub id, folder or wheel:NAME."})
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    resize_mode: str = field(default="squash", metadata={"help": "crop, squash or pad."})
    max_text_length: int = field(default=32, metadata={"help": "Longest caption in tokens."})
    num_query_tokens: int = field(default=32, metadata={"help": "How many queries the Q-Former has."})
    cross_attention_frequency: int = field(default=2, metadata={"help": "Queries look at the image every so often."})
    projection_dim: int = field(default=256, metadata={"help": "Size of the shared embedding."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the Q-Former; the BERT's by default."})
    itc_weight: float = field(default=1.0, metadata={"help": "Weight of the contrastive loss; 0 leaves it out."})
    itm_weight: float = field(default=1.0, metadata={"help": "The same of the matching loss."})
    lm_weight: float = field(default=1.0, metadata={"help": "The same of the generation loss."})


@dataclass
class DataArguments:
    """Where the pairs come from."""

    sources: list[dict] | None = field(
        default=None, metadata={"help": "Data sources (path, split, columns, ...); none: scenes of built-in pictures."}
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "The same for evaluation while training."})
    mix: str = field(default="size", metadata={"help": "Mix sources by their size or its square root (sqrt)."})
    on_error: str = field(default="raise", metadata={"help": "raise or skip broken images."})
    augmentation: str = field(default="photo", metadata={"help": "photo, scene or none."})
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder for the tower's features, computed once (without augmentation)."}
    )
    train_scenes: int = field(default=30_000, metadata={"help": "Scenes to train on."})
    max_words: int | None = field(default=None, metadata={"help": "Longest caption of a scene in words."})
    num_scenes: int = field(default=500, metadata={"help": "Scenes of each test set."})


def build_model(args: ModelArguments) -> tuple[VlmBlip2ForPreTraining, VlmBlip2Processor]:
    """The model on its pretrained parts, and its processor."""
    text = resolve_part(args.text)
    fields = "dropout num_query_tokens cross_attention_frequency projection_dim itc_weight itm_weight lm_weight".split()
    options = {name: getattr(args, name) for name in fields}
    model = VlmBlip2ForPreTraining.from_parts(resolve_part(args.vision), text, image_size=args.image_size, **options)
    size = {"height": args.image_size, "width": args.image_size}
    return model, VlmBlip2Processor.from_parts(text, args.max_text_length, size=size, resize_mode=args.resize_mode)


def build_data(
    args: DataArguments, image_size: int, seed: int
) -> tuple[PairDataset | PairStream, PairDataset | PairStream | None]:
    """Pairs to train on, and pairs to watch the training with."""
    if args.sources is None:
        train = SceneRows(SceneStream("train", seed, image_size), args.train_scenes, args.max_words)
        validation = SceneRows(SceneStream("validation", seed + 1, image_size), 512, args.max_words)
        return PairDataset(train, seed), PairDataset(validation, shuffle_captions=False)
    train = load_pairs(args.sources, args.mix, seed, args.on_error)
    return train, load_pairs(args.eval_sources, shuffle_captions=False) if args.eval_sources else None


def recall(predictions: EvalPrediction) -> dict[str, float]:
    """Retrieval by embeddings within the validation pairs; of an image's queries the nearest counts."""
    (image_embeds, text_embeds), ids = predictions.predictions, predictions.label_ids
    metrics = retrieval_metrics(image_embeds, text_embeds, ids, ids)
    return {name: value for name, value in metrics.items() if name.startswith(("text_to_image_r", "mean"))}


def main(model_args: ModelArguments, data_args: DataArguments, training_args: VlmTrainingArguments) -> None:
    """Model, data, train; then, on the built-in pictures, the test sets."""
    set_seed(training_args.seed)

    # MODEL
    model, processor = build_model(model_args)

    # DATA
    train, validation = build_data(data_args, model_args.image_size, training_args.seed)
    features = None
    if data_args.feature_cache is not None:
        rows = train if isinstance(train, PairStream) else train.rows
        data = {"sources": data_args.sources, "mix": data_args.mix, "seed": training_args.seed}
        options = {"bf16": training_args.bf16, "num_workers": training_args.dataloader_num_workers}
        tower = model.model.vision_model
        features = cached_tower_features(data_args.feature_cache, rows, processor, tower, data, **options)

    # TRAIN
    trainer = Blip2Trainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CaptionCollator(processor, AUGMENTATIONS[data_args.augmentation], vision_features=features),
        eval_collator=CaptionCollator(processor),
        processing_class=processor,
        compute_metrics=recall,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    trainer.save_model()
    if data_args.sources is None and trainer.is_world_process_zero():
        save_scene_report(training_args.output_dir, model, processor, data_args.num_scenes, model_args.image_size)
    finish_run(trainer, "blip2_stage1", model_args, data_args)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, VlmTrainingArguments)).parse_args_and_config())
