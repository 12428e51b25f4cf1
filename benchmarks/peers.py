"""Imports of peers that need stubs. The benchmarks' output says where stubs were used."""

import enum
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

STUBBED_MODULES = ("transforms", "transforms.functional", "ops", "ops.misc")
STUBBED_CLASSES = {
    "transforms": "CenterCrop ColorJitter Compose Grayscale Normalize RandomResizedCrop Resize ToTensor".split(),
    "ops.misc": ["FrozenBatchNorm2d"],
}
DISCLOSURE = "open_clip: its image transforms are stubs, because torchvision is not installed; they are not timed."


def needs_stubs() -> bool:
    """Whether open_clip can be imported only with a stub for torchvision."""
    return importlib.util.find_spec("open_clip") is not None and importlib.util.find_spec("torchvision") is None


def import_open_clip() -> ModuleType:
    """Imports open_clip; without torchvision, empty classes replace its image transforms.

    The models and losses of open_clip use nothing of torchvision. The stand-in is taken away again after the import.

    Raises:
        ImportError: if open_clip or another package that it imports is not installed.
    """
    if not needs_stubs():
        return importlib.import_module("open_clip")
    stubs = _torchvision_stubs()
    sys.modules.update(stubs)
    try:
        return importlib.import_module("open_clip")
    finally:
        for name in stubs:
            del sys.modules[name]


def _torchvision_stubs() -> dict[str, ModuleType]:
    stubs = {name: ModuleType(name) for name in ("torchvision", *(f"torchvision.{name}" for name in STUBBED_MODULES))}
    for name, stub in stubs.items():
        stub.__path__ = []
        stub.__spec__ = ModuleSpec(name, None, is_package=True)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    for module, names in STUBBED_CLASSES.items():
        for name in names:
            setattr(stubs[f"torchvision.{module}"], name, type(name, (), {}))
    modes = enum.Enum("InterpolationMode", ["NEAREST", "BILINEAR", "BICUBIC"])
    stubs["torchvision.transforms"].InterpolationMode = modes
    return stubs
