"""Collators: examples in, a batch of tensors out."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..sources.images import load_image
from .augment import Augmentation
from .pairs import Pair
from .questions import Question


def pair_id(value: Any) -> int:
    """A 63-bit integer that stands for an id; the same on every rank and in every run."""
    if isinstance(value, int | np.integer) and -(2**63) <= value < 2**63:
        return int(value)
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


class ImageTextCollator:
    """What the collators share: pictures to pixels, texts to tokens, and features from a cache in place of either.

    Args:
        processor: The model's processor.
        augmentation: Random changes of the pictures, seeded by each example; None for evaluation.
        text_features: Pooled outputs of a locked text tower by caption, each of shape `(hidden,)`. A batch whose
            captions are all there carries `text_features` instead of `input_ids`.
        vision_features (`torch.FloatTensor` of shape `(rows, hidden)`): Pooled outputs of a locked image tower by row,
            which replace `pixel_values`. Refused together with an augmentation, which would change them.

    Raises:
        ValueError: for cached image features together with an augmentation.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        text_features: Mapping[str, torch.Tensor] | None = None,
        vision_features: torch.Tensor | None = None,
    ):
        if augmentation is not None and vision_features is not None:
            raise ValueError("Cached image features cannot be augmented: leave out one of the two.")
        self.processor = processor
        self.augmentation = augmentation
        self.text_features = text_features or {}
        self.vision_features = vision_features

    def texts(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Tokens, or the cached features of all captions."""
        if all(caption in self.text_features for caption in captions):
            return {"text_features": torch.stack([self.text_features[caption] for caption in captions])}
        tokens = self.processor(text=captions)
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def images(self, pairs: Sequence[Pair] | Sequence[Question]) -> dict[str, torch.Tensor]:
        """Pixels (augmented where asked), or the cached features of all rows."""
        if self.vision_features is not None:
            return {"vision_features": self.vision_features[[pair["index"] for pair in pairs]]}
        images = [load_image(pair["image"], where=f"row {pair['index']}") for pair in pairs]
        if self.augmentation is None:
            return {"pixel_values": self.processor(images=images)["pixel_values"]}
        return {"pixel_values": self.augment(self.augmentation, images, [pair["seed"] for pair in pairs])}

    def augment(self, augmentation: Augmentation, images: list[Image.Image], seeds: list[int]) -> torch.Tensor:
        """Augmented, normalised pixels of shape `(batch, 3, size, size)`; the augmentation sees the transparency."""
        image_processor = self.processor.image_processor
        images = [image if image.mode == "RGBA" else image_processor.process_image(image) for image in images]
        pixels = augmentation(images, image_processor.size["height"], seeds)
        mean = torch.tensor(image_processor.image_mean).view(1, -1, 1, 1)
        std = torch.tensor(image_processor.image_std).view(1, -1, 1, 1)
        return (pixels - mean) / std


class ContrastiveCollator(ImageTextCollator):
    """Turns [`Pair`]s into the inputs of a contrastive model; arguments as of [`ImageTextCollator`].

    Returns:
        On call: `pixel_values` (or `vision_features`), `input_ids` and `attention_mask` (or `text_features`), and
        `pair_ids` of shape `(batch,)`.
    """

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        batch = self.images(pairs) | self.texts([pair["caption"] for pair in pairs])
        batch["pair_ids"] = torch.tensor([pair_id(pair["id"]) for pair in pairs])
        return batch


class CaptionCollator(ImageTextCollator):
    """Turns [`Pair`]s into the inputs of a model that writes captions: [`ContrastiveCollator`]'s, with `labels`.

    Labels are the captions' tokens, -100 at padding and at the prompt.

    Args:
        processor: The model's processor.
        augmentation: See [`ImageTextCollator`].
        prompt: Begins every caption and is not learned (BLIP, section 5.2: "a picture of ").
        pair_ids: Whether to give `pair_ids`, for models that contrast the captions as well.
        vision_features: See [`ImageTextCollator`].
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        prompt: str = "",
        pair_ids: bool = True,
        vision_features: torch.Tensor | None = None,
    ):
        super().__init__(processor, augmentation, vision_features=vision_features)
        self.prompt = f"{prompt.strip()} " if prompt.strip() else ""
        self.pair_ids = pair_ids
        # Without the [SEP] at its end.
        self.prompt_length = processor(text=[self.prompt])["input_ids"].shape[1] - 1 if self.prompt else 0
        longest = processor.tokenizer.model_max_length
        if self.prompt_length + 1 >= longest:
            raise ValueError(f"The prompt {prompt!r} leaves no room for captions in {longest} tokens: shorten it.")

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        batch = self.images(pairs) | self.texts([self.prompt + pair["caption"] for pair in pairs])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : self.prompt_length] = -100
        batch["labels"] = labels
        if self.pair_ids:
            batch["pair_ids"] = torch.tensor([pair_id(pair["id"]) for pair in pairs])
        return batch


class QuestionCollator(ImageTextCollator):
    """Turns [`Question`]s into the inputs of a model that answers them.

    Args:
        processor: The model's processor.
        augmentation: See [`ImageTextCollator`].

    Returns:
        On call: `pixel_values`, the questions' `input_ids` and `attention_mask`, and of all answers `labels` of shape
        `(answers, length)`, -100 at padding, `answer_index` and `answer_weights` of shape `(answers,)`.
    """

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        batch = self.images(questions) | self.texts([question["question"] for question in questions])
        answers = self.processor(text=[answer for question in questions for answer in question["answers"]])
        batch["labels"] = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        counts = torch.tensor([len(question["answers"]) for question in questions])
        batch["answer_index"] = torch.arange(len(questions)).repeat_interleave(counts)
        batch["answer_weights"] = torch.tensor([w for question in questions for w in question["weights"]])
        return batch


__all__ = ["CaptionCollator", "ContrastiveCollator", "QuestionCollator", "pair_id"]
