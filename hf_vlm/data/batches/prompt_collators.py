"""Batches for models that read an image and a prompt and go on writing with a language model.

- Decoder-only: one placeholder for each query, the tokenizer's start token if it adds one, the prompt's tokens, the
  response's, and the end token. Only the response and its end are learned.
- Encoder-decoder: the encoder reads placeholders and prompt, the response is the target.
- Prompt and response are tokenized apart, so that a generating model meets the tokens that it was trained with.
- To train, rows are padded on the right; to generate, on the left.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import ProcessorMixin

from ..sources.images import load_image
from ..sources.rows import Rows
from .augment import Augmentation
from .collators import ImageTextCollator
from .pairs import Pair

PROMPT_END = "\n"
"""What ends a prompt in the default chat template of BLIP-2's and InstructBLIP's processors."""


class FeatureRows(Protocol):
    """Features by row number, such as [`CachedFeatures`]: a list of n rows gives `(n, tokens, width)`."""

    def __getitem__(self, rows: Any, /) -> torch.Tensor: ...


class PromptBatches:
    """Pads the token ids of prompts and responses, as the processor gives them, to batches.

    Args:
        processor: A [`VlmBlip2Processor`] of the second stage or a [`VlmInstructBlipProcessor`].
        is_encoder_decoder: Whether the language model has an encoder, which then reads the prompt.
        with_qformer: Whether the Q-Former reads the prompts as well (InstructBLIP).

    Raises:
        ValueError: if the tokenizer has no end or no padding token.
    """

    def __init__(self, processor: ProcessorMixin, is_encoder_decoder: bool = False, with_qformer: bool = False):
        self.processor = processor
        self.is_encoder_decoder = is_encoder_decoder
        self.with_qformer = with_qformer
        tokenizer = processor.tokenizer
        for name, token in {"eos_token": tokenizer.eos_token_id, "pad_token": tokenizer.pad_token_id}.items():
            if token is None:
                raise ValueError(f"The tokenizer has no {name}: set tokenizer.{name}.")

    def to_train(
        self, prompts: Sequence[str], responses: Sequence[str], places: Sequence[str], max_length: int
    ) -> dict[str, torch.Tensor]:
        """Right-padded `input_ids`, `attention_mask` and `labels`, and the inputs of the Q-Former.

        Args:
            prompts: Rendered prompts, from the processor's `prompt_texts`.
            responses: Rendered responses, from the processor's `answer_texts`.
            places: Names of the rows in errors.
            max_length: See [`PromptCollator`].
        """
        inputs, labels = [], []
        num_queries = self.processor.num_query_tokens
        prompt_ids = self.processor.prompt_tokens(prompts, self.is_encoder_decoder, places)
        response_ids = self.processor.answer_tokens(responses)
        for prompt, response, text, where in zip(prompt_ids, response_ids, responses, places, strict=True):
            if len(response) == 1:
                raise _empty(where, text)
            length = len(prompt) - num_queries
            if length >= (max_length + 1 if self.is_encoder_decoder else max_length):
                raise ValueError(
                    f"{where}: a prompt of {length} tokens leaves no room for a response of {len(response)} in"
                    f" max_length={max_length}: shorten the instruction or raise max_length."
                )
            if self.is_encoder_decoder:
                inputs.append(prompt)
                labels.append(response[:max_length])
            else:
                response = response[: max_length - length]
                inputs.append(prompt + response)
                labels.append([-100] * len(prompt) + response)
        return self._padded(inputs) | {"labels": _padded(labels, -100)} | self._for_qformer(prompts)

    def to_generate(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Left-padded `input_ids` and `attention_mask` of rendered prompts, and the inputs of the Q-Former."""
        places = [f"instruction {number}" for number in range(len(prompts))]
        rows = self.processor.prompt_tokens(prompts, self.is_encoder_decoder, places)
        return self._padded(rows, left=True) | self._for_qformer(prompts)

    def _padded(self, rows: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`; the mask is built by position, since the padding may be the end token."""
        mask = [[1] * len(row) for row in rows]
        return {
            "input_ids": _padded(rows, self.processor.tokenizer.pad_token_id, left),
            "attention_mask": _padded(mask, 0, left),
        }

    def _for_qformer(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return self.processor.qformer_tokens(prompts) if self.with_qformer else {}


class PromptCollator:
    """Turns rows of instructions and responses into the inputs of a model that answers them.

    Rows are dicts with `instruction` (may be empty), `response`, and either an `image` or `source` and `index`, which
    say where the picture is found.

    Args:
        processor: With `tokenizer`, `image_processor`, `image_token_id` and `num_query_tokens`, and `qformer_tokenizer`
            if the Q-Former reads the instruction.
        sources: Rows with an `image` by name of the source.
        vision_features: Features of a frozen image tower by name of the source, which replace all pictures.
        max_length: Most tokens of prompt, response and end, without the placeholders; of an encoder-decoder, of the
            prompt and of the response each. A longer response is cut, and then does not end with the end token.
        with_qformer: Whether to give the instruction to the Q-Former as well (InstructBLIP).
        is_encoder_decoder: Whether the language model has an encoder.

    Returns:
        On call: `input_ids`, `attention_mask` and `labels` (-100 but at the response), of shape `(batch, length)`;
        `pixel_values` or `vision_features` of shape `(batch, tokens, width)`; with the Q-Former `qformer_input_ids` and
        `qformer_attention_mask`.

    Raises:
        ValueError: on call, naming the row: if a response is empty, a prompt leaves no room for it or holds an image
            placeholder, or the row's source is unknown.
        ImageError: on call, if a picture cannot be read.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        sources: Mapping[str, Rows] | None = None,
        vision_features: Mapping[str, FeatureRows] | None = None,
        max_length: int = 128,
        with_qformer: bool = False,
        is_encoder_decoder: bool = False,
    ):
        self.processor = processor
        self.sources = sources or {}
        self.vision_features = vision_features
        self.max_length = max_length
        self.batches = PromptBatches(processor, is_encoder_decoder, with_qformer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        instructions = [row["instruction"] for row in rows]
        places = [_where(row, number) for number, row in enumerate(rows)]
        responses = [_filled(row["response"], where) for row, where in zip(rows, places, strict=True)]
        prompts = self.processor.prompt_texts(instructions)
        answers = self.processor.answer_texts(instructions, responses)
        batch = self.batches.to_train(prompts, answers, places, self.max_length)
        if self.vision_features is not None:
            return batch | {"vision_features": self._features(rows, self.vision_features)}
        images = [load_image(self._image(row, where), where) for row, where in zip(rows, places, strict=True)]
        return batch | {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}

    def _image(self, row: Mapping[str, Any], where: str) -> Any:
        if row.get("image") is not None:
            return row["image"]
        return _found(self.sources, row, where)[row["index"]]["image"]

    def _features(self, rows: Sequence[Mapping[str, Any]], features: Mapping[str, FeatureRows]) -> torch.Tensor:
        """Read source by source, then put into the order of the rows."""
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            _found(features, row, _where(row, number))
            groups.setdefault(row["source"], []).append(number)
        parts = [features[source][[rows[number]["index"] for number in group]] for source, group in groups.items()]
        shapes = {source: tuple(part.shape[1:]) for source, part in zip(groups, parts, strict=True)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Features of the sources differ in their shape, {shapes}: cache them by one tower.")
        order = torch.tensor([number for group in groups.values() for number in group])
        return torch.cat(parts)[order.argsort()]


class CaptionPromptCollator(ImageTextCollator):
    """Turns [`Pair`]s into the inputs of a model that writes captions with a language model.

    The caption is the response to the prompt. Of an encoder-decoder, the caption is split at a word that the pair's
    seed draws: what is before it goes to the encoder, the rest is the target (BLIP-2, section 3.3).

    Args:
        processor: See [`PromptCollator`].
        augmentation: Random changes of the pictures, seeded by each pair; None for evaluation.
        prompt: Begins every example and is not learned.
        vision_features: Features of a frozen image tower by row, which replace `pixel_values`; refused together with
            an augmentation.
        is_encoder_decoder: Whether the language model has an encoder.
        max_length: See [`PromptCollator`].

    Returns:
        On call: as of [`PromptCollator`], without the inputs of the Q-Former.

    Raises:
        ValueError: as of [`PromptCollator`], and for cached features together with an augmentation.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        prompt: str = "",
        vision_features: FeatureRows | None = None,
        is_encoder_decoder: bool = False,
        max_length: int = 128,
    ):
        super().__init__(processor, augmentation, vision_features=cast(torch.Tensor | None, vision_features))
        self.prompt = prompt
        self.max_length = max_length
        self.batches = PromptBatches(processor, is_encoder_decoder)

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        places = [f"row {pair['index']}" for pair in pairs]
        parts = [self._split(pair) if self.batches.is_encoder_decoder else ("", pair["caption"]) for pair in pairs]
        responses = [_filled(rest, where) for (_, rest), where in zip(parts, places, strict=True)]
        instructions = [self.prompt] * len(pairs)
        texts = self.processor.prompt_texts(instructions)
        prompts = [text + first for text, (first, _) in zip(texts, parts, strict=True)]
        answers = self.processor.answer_texts(instructions, responses)
        return self.batches.to_train(prompts, answers, places, self.max_length) | self.images(pairs)

    def _split(self, pair: Pair) -> tuple[str, str]:
        words = pair["caption"].split()
        place = int(np.random.default_rng(pair["seed"]).integers(max(1, len(words))))
        return " ".join(words[:place]), " ".join(words[place:])


def prompt_inputs(
    processor: ProcessorMixin, instructions: Sequence[str], with_qformer: bool = False, is_encoder_decoder: bool = False
) -> dict[str, torch.Tensor]:
    """What a model is given to write a response to each instruction, but for the pictures.

    Args:
        processor, with_qformer, is_encoder_decoder: See [`PromptCollator`].
        instructions: The instructions; each may be empty.

    Returns:
        `input_ids` and `attention_mask` of shape `(batch, length)`, padded on the left; with the Q-Former
        `qformer_input_ids` and `qformer_attention_mask`, padded on the right.

    Raises:
        ValueError: if an instruction holds an image placeholder or is longer than the Q-Former reads.
    """
    batches = PromptBatches(processor, is_encoder_decoder, with_qformer)
    return batches.to_generate(processor.prompt_texts(instructions))


def _filled(response: Any, where: str) -> str:
    """A response that is not empty."""
    if isinstance(response, str) and response.strip():
        return response
    raise _empty(where, response)


def _empty(where: str, response: Any) -> ValueError:
    return ValueError(f"{where} has an empty response: {response!r}. Remove it or give it a text.")


def _where(row: Mapping[str, Any], number: int) -> str:
    return f"row {row['index']} of {row['source']}" if "source" in row and "index" in row else f"row {number}"


def _found(known: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Any:
    if row.get("source") not in known:
        raise ValueError(f"{where}: no pictures of {row.get('source')!r} were given, only of {sorted(known)}.")
    return known[row["source"]]


def _padded(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


__all__ = ["PROMPT_END", "CaptionPromptCollator", "FeatureRows", "PromptBatches", "PromptCollator", "prompt_inputs"]
