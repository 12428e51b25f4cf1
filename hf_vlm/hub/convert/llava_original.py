"""LLaVA from the layout of its own code (haotian-liu/LLaVA), which stores projector and image tower inside the LLM.

- Every checkpoint has the projector. Full checkpoints have the LLM. The image tower is stored only if it was trained
  (1.6). A part is stored completely or not at all; a missing part keeps the weights of `base`.
- The original code has no embedding row for its image placeholder. Rows of embeddings and head past the checkpoint's
  vocabulary keep their values too.
- All checks come first. Then the weights are copied in place into views of the model's tensors, which avoids a third
  copy of the LLM in memory.
- Settings that are not in the tensors come from the base or the config: feature layer, activations, heads, grids.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...checkpoints import check_keys
from ...models.configuration_llava import VlmLlavaConfig
from ...models.modeling_llava import VlmLlavaForConditionalGeneration
from .clip import QKV, SAME_NAMES, VISION_NAMES
from .llava import OWN_TOWER, tower_only
from .state_dict import Names, StateDict, prefixed, read_state_dict, rename, split

PROJECTOR, NEWLINE = "model.mm_projector.", "model.image_newline"
TOWER = "model.vision_tower.vision_tower.vision_model."
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that earlier versions of transformers saved with the weights.
BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
# The first of these files, or of their indices, in a folder is read.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "mm_projector.bin")
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
LORA_PREFIX = "base_model."
ADDED_WORDS = 2  # <im_start> and <im_end>
OWNER = "this LLaVA checkpoint"


def is_llava(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensor names belong to a LLaVA, or to its projector alone, in this layout."""
    return any("mm_projector." in name for name in state_dict)


def read_folder(folder: Path) -> StateDict:
    """The tensors of a folder, from `model.safetensors`, `pytorch_model.bin` or `mm_projector.bin`.

    The first file found is read. The first two may be sharded, with an index.

    Raises:
        ValueError: if there is no such file, a shard is missing, a file cannot be read, or the folder holds LoRA
            adapters.
    """
    if any((folder / name).exists() for name in LORA_FILES):
        raise ValueError(f"{folder} holds LoRA weights: merge them into the LLM with LLaVA's own code first.")
    state_dict: StateDict = {}
    for path in _weight_files(folder):
        state_dict |= read_state_dict(path)
    return state_dict


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            return _parts(index)
    raise ValueError(
        f"{folder} holds no weights; expected one of {', '.join(WEIGHT_FILES)} (the first two may be sharded)."
    )


def _parts(index: Path) -> list[Path]:
    """The files that an index lists; they must be in the index's folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weight files: replace it.") from error
    if outside:
        raise ValueError(f"{index} lists {outside[0]}, but only files in the folder of the index are read.")
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise ValueError(f"{index.parent} lacks {missing[0]}, which {index.name} lists: download the missing file.")
    return [index.parent / name for name in names]


def from_original(
    state_dict: Mapping[str, torch.Tensor],
    config: VlmLlavaConfig | None,
    base: PreTrainedModel | None,
) -> VlmLlavaForConditionalGeneration:
    """See [`hf_vlm.hub.convert.from_original`].

    Raises:
        ValueError: if a part is in neither the checkpoint nor a base, projector or vocabulary differ from the
            model's, or tensors do not fit. A base is unchanged then.
    """
    if any(name.startswith(LORA_PREFIX) for name in state_dict):
        raise ValueError("The weights are LoRA weights: merge them into the LLM with LLaVA's own code first.")
    weights = {name: tensor for name, tensor in state_dict.items() if not name.endswith(BUFFERS)}
    model = _new_model(weights, config) if base is None else base
    if not isinstance(model, VlmLlavaForConditionalGeneration):
        raise ValueError(f"base is a {type(model).__name__}; it must be a VlmLlavaForConditionalGeneration.")
    if base is not None and config is not None:
        raise ValueError("Both config and base were given, but base already has a config: pass only one of them.")
    _check_projector(weights, model.config)
    targets = targets_of(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    _check_tensors(weights, targets, tied)
    _check_words(weights, targets, tied)
    with torch.no_grad():
        for name, tensor in weights.items():
            targets[name][: len(tensor)].copy_(tensor)
    return model.eval()


def _new_model(weights: StateDict, config: VlmLlavaConfig | None) -> VlmLlavaForConditionalGeneration:
    """A new model for weights that have every part."""
    lacking = [part for part in ("image tower", "LLM") if part not in _parts_of(weights)]
    if lacking:
        raise ValueError(
            f"This LLaVA checkpoint lacks the {' and '.join(lacking)}: pass base=VlmLlavaForConditionalGeneration."
            f'from_parts(tower, llm, projector_type="{_projector_type(weights)}").'
        )
    if config is None:
        raise ValueError(
            "The tensors of a LLaVA do not determine its attention heads and activations: pass a config or a base."
        )
    return VlmLlavaForConditionalGeneration(config)


def targets_of(model: VlmLlavaForConditionalGeneration) -> StateDict:
    """The model's own tensors (or views of them) under the original names."""
    config = model.config
    own_tower, linear = config.vision_config.model_type == OWN_TOWER, config.projector_type == "linear"
    names: Names = (
        *prefixed("model.vision_model.", TOWER, VISION_NAMES if own_tower else SAME_NAMES),
        ("model.projector.newline", NEWLINE),
        ("model.projector.linear_1.*", f"{PROJECTOR}*" if linear else f"{PROJECTOR}0.*"),
        ("model.projector.linear_2.*", f"{PROJECTOR}2.*"),
        ("model.language_model.*", "*"),
    )
    tower, rest = tower_only(rename(model.state_dict(), names), TOWER)
    return {**(split(tower, QKV, "qkv_proj") if own_tower else tower), **rest}


def _part_of(name: str) -> str:
    if name.startswith(TOWER):
        return "image tower"
    return "projector" if name == NEWLINE or name.startswith(PROJECTOR) else "LLM"


def _parts_of(names: Iterable[str]) -> set[str]:
    """The parts of a checkpoint. Embeddings saved with a projector do not count as an LLM."""
    return {_part_of(name) for name in names if name != WORDS} | {"projector"}


def _projector_type(weights: StateDict) -> str:
    return "linear" if f"{PROJECTOR}weight" in weights else "mlp"


def _check_projector(weights: StateDict, config: VlmLlavaConfig) -> None:
    found, expected = _projector_type(weights), config.projector_type
    if found != expected:
        raise ValueError(
            f'The checkpoint\'s projector is "{found}", but the model\'s is "{expected}": set projector_type="{found}".'
        )
    if NEWLINE in weights and config.image_grid_pinpoints is None:
        raise ValueError(
            "The checkpoint has an image newline, but the model does not use tiles: set image_grid_pinpoints, or "
            f'remove {NEWLINE} from the tensors if the checkpoint\'s config has mm_patch_merge_type="flat".'
        )
    if NEWLINE not in weights and config.image_grid_pinpoints is not None:
        raise ValueError(
            "The checkpoint has no image newline, but the model uses tiles: leave out image_grid_pinpoints, or add "
            f"{NEWLINE} to the tensors."
        )


def _check_tensors(weights: StateDict, targets: StateDict, tied: bool) -> None:
    """Checks names and shapes; the checkpoint may have fewer tokens than the model has rows."""
    parts = _parts_of(weights.keys() & targets.keys())
    missing = [name for name in targets if _part_of(name) in parts and name not in weights]
    mismatched = []
    for name in targets.keys() & weights.keys():
        found, expected = weights[name].shape, targets[name].shape
        first = int(name in (WORDS, HEAD))
        if len(found) != len(expected) or found[first:] != expected[first:]:
            mismatched.append(f"{name} {tuple(found)} instead of {tuple(expected)}")
    unexpected = list(weights.keys() - targets.keys())
    check_keys(OWNER, [name for name in missing if not (tied and name == HEAD)], unexpected, mismatched)
    if any(targets[name].is_meta for name in weights):
        raise ValueError("The weights of base are offloaded: load its image tower and LLM without device_map.")


def _check_words(weights: StateDict, targets: StateDict, tied: bool) -> None:
    for name in (WORDS, HEAD):
        if name in weights and len(weights[name]) > len(targets[name]):
            count, rows = len(weights[name]), len(targets[name])
            raise ValueError(
                f"The checkpoint has {count} tokens, but the model has only {rows} rows of embeddings: build the "
                f"model with image_token_id={count}."
            )
    if "LLM" not in _parts_of(weights) and WORDS in weights and len(weights[WORDS]) == ADDED_WORDS:
        raise ValueError(
            f"{WORDS} has only the rows of the two added tokens: copy the rows into the embeddings of the LLM first."
        )
    if tied and HEAD in weights and not torch.equal(weights[HEAD], weights[WORDS]):
        raise ValueError(
            "The checkpoint's output layer differs from its embeddings, but the model's LLM ties the two: load the LLM "
            "with tie_word_embeddings=False."
        )


__all__ = ["from_original", "is_llava", "read_folder", "targets_of"]
