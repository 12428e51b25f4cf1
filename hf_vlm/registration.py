"""Lazy registration with transformers' Auto classes.

`import hf_vlm` imports neither transformers nor torch. It puts entries into the Auto mappings once transformers loads
them, and an entry imports its class when the mapping is asked for it. After that, `AutoConfig`, `AutoModel*`,
`AutoProcessor`, `AutoImageProcessor` and pipelines work as with `register` of those classes.
"""

import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .families import FAMILIES, IMAGE_PROCESSOR, Family, auto_classes, load_class

Load = Callable[[], Any]
OURS = f"{__package__}.models."


class LazyEntries(MutableMapping[Any, Any]):
    """The entries of one Auto mapping: those registered before, and ours, which are imported on demand.

    Args:
        entries: The entries registered before.
        lazy: Functions that load our values, by model type or by class name of one of our configs.
        make_key: Makes the key of the mapping from a key of `lazy`.
    """

    def __init__(self, entries: MutableMapping[Any, Any], lazy: dict[str, Load], make_key: Callable[[str], Any]):
        self.entries = dict(entries)
        self.lazy = dict(lazy)
        self.make_key = make_key

    def __contains__(self, key: object) -> bool:
        return key in self.entries or lazy_name(key) in self.lazy

    def __getitem__(self, key: Any) -> Any:
        name = lazy_name(key)
        if key not in self.entries and name in self.lazy:
            self[key] = self.lazy[name]()
        return self.entries[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.lazy.pop(lazy_name(key), None)
        self.entries[key] = value

    def __delitem__(self, key: Any) -> None:
        if self.lazy.pop(lazy_name(key), None) is None:
            del self.entries[key]

    def __iter__(self) -> Iterator[Any]:
        for name in list(self.lazy):
            self[self.make_key(name)]
        return iter(list(self.entries))

    def __len__(self) -> int:
        return len(self.entries) + len(self.lazy)


def lazy_name(key: object) -> str:
    """The key of [`LazyEntries.lazy`] for a key of an Auto mapping; empty if the key is a class of another package."""
    if isinstance(key, str):
        return key
    is_ours = isinstance(key, type) and key.__module__.startswith(OURS)
    return key.__name__ if isinstance(key, type) and is_ours else ""


def add_entries(mapping: Any, lazy: dict[str, Load], make_key: Callable[[str], Any] = load_class) -> None:
    """Adds our entries to an Auto mapping of transformers, once.

    Raises:
        ValueError: if transformers has a model type of the same name.
    """
    if isinstance(mapping._extra_content, LazyEntries):
        return
    mapping._extra_content = LazyEntries(mapping._extra_content, lazy, make_key)


class AutoMap:
    """The `auto_map` of a registered config: which Auto class loads the family's head.

    TRL and vLLM ask a config for `auto_map` if transformers has no class of the checkpoint's name. A checkpoint that
    carries its code has an `auto_map` of its own, which replaces this one. It is not written to `config.json`.

    Args:
        family: The config's row of the table.
    """

    def __init__(self, family: Family):
        self.family = family

    def __get__(self, config: Any, owner: type | None = None) -> dict[str, str]:
        return {auto_class: f"hf_vlm.models.{model}" for auto_class, model in auto_classes(self.family).items()}


def load_config(family: Family) -> Any:
    """The config class of a family, with its `auto_map`."""
    config = load_class(family.config)
    config.auto_map = AutoMap(family)  # on each class: InstructBLIP's would otherwise inherit BLIP-2's
    return config


def add_configs(auto: ModuleType) -> None:
    """Adds our configs to the mapping of `AutoConfig`."""
    native = sorted(set(FAMILIES) & set(auto.CONFIG_MAPPING_NAMES))
    if native:
        raise ValueError(f"transformers has model types of its own that are named {', '.join(native)}: rename ours.")
    lazy: dict[str, Load] = {name: partial(load_config, family) for name, family in FAMILIES.items()}
    add_entries(auto.CONFIG_MAPPING, lazy, make_key=str)


def add_models(auto: ModuleType) -> None:
    """Adds our models to the mappings of `AutoModel` and the other Auto classes of models."""
    by_auto_class: dict[str, dict[str, Load]] = {}
    for family in FAMILIES.values():
        for auto_class, model in auto_classes(family).items():
            lazy = by_auto_class.setdefault(auto_class, {})
            lazy[family.config] = partial(load_class, model)
    for auto_class, lazy in by_auto_class.items():
        add_entries(getattr(auto, auto_class)._model_mapping, lazy)


def add_processors(auto: ModuleType) -> None:
    """Adds our processors to the mapping of `AutoProcessor`."""
    lazy: dict[str, Load] = {
        family.config: partial(load_class, family.processor) for family in FAMILIES.values() if family.processor
    }
    add_entries(auto.PROCESSOR_MAPPING, lazy)


def add_image_processors(auto: ModuleType) -> None:
    """Adds our image processor to the mapping of `AutoImageProcessor`."""
    lazy: dict[str, Load] = {
        family.config: (lambda: {"pil": load_class(IMAGE_PROCESSOR)}) for family in FAMILIES.values()
    }
    add_entries(auto.IMAGE_PROCESSOR_MAPPING, lazy)


ADDITIONS = {
    "transformers.models.auto.configuration_auto": add_configs,
    "transformers.models.auto.modeling_auto": add_models,
    "transformers.models.auto.processing_auto": add_processors,
    "transformers.models.auto.image_processing_auto": add_image_processors,
}


class AfterImport(MetaPathFinder):
    """An import hook that adds our entries to transformers' Auto modules right after they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's ordinary spec, whose loader adds our entries at the end; None for any other module."""
        if fullname not in ADDITIONS:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, AfterImport))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_add(module: ModuleType) -> None:
                load(module)
                ADDITIONS[fullname](module)

            spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers every class of the table, now or when transformers' Auto classes are loaded."""
    for name, add in ADDITIONS.items():
        if name in sys.modules:
            add(sys.modules[name])
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


__all__ = ["LazyEntries", "register"]
