"""A checkpoint with missing, left-over or wrongly shaped weights is refused by whoever loads it for inference."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPModel, Dinov2Config, Dinov2ForImageClassification

from cases import tiny
from cases.table import CASES
from hf_vlm.bootstrap.filter import load_filter
from hf_vlm.checkpoints import load_complete
from hf_vlm.evaluation.tasks import load_checkpoint
from hf_vlm.hub.convert import from_transformers
from hf_vlm.hub.push import copy_with_code
from hf_vlm.search.identity import load_model
from hf_vlm.search.open import open_index
from hf_vlm.training.cache_tower import load_vision

State = dict[str, torch.Tensor]


def clip(folder: Path) -> Path:
    tiny.clip_model().save_pretrained(folder)
    tiny.clip_processor().save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[State], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def lose(state: State) -> None:
    del state["vision_model.encoder.layers.0.mlp.fc1.weight" if NATIVE in state else OWN]


def add(state: State) -> None:
    state["vision_model.stranger.weight"] = torch.ones(2)


def reshape(state: State) -> None:
    name = NATIVE if NATIVE in state else OWN
    state[name] = torch.ones(3, 5)


OWN = "vision_model.layers.0.mlp.fc1.weight"
NATIVE = "vision_model.encoder.layers.0.mlp.fc1.weight"
DAMAGES = {"missing": lose, "unexpected": add, "wrong shape": reshape}


def index_with(folder: Path) -> object:
    """Opens an index that names the checkpoint."""
    from hf_vlm.search import EmbeddingIndex

    pytest.importorskip("lancedb")
    EmbeddingIndex.create(folder / "index", tiny.clip_model(), tiny.clip_processor())
    return open_index(str(folder / "index"), str(folder))


LOADERS: dict[str, Callable[[Path], object]] = {
    "evaluate": lambda folder: load_checkpoint(str(folder)),
    "index build": lambda folder: load_model(str(folder)),
    "index search": index_with,
    "cache-features": lambda folder: load_vision(str(folder), None),
    "bootstrap": lambda folder: load_filter(str(folder)),
    "push with code": lambda folder: copy_with_code(folder, {"architectures": ["VlmClipModel"]}, folder / "copy"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("loader", LOADERS)
def test_made_up_weights_are_refused(loader: str, damage: str, tmp_path: Path) -> None:
    edit(clip(tmp_path), DAMAGES[damage])
    name = "stranger" if damage == "unexpected" else r"layers\.0\.mlp\.fc1\.weight"
    with pytest.raises(ValueError, match=rf"The weights of .* do not match the model; {damage}: .*{name}") as caught:
        LOADERS[loader](tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", ["evaluate", "index build", "cache-features", "push with code"])
def test_complete_checkpoints_are_loaded(loader: str, tmp_path: Path) -> None:
    LOADERS[loader](clip(tmp_path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_conversion_uses_the_same_check(damage: str, tmp_path: Path) -> None:
    CLIPModel(tiny.native_clip_config()).save_pretrained(tmp_path)
    edit(tmp_path, DAMAGES[damage])
    with pytest.raises(ValueError, match=f"do not match the model; {damage}"):
        from_transformers(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_every_saved_model_is_complete(case: str, tmp_path: Path) -> None:
    """Tied weights and buffers that are not saved are not missing."""
    model = CASES[case].build()
    model.save_pretrained(tmp_path)
    loaded = load_complete(type(model), tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_cache_asks_only_for_the_tower(tmp_path: Path) -> None:
    """A lost text weight does not touch the features; a lost layer of the tower does."""
    edit(clip(tmp_path), lambda state: state.pop("text_projection.weight"))
    load_vision(str(tmp_path), None)
    with pytest.raises(ValueError, match="do not match"):
        load_checkpoint(str(tmp_path))


def test_a_tower_of_a_classifier_is_complete(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    load_complete(AutoModel, tmp_path, unread=("classifier.",))
    tiny.clip_processor().image_processor.save_pretrained(tmp_path)
    load_vision(str(tmp_path), None)
    edit(tmp_path, lambda state: state.pop("dinov2.encoder.layer.1.mlp.fc1.weight"))
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1\.mlp\.fc1\.weight"):
        load_vision(str(tmp_path), None)


def test_deeper_towers_than_the_config_says_are_refused(tmp_path: Path) -> None:
    edit(clip(tmp_path), lambda state: state.update({OWN.replace("layers.0", "layers.9"): state[OWN].clone()}))
    with pytest.raises(ValueError, match=r"unexpected: vision_model\.layers\.9"):
        load_vision(str(tmp_path), None)
