"""Cached features of a frozen tower for training: computed when first asked for, then read from disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.batches.pairs import PairStream, Rows
from ..data.builtin.scene_rows import SceneRows
from ..data.features.cache import CachedFeatures, cache_features
from ..data.features.key import feature_key
from ..models.modeling_blip2 import tower_states


def cached_tower_features(
    folder: str | Path,
    rows: Rows | PairStream,
    processor: Any,
    tower: PreTrainedModel,
    data: Mapping[str, Any] | None = None,
    model: str = "",
    bf16: bool = False,
    **options,
) -> CachedFeatures:
    """What BLIP-2's Q-Former reads of every row's image, from a folder that is filled where it is not yet.

    Args:
        folder: Of the cache.
        rows: Dicts with an `image`.
        processor: The model's, or its image processor.
        tower: Its frozen image tower.
        data: All that decides which pictures the rows have, and in which order, for the cache's key; scenes know it.
        model: Where the tower came from, to be read by people.
        bf16: Compute in bfloat16.
        **options: As of `cache_features`: `batch_size`, `num_workers`, `verify`.

    Raises:
        ValueError: if the rows are a stream, which has no numbers to find features by.
        FeatureCacheError: if the folder holds features of another tower, preprocessing or data.
    """
    if isinstance(rows, PairStream):
        raise ValueError(f"A stream has no row numbers to cache features by: leave out {folder}, or streaming.")
    tower = tower.eval()

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tower.device.type, torch.bfloat16, enabled=bf16):
            return tower_states(tower, pixel_values.to(tower.device))

    named = rows.key if isinstance(rows, SceneRows) else dict(data or {})
    key = feature_key(tower, processor, {**named, "rows": len(rows)}, model)
    return cache_features(folder, rows, processor, encode, key, **options)


__all__ = ["cached_tower_features"]
