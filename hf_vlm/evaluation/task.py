"""The parts of an evaluation: a `Task`, the `TestSet` it needs, and the `Evaluator` that runs it on a model.

A task is one object. It knows its name and its metrics' names (`Description`), the fields of a test set without which
it cannot run, and the function that runs it. `tasks.py` holds the tasks of the package.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..data.builtin.instruction_templates import Wordings
from ..families import heads
from ..metrics.descriptions import Description
from ..models import VlmBlipForConditionalGeneration, VlmBlipForPreTraining
from .prompts import prompting_of, question_wording
from .writing import Chatting, Prompting


@dataclass(frozen=True)
class EvaluationSettings:
    """Options of an evaluation.

    Args:
        rerank: Candidates per query that a matching model re-ranks (0: no re-ranking).
        prompt: Text that captions begin with; not scored. A language model gets it as the instruction, in place of a
            wording.
        wordings: Whether InstructBLIP and LLaVA get the first of the trained or of the unseen wordings of a task.
        beams: Beams of caption generation.
        caption_tokens: Maximum length of a caption in tokens.
        answer_tokens: Maximum length of an answer in tokens.
        max_questions: Number of questions of a test set, the first ones (0: all).
        rank_answers: Choose from the answers of the training questions instead of generating.
        bf16: Run under bfloat16 autocast.
        progress: Show progress bars.
    """

    rerank: int = 32
    prompt: str | None = None
    wordings: Wordings = "train"
    beams: int = 3
    caption_tokens: int = 40
    answer_tokens: int = 10
    max_questions: int = 0
    rank_answers: bool = False
    bf16: bool = False
    progress: bool = True

    @property
    def run_options(self) -> dict[str, Any]:
        """The keyword arguments that every report function takes."""
        return {"progress": self.progress, "autocast_dtype": torch.bfloat16 if self.bf16 else None}


DEFAULTS = EvaluationSettings()


@dataclass
class TestSet:
    """Images with annotations. A field that is None is not annotated.

    Args:
        images: `(I,)`.
        captions: `(I,)`, the captions to retrieve, one or several per image.
        references: `(I,)`, the references of written captions, one or several per image.
        ids: `(I,)`; images of equal id share their captions.
        hard_negatives: `(I,)`, dicts of `caption`, `negative` and `kind`.
        questions: `(I,)`, dicts of `question`, `answer` and optionally `kind`.
        train_questions: Questions of the training set.
        objects: `(I,)`, names of all objects in an image.
        labels: `(I,)`, the class name of each image.
        class_names: All class names; by default those in `labels`.
    """

    __test__ = False  # not a test class for pytest

    images: Sequence[Any]
    captions: Sequence[str | Sequence[str]] | None = None
    references: Sequence[str | Sequence[str]] | None = None
    ids: Sequence[int] | None = None
    hard_negatives: Sequence[Sequence[Mapping[str, str]]] | None = None
    questions: Sequence[Sequence[Mapping[str, Any]]] | None = None
    train_questions: Sequence[Mapping[str, Any]] | None = None
    objects: Sequence[Sequence[str]] | None = None
    labels: Sequence[str] | None = None
    class_names: Sequence[str] | None = None


@dataclass
class Evaluator:
    """A model with its processor and the settings of an evaluation: everything that a task may ask for.

    Args:
        model: A model with a head.
        processor: Its processor.
        settings: Options of the evaluation.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    settings: EvaluationSettings = DEFAULTS

    @property
    def matching(self) -> bool:
        """Whether the model has an image-text matching (ITM) head."""
        return heads()[type(self.model).__name__].matches

    @cached_property
    def captioner(self) -> PreTrainedModel:
        """The model that writes captions: a BLIP pretraining head is converted, any other model is used unchanged."""
        if isinstance(self.model, VlmBlipForPreTraining):
            return VlmBlipForConditionalGeneration.from_pretraining(self.model).eval()
        return self.model

    @cached_property
    def prompting(self) -> Prompting | Chatting | None:
        """The functions that give prompts to the language model; None for a model without one."""
        return prompting_of(self.model, self.processor)

    def worded(
        self, questions: Sequence[Sequence[Mapping[str, Any]]], wordings: Wordings
    ) -> list[list[dict[str, Any]]]:
        """The first `settings.max_questions` questions, each put into the question template of the model."""
        wording = question_wording(self.model, wordings)
        left, worded = self.settings.max_questions or sum(map(len, questions)), []
        for of_image in questions:
            chosen = of_image[:left]
            left -= len(chosen)
            worded.append([{**one, "question": wording.format(question=one["question"])} for one in chosen])
        return worded

    def generate_options(self, max_tokens: int, prompt_tokens: int = 1, beams: int = 1) -> dict[str, Any]:
        """Options of `generate`; a BLIP decoder never exceeds its number of positions."""
        if self.prompting is not None:
            ends = {"eos_token_id": self.processor.tokenizer.eos_token_id, "do_sample": False}
            return {"max_new_tokens": max_tokens, "num_beams": beams, **ends}
        room = self.model.config.text_config.max_position_embeddings - prompt_tokens
        return {"max_new_tokens": min(max_tokens, room), "num_beams": beams}


@dataclass(frozen=True)
class Task:
    """One kind of evaluation.

    Args:
        description: Name of the task and names of its metrics.
        needs: Fields of `TestSet` without which the task cannot run.
        run: From evaluator and test set to metrics, ready for JSON. Metrics of a baseline, such as the model on a grey
            image, are a nested dictionary with the same keys.

    Example:

        def mean_length(evaluator, test):
            captions = caption_images(evaluator.captioner, evaluator.processor, test.images)
            return {"words": sum(len(caption.split()) for caption in captions) / len(captions)}

        described = Description(
            name="length",
            title="Length of captions",
            summary="mean number of words in a written caption",
            hub_task=("image-to-text", "Image captioning"),
            primary="words",
            metrics={"words": "words"},
        )
        LENGTH = Task(described, needs=("references",), run=mean_length)
    """

    description: Description
    needs: tuple[str, ...]
    run: Callable[[Evaluator, TestSet], dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the task on the command line and in `results.json`."""
        return self.description.name

    @property
    def primary(self) -> str:
        """Key of the task's primary metric."""
        return self.description.primary

    def can_use(self, fields: Iterable[str]) -> bool:
        """Whether a test set with these fields is enough."""
        return set(self.needs) <= set(fields)


__all__ = ["DEFAULTS", "EvaluationSettings", "Evaluator", "Task", "TestSet"]
