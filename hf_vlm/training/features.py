"""Cached outputs of a frozen tower for training: computed once, then read from disk."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data.batches.collators import ContrastiveCollator
from ..data.batches.pairs import PairDataset, PairStream
from ..data.builtin.scenes import SceneRows
from ..data.features.cache import CachedFeatures, cache_features
from ..data.features.key import feature_key
from ..data.sources.rows import Rows
from ..models.freezing import is_frozen
from ..models.modeling_clip import VlmClipModel
from ..models.towers import tower_states


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
    """The frozen tower's hidden states of every row's image, read from a folder; missing ones are computed first.

    Args:
        folder: Folder of the cache.
        rows: Dicts with an `image`.
        processor: The model's processor, or its image processor.
        tower: The model's frozen image tower.
        data: Everything that decides the rows' images and their order, for the cache's key; not needed for scenes.
        model: Folder or Hub id of the tower, for information only.
        bf16: Compute in bfloat16.
        **options: Options of `cache_features`: `batch_size`, `num_workers`, `verify`.

    Raises:
        ValueError: if the rows are a stream: a stream has no row numbers.
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


@torch.no_grad()
def cache_text_features(
    model: VlmClipModel,
    processor: ProcessorMixin,
    captions: Iterable[str],
    batch_size: int = 256,
    bf16: bool = False,
) -> dict[str, torch.Tensor]:
    """Pooled outputs of the frozen text tower, by caption.

    Args:
        model: A model whose text tower is frozen (`lock_tower`).
        processor: The model's processor.
        captions: Texts; repeated ones are encoded once.
        batch_size: Texts per forward pass.
        bf16: Compute under bf16 autocast, as training in bf16 does.

    Returns:
        A float32 CPU tensor of shape `(hidden,)` by caption, for [`ContrastiveCollator`].

    Raises:
        ValueError: if the text tower is trainable: its outputs would change.
    """
    _require_locked(model, "text")
    # Sorted by length for less padding.
    unique = sorted(set(captions), key=lambda caption: (len(caption), caption))
    features: dict[str, torch.Tensor] = {}
    for start in tqdm(range(0, len(unique), batch_size), desc="Caching text features"):
        batch = unique[start : start + batch_size]
        tokens = processor(text=batch).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            pooled = model.text_pooled(tokens["input_ids"], tokens["attention_mask"]).float().cpu()
        features.update(zip(batch, pooled, strict=True))
    return features


@torch.no_grad()
def cache_vision_features(
    model: VlmClipModel, processor: ProcessorMixin, rows: Sequence[dict], batch_size: int = 64
) -> torch.Tensor:
    """Pooled outputs of the frozen image tower, for rows without augmentation.

    Args:
        model: A model whose image tower is frozen (`lock_tower`).
        processor: The model's processor.
        rows: Examples with `image` and `caption`.
        batch_size: Images per forward pass.

    Returns:
        A float32 CPU tensor of shape `(rows, hidden)`, for [`ContrastiveCollator`].

    Raises:
        ValueError: if the image tower is trainable.
    """
    _require_locked(model, "vision")
    collator = ContrastiveCollator(processor)
    loader = DataLoader(PairDataset(rows, shuffle_captions=False), batch_size, collate_fn=collator.images)
    batches = tqdm(loader, desc="Caching image features")
    return torch.cat([model.vision_pooled(batch["pixel_values"].to(model.device)).float().cpu() for batch in batches])


def _require_locked(model: VlmClipModel, name: str) -> None:
    if not is_frozen(model.vision_model if name == "vision" else model.text_model):
        raise ValueError(f"The {name} tower is trained, so its features cannot be cached: lock_tower({name!r}) first.")


__all__ = ["cache_text_features", "cache_vision_features", "cached_tower_features"]
