"""The data of a recipe: pairs for training and validation, built-in scenes, cached features of a frozen tower."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EvalPrediction, PreTrainedModel

from ..data.batches.augment import Augmentation
from ..data.batches.pairs import PairDataset, PairStream, load_pairs
from ..data.builtin.scenes import SceneRows, SceneStream
from ..data.features.cache import CachedFeatures
from ..data.sources.rows import Rows
from ..metrics.retrieval import retrieval_metrics
from ..training.arguments import VlmTrainingArguments
from ..training.features import cached_tower_features
from .arguments import Blip2DataArguments, BlipDataArguments, PairArguments, SceneArguments
from .catalogue import nearest

Pairs = PairDataset | PairStream
AUGMENTATIONS = {
    "blip": Augmentation.blip(),
    "crop": Augmentation(crop_scale=(0.9, 1.0), flip=0.0),  # CLIP's only augmentation
    "drawing": Augmentation.drawing(),
    "photo": Augmentation.photo(),
    "scene": Augmentation.scene(),
    "none": None,
}


def find_augmentation(name: str) -> Augmentation | None:
    """The augmentation that `augmentation` names in a YAML file; None for `none`.

    Raises:
        ValueError: if there is no augmentation of this name.
    """
    if name not in AUGMENTATIONS:
        names = ", ".join(AUGMENTATIONS)
        raise ValueError(f"There is no augmentation {name!r}; there are {names}.{nearest(name, AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


def scene_rows(args: SceneArguments, size: int, seed: int, aspects: Sequence[float] = (1.0,)) -> SceneRows:
    """The built-in scenes to train on.

    Args:
        args: Number of scenes and length of captions.
        size: Shorter side in pixels.
        seed: Decides the scenes.
        aspects: Aspect ratios (width / height).
    """
    return SceneRows(SceneStream("train", seed, size, aspects=aspects), args.train_scenes, args.max_words)


def validation_scenes(args: SceneArguments, size: int, seed: int, rows: int = 512) -> SceneRows:
    """The built-in scenes for validation during training; arguments as in [`scene_rows`]."""
    return SceneRows(SceneStream("validation", seed + 1, size), rows, args.max_words)


def own_pairs(args: PairArguments, seed: int) -> tuple[Pairs, Pairs | None]:
    """Training pairs from `sources`, and validation pairs from `eval_sources` (None without).

    Raises:
        ValueError: if a source is wrong.
    """
    train = load_pairs(
        args.sources or [],
        args.mix,  # type: ignore[arg-type]  # checked there
        seed,
        args.on_error,  # type: ignore[arg-type]  # checked there
        report=args.report,
    )
    return train, load_pairs(args.eval_sources, shuffle_captions=False) if args.eval_sources else None


def open_pairs(
    args: BlipDataArguments | Blip2DataArguments, size: int, seed: int, validation_rows: int = 512
) -> tuple[Pairs, Pairs | None]:
    """Training and validation pairs: the user's own, or the built-in scenes.

    Args:
        args: The recipe's data arguments.
        size: Side of a scene in pixels.
        seed: Decides the scenes and the order of captions.
        validation_rows: Number of scenes for validation.

    Raises:
        ValueError: if a source is wrong.
    """
    if args.sources is not None:
        return own_pairs(args, seed)
    validation = PairDataset(validation_scenes(args, size, seed, validation_rows), shuffle_captions=False)
    return PairDataset(scene_rows(args, size, seed), seed), validation


def open_features(
    folder: str | None,
    train: Pairs | Rows,
    processor: Any,
    tower: PreTrainedModel,
    key: Mapping[str, Any],
    training_args: VlmTrainingArguments,
) -> CachedFeatures | None:
    """The frozen tower's outputs for all training rows; missing ones are computed. None without a folder.

    Args:
        folder: Folder of the cache.
        train: Pairs, or rows with an `image`.
        processor: The model's processor.
        tower: The model's frozen image tower.
        key: Everything that decides the rows' images and their order.
        training_args: Arguments of the run.

    Raises:
        ValueError: if the rows are a stream, or the folder holds other features.
    """
    if folder is None:
        return None
    rows = train.rows if isinstance(train, PairDataset) else train
    options = {"bf16": training_args.bf16, "num_workers": training_args.dataloader_num_workers}
    return cached_tower_features(folder, rows, processor, tower, key, **options)


def recall(predictions: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the recipes: text-to-image recall and mean recall among the validation pairs.

    Args:
        predictions: `(image_embeds, text_embeds)` and the pair ids. Of an image's embeddings the nearest counts.
    """
    (image_embeds, text_embeds), ids = predictions.predictions, predictions.label_ids
    metrics = retrieval_metrics(image_embeds, text_embeds, ids, ids)
    return {name: value for name, value in metrics.items() if name.startswith(("text_to_image_r", "mean"))}


__all__ = [
    "AUGMENTATIONS",
    "find_augmentation",
    "open_features",
    "open_pairs",
    "own_pairs",
    "recall",
    "scene_rows",
    "validation_scenes",
]
