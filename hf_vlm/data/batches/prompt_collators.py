"""Batches for BLIP-2 and InstructBLIP: an LLM reads an image and a prompt, and generates the response.

- The processor renders and tokenises prompts and responses, with its chat template; this module pads and labels them.
- Decoder-only: the input is the prompt, the response and the end token. Only the response and its end are supervised.
- Encoder-decoder: the encoder reads the prompt; the response is the target.
- Training pads on the right, generation on the left.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import ProcessorMixin

from ...terminal import quoted
from ..sources.images import load_image
from ..sources.rows import Rows
from .augment import Augmentation
from .collators import ImageTextCollator
from .pairs import Pair

PROMPT_END = "\n"
"""The end of a prompt in the default chat template of BLIP-2's and InstructBLIP's processors."""


class FeatureRows(Protocol):
    """Features indexed by row number, such as [`CachedFeatures`]: n row numbers give `(n, tokens, width)`."""

    def __getitem__(self, rows: Any, /) -> torch.Tensor: ...


class PromptBatches:
    """Padded batches of the token ids that the processor gives for prompts and responses.

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
            if self.processor.image_token_id in response:
                raise ValueError(f"{where} has the image placeholder in its response: {quoted(text)}. Remove it.")
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
    """Turn rows of instructions and responses into the inputs of BLIP-2 or InstructBLIP.

    Rows are dicts with `instruction` (may be empty), `response`, and either an `image`, or `source` and `index` of the
    image.

    Args:
        processor: A [`VlmBlip2Processor`] of the second stage or a [`VlmInstructBlipProcessor`].
        sources: Rows with an `image`, by name of the source.
        vision_features: Features of a frozen image tower by name of the source; they replace the images.
        max_length: Maximum number of tokens of prompt, response and end token, without placeholders. For an
            encoder-decoder, the maximum of the prompt and of the response each. A longer response is truncated and
            then has no end token.
        with_qformer: Whether the Q-Former reads the prompts as well (InstructBLIP).
        is_encoder_decoder: Whether the language model has an encoder.

    Returns:
        On call: `input_ids`, `attention_mask` and `labels` (-100 outside the response) of shape `(batch, length)`;
        `pixel_values` or `vision_features` of shape `(batch, tokens, width)`; with the Q-Former `qformer_input_ids` and
        `qformer_attention_mask`.

    Raises:
        ValueError: on call, with the row's name: if a response is empty, a prompt leaves no room for a response or
            contains an image placeholder, or the row's source is unknown.
        ImageError: on call, if an image cannot be read.
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
        """Features in the order of the rows, read source by source."""
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            _found(features, row, _where(row, number))
            groups.setdefault(row["source"], []).append(number)
        parts = [features[source][[rows[number]["index"] for number in group]] for source, group in groups.items()]
        shapes = {source: tuple(part.shape[1:]) for source, part in zip(groups, parts, strict=True)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"The sources' features differ in shape, {shapes}: cache all of them with one tower.")
        order = torch.tensor([number for group in groups.values() for number in group])
        return torch.cat(parts)[order.argsort()]


class CaptionPromptCollator(ImageTextCollator):
    """Turn [`Pair`]s into the inputs of BLIP-2's second stage.

    The caption is the response to the prompt. For an encoder-decoder, the caption is split at a random word, drawn with
    the pair's seed. The first part goes to the encoder; the rest is the target (BLIP-2, section 3.3).

    Args:
        processor: See [`PromptCollator`].
        augmentation: Random augmentation of the images, seeded by each pair; None for evaluation.
        prompt: Text before every caption; it is not supervised.
        vision_features: Features of a frozen image tower by row; they replace `pixel_values`. They cannot be combined
            with an augmentation.
        is_encoder_decoder: Whether the language model has an encoder.
        max_length: See [`PromptCollator`].

    Returns:
        On call: the batch of [`PromptCollator`], without the Q-Former's inputs.

    Raises:
        ValueError: as [`PromptCollator`], and for cached features combined with an augmentation.
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
    """Inputs of BLIP-2 or InstructBLIP for generating a response to each instruction, without the images.

    Args:
        processor, with_qformer, is_encoder_decoder: See [`PromptCollator`].
        instructions: The instructions; each may be empty.

    Returns:
        `input_ids` and `attention_mask` of shape `(batch, length)`, padded on the left; with the Q-Former
        `qformer_input_ids` and `qformer_attention_mask`, padded on the right.

    Raises:
        ValueError: if an instruction contains an image placeholder or is longer than the Q-Former's maximum.
    """
    batches = PromptBatches(processor, is_encoder_decoder, with_qformer)
    return batches.to_generate(processor.prompt_texts(instructions))


def _filled(response: Any, where: str) -> str:
    """The response, if it is not empty."""
    if isinstance(response, str) and response.strip():
        return response
    raise _empty(where, response)


def _empty(where: str, response: Any) -> ValueError:
    return ValueError(f"{where} has an empty response: {quoted(response)}. Remove the row or fill it in.")


def _where(row: Mapping[str, Any], number: int) -> str:
    return f"row {row['index']} of {row['source']}" if "source" in row and "index" in row else f"row {number}"


def _found(known: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Any:
    if row.get("source") not in known:
        raise ValueError(
            f"{where}: there are no images of the source {row.get('source')!r}, only of {sorted(known)}: pass its rows."
        )
    return known[row["source"]]


def _padded(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


__all__ = ["PROMPT_END", "CaptionPromptCollator", "FeatureRows", "PromptBatches", "PromptCollator", "prompt_inputs"]
