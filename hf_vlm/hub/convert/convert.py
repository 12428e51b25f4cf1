"""Checkpoints of other layouts to ours and back: `from_transformers`, `to_transformers`, `from_original`.

- A conversion is exact or refused. A one-line error names the option without equivalent before any file is written.
- A checkpoint with missing or unexpected weights is refused too; transformers itself would only log a warning.
- `hf_vlm.families` says which module converts a model type or a processor. Each such module holds the name tables.
- The layout of an original checkpoint is recognised by its tensor names.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import transformers
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ...checkpoints import load_complete, read_config
from ...families import FAMILIES, Family, load_class
from . import blip2_original, blip_original, llava_original, open_clip
from .state_dict import read_state_dict


def _own_family(model_type: str, source: object) -> Family:
    """The family of one of our model types, if it can be converted."""
    own = {name: family for name, family in FAMILIES.items() if family.converter}
    if model_type not in own:
        raise _unknown(model_type, source, own)
    return own[model_type]


def _native_family(model_type: str, source: object) -> Family:
    """The family that a model type of transformers converts to."""
    native = {name: family for family in FAMILIES.values() for name in family.native_types}
    if model_type not in native:
        raise _unknown(model_type, source, native)
    return native[model_type]


def _unknown(name: str, source: object, known: Iterable[str]) -> ValueError:
    where = source if isinstance(source, str | Path) else "This object"
    return ValueError(f"{where} is of type {name}, which cannot be converted; supported types: {', '.join(known)}.")


def _converter(family: Family) -> ModuleType:
    return import_module(str(family.converter))


def _model_type(model_or_path: str | Path | PreTrainedModel) -> str:
    if isinstance(model_or_path, PreTrainedModel):
        return model_or_path.config.model_type
    return read_config(model_or_path).model_type


def _load(classes: Sequence[type[PreTrainedModel]], path: str | Path) -> PreTrainedModel:
    """The model of a folder or Hub id, as the class that its config names (by default the first one)."""
    names = read_config(path).architectures or [classes[0].__name__]
    by_name = {model_class.__name__: model_class for model_class in classes}
    if names[0] not in by_name:
        raise ValueError(
            f"{path} holds a {names[0]}, which cannot be converted; supported classes: {', '.join(by_name)}."
        )
    return load_complete(by_name[names[0]], path)


def _processor(path_or_processor: str | Path | ProcessorMixin) -> ProcessorMixin:
    if isinstance(path_or_processor, ProcessorMixin):
        return path_or_processor
    return AutoProcessor.from_pretrained(path_or_processor)


def from_transformers(model_or_path: str | Path | PreTrainedModel) -> PreTrainedModel:
    """Converts a model of transformers to ours; both give the same outputs.

    Args:
        model_or_path: A `CLIPModel`, a BLIP for captions, questions or retrieval, a BLIP-2 for generation or retrieval,
            an InstructBLIP, or a LLaVA (1.5, 1.6) for generation, or the folder or Hub id of one.

    Returns:
        [`VlmClipModel`] or the head of our BLIP, BLIP-2, InstructBLIP or LLaVA, in eval mode, with copies of the
            weights in their dtype.

    Raises:
        ValueError: if the architecture is another one, or the weights are not exactly those of its class.

    Example:
        ```python
        >>> model = from_transformers("openai/clip-vit-base-patch32")
        ```
    """
    family = _native_family(_model_type(model_or_path), model_or_path)
    if isinstance(model_or_path, str | Path):
        natives = [getattr(transformers, name) for head in family.heads for name in head.natives]
        model_or_path = _load(natives, model_or_path)
    return _converter(family).from_transformers(model_or_path)


def to_transformers(model_or_path: str | Path | PreTrainedModel) -> PreTrainedModel:
    """Converts our model to the equivalent class of transformers, for tools that support only native classes.

    Args:
        model_or_path: A [`VlmClipModel`] or a head of our BLIP, BLIP-2, InstructBLIP or LLaVA, or the folder or Hub id
            of one.

    Returns:
        `CLIPModel` or the class of BLIP, BLIP-2, InstructBLIP or LLaVA for the same task, in eval mode, with copies of
            the weights in their dtype.

    Raises:
        ValueError: if the architecture is another one, or an option has no equivalent in transformers, such as another
            text encoder, mean pooling, the sigmoid loss or another layout of the image tower. The error names it.
    """
    family = _own_family(_model_type(model_or_path), model_or_path)
    if isinstance(model_or_path, str | Path):
        model_or_path = _load([load_class(head.name) for head in family.heads if head.natives], model_or_path)
    return _converter(family).to_transformers(model_or_path)


def processor_from_transformers(path_or_processor: str | Path | ProcessorMixin) -> ProcessorMixin:
    """Converts a processor of transformers to ours; both give the same pixels (for RGB images) and tokens.

    Args:
        path_or_processor: The processor of a model that [`from_transformers`] converts, or its folder or Hub id.

    Returns:
        Our processor of the same architecture.

    Raises:
        ValueError: if the processor is another one, or resizes images in a way that ours does not support.
    """
    processor = _processor(path_or_processor)
    name = type(processor).__name__
    known = {native: family for family in FAMILIES.values() for native in family.native_processors}
    if name not in known:
        raise _unknown(name, path_or_processor, known)
    return _converter(known[name]).processor_from_transformers(processor)


def processor_to_transformers(path_or_processor: str | Path | ProcessorMixin) -> ProcessorMixin:
    """The inverse of [`processor_from_transformers`].

    Args:
        path_or_processor: The processor of a model that [`to_transformers`] converts, or its folder or Hub id.

    Returns:
        The processor of transformers for the same architecture.

    Raises:
        ValueError: if the processor is another one, or resizes images in a way that transformers' does not support.
    """
    processor = _processor(path_or_processor)
    name = type(processor).__name__
    known = {family.processor: family for family in FAMILIES.values() if family.converter and family.processor}
    if name not in known:
        raise _unknown(name, path_or_processor, known)
    return _converter(known[name]).processor_to_transformers(processor)


def from_original(
    state_dict_or_path: Mapping[str, torch.Tensor] | str | Path,
    config: PreTrainedConfig | None = None,
    hidden_act: str | None = None,
    image_size: int | None = None,
    base: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Converts weights in the layout of an original repository to our model.

    Layouts: open_clip and OpenAI's CLIP, BLIP (also in LAVIS), BLIP-2's first stage in LAVIS, and LLaVA.

    Args:
        state_dict_or_path: The tensors by name, or a `.safetensors`, `.pt`, `.pth` or `.bin` file (also a training
            checkpoint). For LLaVA also a folder with `model.safetensors`, `pytorch_model.bin` (both may be sharded) or
            `mm_projector.bin`. Pickles are read as plain tensors only.
        config: The config. Without it, the sizes are read from the tensors. Attention heads are then as wide as in the
            original code (64, except in ViT-H, ViT-g and ViT-bigG). LLaVA needs `config` or `base`.
        hidden_act: CLIP without a config: the activation, `"quick_gelu"` for OpenAI's weights and `"gelu"` for most
            others.
        image_size: BLIP only: new side of the images in pixels; position embeddings are interpolated.
        base: LLaVA only: a [`VlmLlavaForConditionalGeneration`] from `from_parts(tower, llm, ...)`. The weights of the
            checkpoint are copied into it in place. Its `image_token_id` must lie past the vocabulary of the
            checkpoint's tokenizer. LLaVA's code writes grids as `[width, height]`; `image_grid_pinpoints` here are
            `[height, width]`.

    Returns:
        [`VlmClipModel`], the matching head of BLIP or BLIP-2, or `base`, in eval mode. Weights are in float32; a base
        keeps its dtypes. A BLIP pretraining head has momentum encoders and queue unless `image_size` is given.

    Raises:
        ValueError: if the layout is unknown, CLIP's activation is missing or given twice, a LLaVA lacks a part and has
            no `base`, or tensors are missing, unexpected or of another shape. A `base` is unchanged then.
    """
    if isinstance(state_dict_or_path, str | Path):
        is_folder = Path(state_dict_or_path).is_dir()
        read = llava_original.read_folder if is_folder else read_state_dict
        state_dict_or_path = read(Path(state_dict_or_path))
    # DistributedDataParallel adds this prefix to every name.
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict_or_path.items()}
    if llava_original.is_llava(state_dict):
        return llava_original.from_original(state_dict, config, base)
    if base is not None:
        raise ValueError("base is only for weights in the layout of LLaVA's own code: leave base out.")
    if open_clip.is_open_clip(state_dict):
        return open_clip.from_original(state_dict, config, hidden_act)
    if blip2_original.is_blip2(state_dict):
        return blip2_original.from_original(state_dict, config)
    if blip_original.is_blip(state_dict):
        return blip_original.from_original(state_dict, config, image_size)
    names = ", ".join(list(state_dict)[:3])
    raise ValueError(
        f"Unknown layout of weights, with the tensors {names}, ...; supported: the original layouts of CLIP "
        "(open_clip, vision transformers only), BLIP, BLIP-2 and LLaVA."
    )


def convert_folder(src: str | Path, dst: str | Path, to: Literal["native", "hf_vlm"]) -> None:
    """Converts and saves the model and the processor of a checkpoint; writes nothing if either is refused.

    Args:
        src: Folder or Hub id of the checkpoint.
        dst: Folder to write; it must be new or empty.
        to: `"native"` for transformers' own classes, `"hf_vlm"` for ours.

    Raises:
        ValueError: if `dst` is not empty, or the checkpoint cannot be converted.
        OSError: if `src` is not a checkpoint with a processor.
    """
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} exists and is not an empty folder: choose a new or empty folder.")
    if to == "native":
        model, processor = to_transformers(src), processor_to_transformers(src)
    elif to == "hf_vlm":
        model, processor = from_transformers(src), processor_from_transformers(src)
    else:
        raise ValueError(f"Unknown target {to!r}: choose native or hf_vlm.")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}-") as folder:
        unfinished = Path(folder) / dst.name
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if dst.exists():  # Windows cannot rename onto an existing folder
            dst.rmdir()
        unfinished.rename(dst)


__all__ = [
    "convert_folder",
    "from_original",
    "from_transformers",
    "processor_from_transformers",
    "processor_to_transformers",
    "to_transformers",
]
