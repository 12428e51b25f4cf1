"""Cached features of a frozen tower for training: computed when first asked for, then read from disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..data.feature_cache import CachedFeatures, cache_features
from ..data.feature_key import feature_key
from ..data.pairs import Rows
from ..models.modeling_blip2 import tower_states


def cached_tower_features(
    folder: str | Path,
    rows: Rows,
    processor: ProcessorMixin,
    tower: PreTrainedModel,
    data: Mapping[str, Any],
    bf16: bool = False,
    num_workers: int = 0,
) -> CachedFeatures:
    """What BLIP-2's Q-Former reads of every row's image, from a folder that is filled where it is not yet.

    Args:
        folder: Of the cache.
        rows: Dicts with an `image`.
        processor: The model's.
        tower: Its frozen image tower.
        data: What names the rows, for the cache's key.
        bf16: Compute in bfloat16.
        num_workers: Processes that load pictures.

    Raises:
        FeatureCacheError: if the folder holds features of another tower, preprocessing or data.
    """
    tower = tower.eval()

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tower.device.type, torch.bfloat16, enabled=bf16):
            return tower_states(tower, pixel_values.to(tower.device))

    key = feature_key(tower, processor, {**data, "rows": len(rows)})
    return cache_features(folder, rows, processor, encode, key, num_workers=num_workers)


__all__ = ["cached_tower_features"]
