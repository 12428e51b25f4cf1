"""What a checkpoint can be evaluated on: the tasks that its head can do, on a test set that has what they need.

- `retrieval`: images and captions find each other; BLIP's and BLIP-2's also re-ranked by matching.
- `hard_negatives`: true captions against ones that differ in a word, by embeddings and, if possible, by matching.
- `caption`: captions are written and compared with references.
- `vqa`: questions are answered, in words or from a closed list. `vqa_unseen_wordings`: the same, asked of a language
  model in words that no instruction was trained with.
- `pope`: it is said of objects whether they are there, as often yes as no.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from transformers import AutoConfig, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..data.builtin.instruction_templates import Wordings
from ..data.builtin.pope import pope_questions
from ..models import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmClipModel,
    VlmInstructBlipForConditionalGeneration,
    VlmLlavaForConditionalGeneration,
)
from . import Chatting, Prompting, caption_report, hard_negative_report, pope_report, retrieval_report, vqa_report
from .prompts import caption_prompt, prompting_of, question_wording
from .settings import DEFAULTS, Settings

PROMPTED = ("caption", "vqa", "vqa_unseen_wordings", "pope")
TASKS: dict[type[PreTrainedModel], tuple[str, ...]] = {
    VlmClipModel: ("retrieval", "hard_negatives"),
    VlmBlipForPreTraining: ("retrieval", "hard_negatives", "caption"),
    VlmBlipForImageTextRetrieval: ("retrieval", "hard_negatives"),
    VlmBlipForConditionalGeneration: ("caption",),
    VlmBlipForQuestionAnswering: ("vqa", "pope"),
    VlmBlip2ForPreTraining: ("retrieval", "hard_negatives"),
    VlmBlip2ForImageTextRetrieval: ("retrieval", "hard_negatives"),
    VlmBlip2ForConditionalGeneration: PROMPTED,
    VlmInstructBlipForConditionalGeneration: PROMPTED,
    VlmLlavaForConditionalGeneration: PROMPTED,
}
KS = (1, 5, 10)
Reports = dict[str, dict[str, dict[str, Any]]]


@dataclass
class TestSet:
    """Images and what is known of them; what is None is not known.

    Args:
        images: `(I,)`.
        captions: `(I,)`, what retrieval looks for, one or several each.
        references: `(I,)`, what written captions are compared with.
        ids: `(I,)`, images of equal id share their captions.
        hard_negatives: `(I,)`, dicts of `caption`, `negative` and `kind`.
        questions: `(I,)`, dicts of `question`, `answer` and perhaps `kind`.
        train_questions: questions of the training set.
        objects: `(I,)`, names of all that is in a picture.
    """

    __test__ = False  # no test class for pytest

    images: Sequence[Any]
    captions: Sequence[str | Sequence[str]] | None = None
    references: Sequence[str | Sequence[str]] | None = None
    ids: Sequence[int] | None = None
    hard_negatives: Sequence[Sequence[Mapping[str, str]]] | None = None
    questions: Sequence[Sequence[Mapping[str, Any]]] | None = None
    train_questions: Sequence[Mapping[str, Any]] | None = None
    objects: Sequence[Sequence[str]] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What can be evaluated on it."""
        needs = {
            "retrieval": self.captions,
            "hard_negatives": self.hard_negatives,
            "caption": self.references,
            "vqa": self.questions,
            "vqa_unseen_wordings": self.questions,
            "pope": self.objects,
        }
        return tuple(task for task, needed in needs.items() if needed is not None)


def load_checkpoint(checkpoint: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model, with the head that its config names, and processor.

    Raises:
        ValueError: if the checkpoint is of another architecture, or has no head.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    name = (config.architectures or ["model without a name"])[0]
    heads = {head.__name__: head for head in TASKS}
    if name not in heads:
        raise ValueError(
            f"{checkpoint} holds a {name} of type {config.model_type}; evaluated are {', '.join(heads)}. "
            f"If it is transformers' own CLIP or BLIP, convert it first: hf-vlm convert {checkpoint} FOLDER"
        )
    return heads[name].from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)


def chosen_tasks(model: PreTrainedModel, available: Sequence[str], task: str | None, data: str) -> list[str]:
    """What both the head and the data allow, or of that the one that is asked for.

    Args:
        model: A head.
        available: Tasks of the data.
        task: One of them; None for all.
        data: What to call the data in an error.

    Raises:
        ValueError: if there is none, or the model is no head of `TASKS` (such as one inside an adapter: merge it).
    """
    head, able = type(model).__name__, TASKS.get(type(model), ())
    if not able:
        raise ValueError(f"A {head} cannot be evaluated, only {', '.join(known.__name__ for known in TASKS)}.")
    if task is not None and task not in able:
        raise ValueError(f"A {head} cannot do {task!r}; it can do {', '.join(able)}.")
    if task is not None and task not in available:
        raise ValueError(f"There is nothing for {task!r} in {data}; it serves for {', '.join(available)}.")
    tasks = [name for name in able if name in available and task in (None, name)]
    if not tasks:
        raise ValueError(
            f"A {head} can do {', '.join(able)}, but {data} serves for {', '.join(available)}: take scenes or own data."
        )
    return tasks


@dataclass
class Evaluator:
    """A head at its tasks.

    Args:
        model: A head of `TASKS`.
        processor: Its processor.
        settings: How tasks are done.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    settings: Settings = DEFAULTS

    @property
    def matching(self) -> bool:
        """Whether the model scores pairs by looking at both."""
        return isinstance(self.model, VlmBlipForPreTraining | VlmBlip2ForPreTraining)

    @cached_property
    def captioner(self) -> PreTrainedModel:
        """The head that writes captions: made from the weights of a pretraining head."""
        if isinstance(self.model, VlmBlipForPreTraining):
            return VlmBlipForConditionalGeneration.from_pretraining(self.model).eval()
        return self.model

    @cached_property
    def prompting(self) -> Prompting | Chatting | None:
        """How a head with a language model is given its prompts."""
        return prompting_of(self.model, self.processor)

    def run(self, tasks: Sequence[str], test: TestSet) -> dict[str, dict[str, Any]]:
        """The metrics of each task."""
        reports: dict[str, Callable[[TestSet], dict[str, Any]]] = {
            "retrieval": self.retrieval,
            "hard_negatives": self.hard_negatives,
            "caption": self.caption,
            "vqa": self.vqa,
            "vqa_unseen_wordings": partial(self.vqa, wordings="unseen"),
            "pope": self.pope,
        }
        return {task: reports[task](test) for task in tasks}

    def retrieval(self, test: TestSet) -> dict[str, Any]:
        """`retrieval_report`, re-ranked if the model can."""
        rerank = self.settings.rerank if self.matching and self.settings.rerank > 0 else None
        options = {"rerank": rerank, "ks": KS, **self.settings.shown}
        return retrieval_report(self.model, self.processor, test.images, test.captions or [], test.ids, **options)

    def hard_negatives(self, test: TestSet) -> dict[str, Any]:
        """`hard_negative_report`, by matching too if the model can."""
        pairs = test.hard_negatives or []
        return hard_negative_report(
            self.model, self.processor, test.images, pairs, matching=self.matching, **self.settings.shown
        )

    def caption(self, test: TestSet) -> dict[str, Any]:
        """The metrics of `caption_report`."""
        prompt = self.settings.prompt
        if prompt is None:
            prompt = caption_prompt(self.model, self.settings.wordings)
        used = 1 if prompt is None else len(self.processor.tokenizer(prompt)["input_ids"])
        report, _ = caption_report(
            self.captioner,
            self.processor,
            test.images,
            test.references or [],
            prompt=prompt,
            prompting=self.prompting,
            generate_options=self._generation(self.settings.caption_tokens, used, self.settings.beams),
            **self.settings.shown,
        )
        return report

    def vqa(self, test: TestSet, wordings: Wordings | None = None) -> dict[str, Any]:
        """The metrics of `vqa_report`.

        Args:
            test: Images with questions.
            wordings: In which a language model is asked; by default those of the settings.

        Raises:
            ValueError: if answers are to be ranked by a language model, or there are no training questions.
        """
        answers = None
        if self.settings.rank_answers:
            if self.prompting is not None:
                raise ValueError(f"A {type(self.model).__name__} writes its answers: leave out their ranking.")
            if test.train_questions is None:
                raise ValueError("Ranking needs a list of answers: name the split of the training questions.")
            given = [asked["answer"] for asked in test.train_questions]
            answers = sorted({text for people in given for text in ([people] if isinstance(people, str) else people)})
        report, _ = vqa_report(
            self.model,
            self.processor,
            test.images,
            self._asked(test.questions or [], wordings or self.settings.wordings),
            train_questions=test.train_questions,
            answer_list=answers,
            prompting=self.prompting,
            generate_options=self._generation(self.settings.answer_tokens, used=1, beams=1),
            **self.settings.shown,
        )
        return report

    def pope(self, test: TestSet) -> dict[str, Any]:
        """The metrics of `pope_report`."""
        return pope_report(
            self.model,
            self.processor,
            test.images,
            self._asked(pope_questions(test.objects or []), self.settings.wordings),
            prompting=self.prompting,
            generate_options=self._generation(self.settings.answer_tokens, used=1, beams=1),
            **self.settings.shown,
        )

    def _asked(
        self, questions: Sequence[Sequence[Mapping[str, Any]]], wordings: Wordings
    ) -> list[list[dict[str, Any]]]:
        """The questions about each image, as the model is asked them."""
        wording = question_wording(self.model, wordings)
        left, asked = self.settings.max_questions or sum(map(len, questions)), []
        for of_image in questions:
            chosen = of_image[:left]
            left -= len(chosen)
            asked.append([{**one, "question": wording.format(question=one["question"])} for one in chosen])
        return asked

    def _generation(self, tokens: int, used: int, beams: int) -> dict[str, Any]:
        """Options of `generate`; with the tokens used before, the text stays within the decoder's positions."""
        if self.prompting is not None:
            ends = {"eos_token_id": self.processor.tokenizer.eos_token_id, "do_sample": False}
            return {"max_new_tokens": tokens, "num_beams": beams, **ends}
        room = self.model.config.text_config.max_position_embeddings - used
        return {"max_new_tokens": min(tokens, room), "num_beams": beams}


__all__ = ["KS", "TASKS", "Evaluator", "Reports", "TestSet", "chosen_tasks", "load_checkpoint"]
