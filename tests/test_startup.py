"""Start-up: nothing heavy is imported before it is used, and what is deferred still works."""

import subprocess
import sys
from importlib import import_module, resources

import pytest
from transformers import AutoModel, BertConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import hf_vlm
from hf_vlm.families import FAMILIES, IMAGE_PROCESSOR, architectures, auto_classes, load_class
from hf_vlm.lazy import static_imports
from hf_vlm.registration import LazyEntries, add_configs

LAZY = ("hf_vlm", "hf_vlm.models", "hf_vlm.data", "hf_vlm.training", "hf_vlm.evaluation", "hf_vlm.search")
HEAVY = ("torch", "transformers", "datasets", "numpy", "huggingface_hub")


def python(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "start",
    [
        f"import {', '.join(LAZY)}, hf_vlm.families",
        "from hf_vlm.cli.main import main; sys.argv = ['hf-vlm', '--help']; main()",
        "from hf_vlm.cli.main import main; sys.argv = ['hf-vlm', 'evaluate', '--help']; main()",
    ],
)
def test_nothing_heavy_is_imported(start: str) -> None:
    code = (
        f"import sys\ntry:\n    {start}\nexcept SystemExit:\n    pass\nprint([n for n in {HEAVY} if n in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", LAZY)
def test_public_names(package: str) -> None:
    """`__all__` and the static imports agree, and each name is the object of its module."""
    module = import_module(package)
    source = resources.files(package).joinpath("__init__.py").read_text(encoding="utf-8")
    modules = static_imports(source)
    assert set(module.__all__) == {*modules, *({"__version__"} if package == "hf_vlm" else ())}
    for name, where in modules.items():
        assert getattr(module, name) is getattr(import_module(where, package), name)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'missing'"):
        module.missing  # noqa: B018


def test_a_config_imports_no_other_family() -> None:
    """`AutoConfig` loads the config that is asked for and leaves all others."""
    code = (
        "import sys, hf_vlm\nfrom transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('vlm_clip')).__name__)\n"
        "print([n for n in sys.modules if n.startswith('hf_vlm.models.') and ('llava' in n or 'modeling' in n)])"
    )
    assert python(code).splitlines() == ["VlmClipConfig", "[]"]


@pytest.mark.parametrize(
    "order", ["import hf_vlm, transformers", "import transformers.models.auto.modeling_auto, hf_vlm"]
)
def test_registered_in_either_order(order: str) -> None:
    code = (
        f"{order}\nfrom transformers import AutoModel\n"
        "print(AutoModel._model_mapping[hf_vlm.VlmBlip2Config] is hf_vlm.VlmBlip2Model)"
    )
    assert python(code).strip() == "True"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_registered(model_type: str) -> None:
    family = FAMILIES[model_type]
    config_class = load_class(family.config)
    assert config_class.model_type == model_type
    assert CONFIG_MAPPING[model_type] is config_class
    for auto_class, name in auto_classes(family).items():
        mapping = getattr(import_module("transformers"), auto_class)._model_mapping
        assert config_class in mapping
        assert mapping[config_class] is load_class(name)
        assert load_class(name).config_class is config_class
    assert IMAGE_PROCESSOR_MAPPING[config_class] == {"pil": load_class(IMAGE_PROCESSOR)}
    if family.processor:
        assert PROCESSOR_MAPPING[config_class] is load_class(family.processor)


def test_classes_of_the_table_exist() -> None:
    for family in FAMILIES.values():
        for name in family.classes:
            assert issubclass(load_class(name).config_class, load_class(family.config))
        for head in family.heads:
            assert all(hasattr(import_module("transformers"), native) for native in head.natives)
    assert [family.model_type for family in architectures()] == [
        "vlm_clip",
        "vlm_blip",
        "vlm_blip2",
        "vlm_instructblip",
        "vlm_llava",
    ]


def test_extra_content() -> None:
    """`_extra_content` of transformers' mappings, which registration replaces, keeps the entries of others."""

    class OtherConfig(BertConfig):
        model_type = "other"

    class OtherModel(hf_vlm.VlmClipModel):
        config_class = OtherConfig

    assert all(
        isinstance(mapping._extra_content, LazyEntries)
        for mapping in (CONFIG_MAPPING, MODEL_MAPPING, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING)
    )
    AutoModel.register(OtherConfig, OtherModel)
    try:
        assert MODEL_MAPPING[OtherConfig] is OtherModel
        assert {OtherModel, hf_vlm.VlmLlavaModel} <= set(MODEL_MAPPING._extra_content.values())
        assert {OtherConfig, hf_vlm.VlmLlavaConfig} <= set(MODEL_MAPPING._extra_content)
        assert MODEL_MAPPING[BertConfig].__name__ == "BertModel"
    finally:
        del MODEL_MAPPING._extra_content[OtherConfig]
    assert OtherConfig not in MODEL_MAPPING
    with pytest.raises(KeyError):
        MODEL_MAPPING[OtherConfig]
    assert "vlm_missing" not in CONFIG_MAPPING
    assert hf_vlm.VlmClipConfig not in import_module("transformers").AutoModelForCausalLM._model_mapping
    names = {processor.__name__ for processor in PROCESSOR_MAPPING._extra_content.values()}
    assert {family.processor for family in architectures()} <= names


def test_a_native_model_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "bert", FAMILIES["vlm_clip"])
    with pytest.raises(ValueError, match="of its own that are named bert: rename ours"):
        add_configs(import_module("transformers.models.auto.configuration_auto"))
