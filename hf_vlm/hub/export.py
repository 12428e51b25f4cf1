"""Checkpoints saved with their code: `trust_remote_code=True` loads them where hf_vlm is not installed."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_import_files

from ..families import heads
from ..files import write_text


def save_with_code(model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> None:
    """Saves model and processor together with the modules that define them.

    `AutoModel` then loads the base model. The head's own Auto class (`hf_vlm.families`) loads the head.

    Args:
        model: A model of this package.
        processor: Its processor.
        folder: Destination; created if it does not exist.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    auto_map = {"AutoConfig": reference(model.config), "AutoModel": reference(model.base_model)}
    head = heads().get(type(model).__name__)
    if head and head.auto_class:
        auto_map[head.auto_class] = reference(model)
    _edit_json(folder / "config.json", auto_map=auto_map)
    image_processor = {"AutoImageProcessor": reference(processor.image_processor)}
    with_code = {"AutoProcessor": reference(processor), **image_processor}
    _edit_json(folder / "processor_config.json", auto_map=with_code)
    for part in (model, model.base_model, model.config, processor, processor.image_processor):
        file = inspect.getfile(type(part))
        for module in (file, *get_relative_import_files(file)):
            shutil.copy(module, folder)


def reference(part: object) -> str:
    """The class of an object as written in `auto_map`, such as `modeling_clip.VlmClipModel`."""
    return f"{type(part).__module__.rsplit('.', 1)[-1]}.{type(part).__name__}"


def _edit_json(path: Path, **entries: Any) -> None:
    """Adds entries to a JSON file; a nested image processor gets the same `auto_map`."""
    content = json.loads(path.read_text()) | entries
    if "image_processor" in content:
        content["image_processor"]["auto_map"] = entries["auto_map"]
    write_text(path, json.dumps(content, indent=2) + "\n")


__all__ = ["save_with_code"]
