"""What a model writes about images: captions, and answers to questions, for all rows of a test set.

- Captions: any model whose `generate(pixel_values, input_ids, attention_mask, ...)` returns a prompt and what follows,
  such as `VlmBlipForConditionalGeneration`.
- Answers: any whose `generate` and `rank_answers` take `vision_features`, such as `VlmBlipForQuestionAnswering`. An
  image with several questions is encoded once.
- With `Prompting` a question is a prompt that a language model goes on with, as in BLIP-2 and InstructBLIP.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .blocks import image_blocks
from .embed import evaluation_mode

RANKED_ROWS = 512  # answers compared at a time, each with logits of the whole vocabulary
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Prompting:
    """How a model is given prompts about images, where that is another way than BLIP's.

    Attributes:
        inputs: from prompts to what `generate` takes for them, padded on the left; it returns what follows the prompt.
        encode: from pixels to the `vision_features` that `generate` takes in their place.
    """

    inputs: Callable[[list[str]], Inputs]
    encode: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Chatting:
    """How a model that talks is asked about images, which it may see in more than one view.

    Attributes:
        answer: from images, questions, the row of `images` that each question is about, and options of `generate`, to
            what the model says to each question.
    """

    answer: Callable[..., list[str]]


def caption_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompt: str | None = None,
    batch_size: int = 32,
    *,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """A caption of each image.

    Args:
        images: anything with a length and integer indices; read a batch at a time.
        prompt: text that every caption begins with; it is not part of what is returned.
        batch_size: images at a time.
        progress: show a progress bar.
        autocast_dtype: run the model under autocast to this type, for instance `torch.bfloat16`.
        **generate_kwargs: options of transformers' `generate`, such as `num_beams` and `max_new_tokens`.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to caption")
    captions: list[str] = []
    with evaluation_mode(model, autocast_dtype), tqdm(total=len(images), desc="captions", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            batch = [images[row] for row in range(start, min(start + batch_size, len(images)))]
            pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
            inputs: Any = {} if prompt is None else processor(text=[prompt] * len(batch)).to(model.device)
            written = model.generate(
                pixel_values=pixel_values.to(model.device, model.dtype), **inputs, **generate_kwargs
            )
            # [DEC] alone, or [DEC] and the prompt; the tokenizer's [SEP] is not part of it.
            width = 1 if prompt is None else inputs["input_ids"].shape[1] - 1
            captions += processor.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
            bar.update(len(batch))
    return [caption.strip() for caption in captions]


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    image_of_question: Sequence[int],
    batch_size: int = 64,
    *,
    prompting: Prompting | Chatting | None = None,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """An answer to each question, written.

    Args:
        images: anything with a length and integer indices.
        questions: `(Q,)`, in any order.
        image_of_question: `(Q,)`, the row of `images` that each question is about.
        batch_size: questions at a time, and images at a time.
        prompting: how the questions are asked; by default as the processor prepares texts.
        progress, autocast_dtype, generate_kwargs: as in `caption_images`.

    Raises:
        ValueError: there are no questions, the lengths differ, or a question is about an image that is not there.
    """

    def write(vision_features: torch.Tensor, inputs: Inputs) -> list[str]:
        written = model.generate(vision_features=vision_features, **inputs, **generate_kwargs)
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    with evaluation_mode(model, autocast_dtype):
        if isinstance(prompting, Chatting):
            answer = partial(prompting.answer, **generate_kwargs)
            return _said(images, questions, image_of_question, batch_size, answer, progress)
        return _answers(model, processor, images, questions, image_of_question, batch_size, write, progress, prompting)


def choose_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    image_of_question: Sequence[int],
    answers: Sequence[str],
    *,
    num_candidates: int = 128,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> list[str]:
    """For each question the likeliest of a closed list of answers (BLIP, section 5.3).

    Args:
        images, questions, image_of_question, progress, autocast_dtype: as in `answer_questions`.
        answers: the list; all questions have the same.
        num_candidates: how many of them, those with the likeliest first token, are compared whole.

    Raises:
        ValueError: there are no answers, and as `answer_questions`.
    """
    if isinstance(answers, str) or len(answers) == 0:
        raise ValueError(f"answers must be a non-empty list of strings, got {answers!r}")
    listed = processor(text=list(answers)).to(model.device)
    batch_size = max(1, RANKED_ROWS // min(num_candidates, len(answers)))

    def choose(vision_features: torch.Tensor, inputs: Inputs) -> list[str]:
        chosen = model.rank_answers(
            listed["input_ids"],
            listed["attention_mask"],
            vision_features=vision_features,
            num_candidates=num_candidates,
            **inputs,
        )
        return [answers[row] for row in chosen.tolist()]

    with evaluation_mode(model, autocast_dtype):
        return _answers(model, processor, images, questions, image_of_question, batch_size, choose, progress)


def _answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    image_of_question: Sequence[int],
    batch_size: int,
    answer: Callable[[torch.Tensor, Inputs], list[str]],
    progress: bool,
    prompting: Prompting | None = None,
) -> list[str]:
    """Answers in the order of the questions; `answer` gives those to a batch from its images' states, row by row."""
    _check_lengths(questions, image_of_question)
    found = [""] * len(questions)
    lengths = torch.tensor([len(question) for question in questions])
    prepare = (lambda texts: processor(text=texts)) if prompting is None else prompting.inputs
    encode = None if prompting is None else prompting.encode
    with tqdm(total=len(questions), desc="questions", disable=not progress) as bar:
        for block in image_blocks(model, processor, images, image_of_question, batch_size, encode):
            # Longest first, so that each batch is padded only to texts of about its own length.
            for part in lengths[block.rows].argsort(descending=True, stable=True).split(batch_size):
                rows = block.rows[part].tolist()
                prepared = prepare([questions[row] for row in rows])
                inputs = {name: tensor.to(model.device) for name, tensor in prepared.items()}
                states = block.states[block.places[part.to(block.places.device)]]
                for row, text in zip(rows, answer(states, inputs), strict=True):
                    found[row] = text.strip()
                bar.update(len(rows))
    return found


def _said(
    images: Sequence[Image.Image],
    questions: Sequence[str],
    image_of_question: Sequence[int],
    batch_size: int,
    answer: Callable[[list[Image.Image], list[str], list[int]], list[str]],
    progress: bool,
) -> list[str]:
    """Answers in the order of the questions, of a model that is asked about images in the words of a chat.

    Questions about one image stand side by side, and among them those of about the same length.
    """
    _check_lengths(questions, image_of_question)
    found = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda row: (image_of_question[row], -len(questions[row])))
    with tqdm(total=len(questions), desc="questions", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            shown = list(dict.fromkeys(image_of_question[row] for row in rows))
            pictures = [images[image] for image in shown]
            asked, places = [questions[row] for row in rows], [shown.index(image_of_question[row]) for row in rows]
            for row, text in zip(rows, answer(pictures, asked, places), strict=True):
                found[row] = text.strip()
            bar.update(len(rows))
    return found


def _check_lengths(questions: Sequence[str], image_of_question: Sequence[int]) -> None:
    if not questions or len(questions) != len(image_of_question):
        raise ValueError(f"{len(questions)} questions about {len(image_of_question)} images: must be equal numbers")


__all__ = ["Chatting", "Prompting", "answer_questions", "caption_images", "choose_answers"]
