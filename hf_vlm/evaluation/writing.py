"""Generated captions and answers for a whole test set.

- Captions: `generate(pixel_values, input_ids, attention_mask, ...)` returns the prompt and its continuation, as in
  `VlmBlipForConditionalGeneration`.
- Answers: `generate` and `rank_answers` take `vision_features`, as in `VlmBlipForQuestionAnswering`. An image with
  several questions is encoded once.
- `Prompting`: the question is the prompt of a language model, as in BLIP-2 and InstructBLIP.
- `Chatting`: the question is a chat message, as in LLaVA.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..terminal import quoted
from .blocks import image_blocks, read_pixels
from .embed import evaluation_mode

RANKED_ROWS = 512  # answers scored at a time; each has logits over the whole vocabulary
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Prompting:
    """The functions that give prompts about images to a language model.

    Attributes:
        inputs: Prompts to the inputs of `generate`, padded on the left. `generate` returns only the continuation.
        encode: Pixels to the `vision_features` of `generate`.
    """

    inputs: Callable[[list[str]], Inputs]
    encode: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Chatting:
    """The function that asks a chat model about images, which may be split into several views (tiles).

    Attributes:
        answer: Function of images, questions, the index in `images` of each question's image, and options of
            `generate`. It returns the answer to each question.
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
    """A generated caption of each image.

    Args:
        images: Any sequence of images; read one batch at a time.
        prompt: Text that every caption begins with; removed from the result.
        batch_size: Images per batch.
        progress: Show a progress bar.
        autocast_dtype: Autocast dtype, for instance `torch.bfloat16`; None: no autocast.
        **generate_kwargs: Options of transformers' `generate`, such as `num_beams` and `max_new_tokens`.

    Raises:
        ValueError: if there are no images.

    Example:

        print(caption_images(model, processor, [image], num_beams=3, max_new_tokens=20))
    """
    if len(images) == 0:
        raise ValueError("No images to caption: give at least one.")
    captions: list[str] = []
    with evaluation_mode(model, autocast_dtype), tqdm(total=len(images), desc="captions", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            pixel_values = read_pixels(processor, images, range(start, min(start + batch_size, len(images))))
            inputs: Any = {} if prompt is None else processor(text=[prompt] * len(pixel_values)).to(model.device)
            written = model.generate(
                pixel_values=pixel_values.to(model.device, model.dtype), **inputs, **generate_kwargs
            )
            # The output begins with [DEC], or with [DEC] and the prompt without the tokenizer's [SEP].
            width = 1 if prompt is None else inputs["input_ids"].shape[1] - 1
            captions += processor.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
            bar.update(len(pixel_values))
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
    """A generated answer to each question.

    Args:
        images: Any sequence of images.
        questions: `(Q,)`, in any order.
        image_of_question: `(Q,)`, the index in `images` of each question's image.
        batch_size: Questions per batch, and images per batch.
        prompting: How the model receives the questions; by default through the processor alone.
        progress, autocast_dtype, generate_kwargs: As in `caption_images`.

    Raises:
        ValueError: if there are no questions, the lengths differ, or an image index is out of range.

    Example:

        questions = ["What colour is the cat?", "How many trees are there?"]
        print(answer_questions(model, processor, [image], questions, [0, 0], max_new_tokens=10))
    """

    def write(vision_features: torch.Tensor, inputs: Inputs) -> list[str]:
        written = model.generate(vision_features=vision_features, **inputs, **generate_kwargs)
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    with evaluation_mode(model, autocast_dtype):
        if isinstance(prompting, Chatting):
            answer = partial(prompting.answer, **generate_kwargs)
            return _chat_answers(images, questions, image_of_question, batch_size, answer, progress)
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
    """The most likely answer to each question, from a closed list (BLIP, section 5.3).

    Args:
        images, questions, image_of_question, progress, autocast_dtype: As in `answer_questions`.
        answers: The closed list, the same for all questions.
        num_candidates: Number of answers that are scored in full: those with the most likely first token.

    Raises:
        ValueError: if there are no answers, or as in `answer_questions`.

    Example:

        print(choose_answers(model, processor, [image], ["What colour is the cat?"], [0], ["red", "blue"]))
    """
    if isinstance(answers, str) or len(answers) == 0:
        raise ValueError(f"answers must be a non-empty list of strings, got {quoted(answers)}.")
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
    """Answers in the order of the questions; `answer` maps hidden states and inputs of a batch to its answers."""
    _check_lengths(questions, image_of_question)
    found = [""] * len(questions)
    lengths = torch.tensor([len(question) for question in questions])
    prepare = (lambda texts: processor(text=texts)) if prompting is None else prompting.inputs
    encode = None if prompting is None else prompting.encode
    with tqdm(total=len(questions), desc="questions", disable=not progress) as bar:
        for block in image_blocks(model, processor, images, image_of_question, batch_size, encode):
            # Sorted by length, so that padding stays short.
            for part in lengths[block.rows].argsort(descending=True, stable=True).split(batch_size):
                rows = block.rows[part].tolist()
                prepared = prepare([questions[row] for row in rows])
                inputs = {name: tensor.to(model.device) for name, tensor in prepared.items()}
                states = block.states[block.places[part.to(block.places.device)]]
                for row, text in zip(rows, answer(states, inputs), strict=True):
                    found[row] = text.strip()
                bar.update(len(rows))
    return found


def _chat_answers(
    images: Sequence[Image.Image],
    questions: Sequence[str],
    image_of_question: Sequence[int],
    batch_size: int,
    answer: Callable[[list[Image.Image], list[str], list[int]], list[str]],
    progress: bool,
) -> list[str]:
    """Answers of a chat model, in the order of the questions.

    Batches are sorted by image, so that its questions share a prefix, then by length.
    """
    _check_lengths(questions, image_of_question)
    found = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda row: (image_of_question[row], -len(questions[row])))
    with tqdm(total=len(questions), desc="questions", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            shown = list(dict.fromkeys(image_of_question[row] for row in rows))
            batch = [images[image] for image in shown]
            asked, places = [questions[row] for row in rows], [shown.index(image_of_question[row]) for row in rows]
            for row, text in zip(rows, answer(batch, asked, places), strict=True):
                found[row] = text.strip()
            del batch  # or the images of two batches would be in memory while the next is read
            bar.update(len(rows))
    return found


def _check_lengths(questions: Sequence[str], image_of_question: Sequence[int]) -> None:
    if not questions or len(questions) != len(image_of_question):
        raise ValueError(
            f"{len(questions)} questions but {len(image_of_question)} entries in image_of_question: give equal numbers."
        )


__all__ = ["Chatting", "Prompting", "answer_questions", "caption_images", "choose_answers"]
