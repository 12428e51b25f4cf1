"""The table of architectures: one row per model type holds all that depends on it.

A row names classes and modules by string, so reading the table imports neither torch nor transformers.

- Registration with the Auto classes reads `config`, `model`, `processor` and each head's `auto_class`.
- Evaluation reads each head's `tasks`. Export reads `auto_class`. LoRA reads `trained_in_full`.
- Conversion reads `converter`, `native_types`, `native_processors` and each head's `natives`.
- Model cards read `card`.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

ZERO_SHOT = "AutoModelForZeroShotImageClassification"
PRETRAINING = "AutoModelForPreTraining"
GENERATION = "AutoModelForImageTextToText"
RETRIEVAL_TASKS = ("retrieval", "hard_negatives", "zero_shot")
LANGUAGE_MODEL_TASKS = ("caption", "vqa", "vqa_unseen_wordings", "pope")


@dataclass(frozen=True)
class Head:
    """A model class that checkpoints are saved from, with its Auto class, tasks and conversions.

    Args:
        name: Class name in `hf_vlm.models`.
        auto_class: Auto class that loads the head from a checkpoint that carries its code. The first head of a family
            that names an Auto class is also registered with it.
        tasks: Names of the evaluation tasks that the head can do.
        natives: Class names in `transformers` of models that convert to and from this head.
        matches: Whether the head has image-text matching (ITM): cross-attention between image and text scores a pair.
    """

    name: str
    auto_class: str | None = None
    tasks: tuple[str, ...] = ()
    natives: tuple[str, ...] = ()
    matches: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture: everything that depends on its model type.

    Args:
        model_type: `model_type` of the config.
        config: Class name of the config in `hf_vlm.models`.
        model: Class name of the base model, which `AutoModel` loads.
        processor: Class name of the processor; None for a tower or the Q-Former, which are only parts of a model.
        heads: The classes that checkpoints are saved from; the base model is one if it is trained itself.
        converter: Module that converts to and from transformers' classes.
        native_types: Model types of transformers that the converter reads.
        native_processors: Class names of the processors in `transformers` that the converter reads.
        trained_in_full: Modules between image tower and LLM, which are trained in full when the LLM has LoRA adapters.
        card: `module:NAME` of the model card's texts.
    """

    model_type: str
    config: str
    model: str
    processor: str | None = None
    heads: tuple[Head, ...] = ()
    converter: str | None = None
    native_types: tuple[str, ...] = ()
    native_processors: tuple[str, ...] = ()
    trained_in_full: tuple[str, ...] = ()
    card: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the base model and of the heads."""
        return tuple(dict.fromkeys((self.model, *(head.name for head in self.heads))))


ROWS = (
    Family("vlm_tower", config="VlmTowerConfig", model="VlmTowerModel"),
    Family("vlm_text_tower", config="VlmTextTowerConfig", model="VlmTextTowerModel"),
    Family("vlm_qformer", config="VlmQFormerConfig", model="VlmQFormerModel"),
    Family(
        "vlm_clip",
        config="VlmClipConfig",
        model="VlmClipModel",
        processor="VlmClipProcessor",
        heads=(Head("VlmClipModel", ZERO_SHOT, RETRIEVAL_TASKS, natives=("CLIPModel",)),),
        converter="hf_vlm.hub.convert.clip",
        native_types=("clip",),
        native_processors=("CLIPProcessor",),
        card="hf_vlm.hub.cards.clip:CLIP",
    ),
    Family(
        "vlm_blip",
        config="VlmBlipConfig",
        model="VlmBlipModel",
        processor="VlmBlipProcessor",
        heads=(
            Head("VlmBlipForPreTraining", PRETRAINING, (*RETRIEVAL_TASKS, "caption"), matches=True),
            Head(
                "VlmBlipForConditionalGeneration",
                GENERATION,
                ("caption",),
                natives=("BlipForConditionalGeneration",),
            ),
            Head(
                "VlmBlipForQuestionAnswering",
                GENERATION,
                ("vqa", "pope"),
                natives=("BlipForQuestionAnswering",),
            ),
            Head(
                "VlmBlipForImageTextRetrieval",
                PRETRAINING,
                RETRIEVAL_TASKS,
                natives=("BlipForImageTextRetrieval",),
                matches=True,
            ),
        ),
        converter="hf_vlm.hub.convert.blip",
        native_types=("blip",),
        native_processors=("BlipProcessor",),
        card="hf_vlm.hub.cards.blip:BLIP",
    ),
    Family(
        "vlm_blip2",
        config="VlmBlip2Config",
        model="VlmBlip2Model",
        processor="VlmBlip2Processor",
        heads=(
            Head("VlmBlip2ForPreTraining", PRETRAINING, RETRIEVAL_TASKS, matches=True),
            Head(
                "VlmBlip2ForConditionalGeneration",
                GENERATION,
                LANGUAGE_MODEL_TASKS,
                natives=("Blip2ForConditionalGeneration",),
            ),
            Head(
                "VlmBlip2ForImageTextRetrieval",
                PRETRAINING,
                RETRIEVAL_TASKS,
                natives=("Blip2ForImageTextRetrieval",),
                matches=True,
            ),
        ),
        converter="hf_vlm.hub.convert.blip2",
        native_types=("blip-2",),
        native_processors=("Blip2Processor",),
        trained_in_full=("qformer", "vision_norm", "language_projection"),
        card="hf_vlm.hub.cards.blip2:BLIP2",
    ),
    Family(
        "vlm_instructblip",
        config="VlmInstructBlipConfig",
        model="VlmInstructBlipModel",
        processor="VlmInstructBlipProcessor",
        heads=(
            Head(
                "VlmInstructBlipForConditionalGeneration",
                GENERATION,
                LANGUAGE_MODEL_TASKS,
                natives=("InstructBlipForConditionalGeneration",),
            ),
        ),
        converter="hf_vlm.hub.convert.blip2",
        native_types=("instructblip",),
        native_processors=("InstructBlipProcessor",),
        trained_in_full=("qformer", "vision_norm", "language_projection"),
        card="hf_vlm.hub.cards.blip2:INSTRUCTBLIP",
    ),
    Family(
        "vlm_llava",
        config="VlmLlavaConfig",
        model="VlmLlavaModel",
        processor="VlmLlavaProcessor",
        heads=(
            Head(
                "VlmLlavaForConditionalGeneration",
                GENERATION,
                LANGUAGE_MODEL_TASKS,
                natives=("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"),
            ),
        ),
        converter="hf_vlm.hub.convert.llava",
        native_types=("llava", "llava_next"),
        native_processors=("LlavaProcessor", "LlavaNextProcessor"),
        trained_in_full=("projector",),
        card="hf_vlm.hub.cards.llava:LLAVA",
    ),
)
FAMILIES = {family.model_type: family for family in ROWS}
IMAGE_PROCESSOR = "VlmImageProcessor"


def architectures() -> list[Family]:
    """The families that have a processor: all rows but the towers and the Q-Former."""
    return [family for family in FAMILIES.values() if family.processor]


def heads() -> dict[str, Head]:
    """Every head by its class name, in the order of the table."""
    return {head.name: head for family in FAMILIES.values() for head in family.heads}


def load_class(name: str) -> Any:
    """The class of `hf_vlm.models` with this name."""
    return getattr(import_module("hf_vlm.models"), name)


def load_reference(reference: str) -> Any:
    """The object that a `module:NAME` of the table refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def native_heads(*model_types: str) -> dict[type, Any]:
    """Our head for each class of transformers that converts to it, in the families of these model types."""
    transformers = import_module("transformers")
    return {
        getattr(transformers, native): load_class(head.name)
        for model_type in model_types
        for head in FAMILIES[model_type].heads
        for native in head.natives
    }


def auto_classes(family: Family) -> dict[str, str]:
    """The Auto classes that know a family's model type, and the model class that each of them loads."""
    known = {"AutoModel": family.model}
    for head in family.heads:
        if head.auto_class:
            known.setdefault(head.auto_class, head.name)
    return known


__all__ = [
    "FAMILIES",
    "IMAGE_PROCESSOR",
    "Family",
    "Head",
    "architectures",
    "auto_classes",
    "heads",
    "load_class",
    "load_reference",
    "native_heads",
]
