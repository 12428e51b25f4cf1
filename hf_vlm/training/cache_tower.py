"""`hf-vlm cache-features`: a frozen image tower's outputs for a dataset, computed once."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from ..checkpoints import load_complete, read_config
from ..data.builtin.table import BuiltinOptions, find_builtin
from ..data.features.cache import CachedFeatures
from ..data.sources.load import load_source
from ..data.sources.open import DataSource
from ..data.sources.rows import Rows
from ..models.towers import copy_vision_tower, load_tower
from .features import cached_tower_features

# Layers of classifiers, which `AutoModel` leaves out of a checkpoint of a tower.
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "fc.", "head", "lm_head.", "decoder.")


def cache_tower(
    model: str,
    output: Path,
    data: str,
    split: str = "train",
    seed: int = 0,
    limit: int = 0,
    image_size: int | None = None,
    columns: str = "",
    bf16: bool = False,
    batch_size: int = 128,
    workers: int = 0,
    verify: bool = False,
) -> CachedFeatures:
    """The cache behind `hf-vlm cache-features`; see the command's help for the arguments.

    Raises:
        ValueError: if the checkpoint has no image tower, the tower does not support `image_size`, the data cannot be
            read, or the folder holds another cache.
    """
    tower, processor = load_vision(model, image_size)
    rows, named = open_rows(data, split, seed, limit, columns, processor.size.get("height", 224))

    options = {"batch_size": batch_size, "num_workers": workers, "verify": verify}
    return cached_tower_features(output, rows, processor, tower, named, model, bf16, **options)


def load_vision(model: str, image_size: int | None) -> tuple[PreTrainedModel, Any]:
    """Image tower (in eval mode, on the GPU if there is one) and image processor of a checkpoint.

    Raises:
        ValueError: if there is no image tower, or tower or processor does not support `image_size`.
    """
    config = read_config(model)
    part = "vision_model." if "vision_config" in config.to_dict() else ""
    unread = (f"{part}pooler.", f"{part}head.", *(() if part else HEADS))  # features are the states of the patches
    tower = load_tower(load_complete(AutoModel, model, part, unread, dtype=torch.float32), "vision", {})
    if tower.main_input_name != "pixel_values":
        raise ValueError(
            f"{model} is a {tower.config.model_type} model, which does not read images: name an image encoder."
        )
    processor = AutoImageProcessor.from_pretrained(model)
    if image_size is not None:
        if "height" not in processor.size:
            raise ValueError(f"{model} sizes images by {', '.join(dict(processor.size))}: leave out --image-size.")
        processor.size = {"height": image_size, "width": image_size}
        tower = copy_vision_tower(tower, None, image_size)
    return tower.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def open_rows(data: str, split: str, seed: int, limit: int, columns: str, size: int) -> tuple[Rows, dict[str, Any]]:
    """Rows with images, and their entry in the cache's key.

    Raises:
        ValueError: if the number of scenes is missing, or the data cannot be read.
    """
    if (builtin := find_builtin(data)) is not None:
        options = BuiltinOptions(split, seed, builtin.fit(size), limit)
        return builtin.images(options), builtin.key(options)
    mapping = dict(item.split("=", 1) for item in columns.split(",")) if columns else {}
    rows = load_source(DataSource(data, split=split, columns=mapping))
    if 0 < limit < len(rows):
        rows = rows.select(range(limit))
    return rows, {"path": data, "split": split, "columns": mapping}


def summary(output: Path, features: CachedFeatures) -> str:
    """One line about the contents of a cache."""
    shape = f"{features.num_rows} rows of {features.tokens} x {features.width}"
    return f"{output}: {shape} in bfloat16, {features.nbytes / 1e6:.1f} MB"


__all__ = ["cache_tower", "load_vision", "open_rows", "summary"]
