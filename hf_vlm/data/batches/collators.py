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
    """A 63-bit integer for an id, equal on every rank and in every run."""
    if isinstance(value, int | np.integer) and -(2**63) <= value < 2**63:
        return int(value)
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


class ImageTextCollator:
    """Base class of the collators: images to pixels, texts to tokens, or cached features in place of either.

    Args:
        processor: The model's processor.
        augmentation: Random augmentation of the images, seeded by each example; None for evaluation.
        text_features: Pooled outputs of a frozen text tower by caption, each of shape `(hidden,)`. If the features of
            all captions are cached, the batch contains `text_features` in place of `input_ids`.
        vision_features (`torch.FloatTensor` of shape `(rows, hidden)`): Pooled outputs of a frozen image tower by row;
            they replace `pixel_values`. They cannot be combined with an augmentation.

    Raises:
        ValueError: for cached image features combined with an augmentation.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        text_features: Mapping[str, torch.Tensor] | None = None,
        vision_features: torch.Tensor | None = None,
    ):
        if augmentation is not None and vision_features is not None:
            raise ValueError("Cached image features cannot be augmented: leave out the cache or the augmentation.")
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
        """Pixels, augmented if there is an augmentation, or the cached features of all rows."""
        if self.vision_features is not None:
            return {"vision_features": self.vision_features[[pair["index"] for pair in pairs]]}
        images = [load_image(pair["image"], where=f"row {pair['index']}") for pair in pairs]
        if self.augmentation is None:
            return {"pixel_values": self.processor(images=images)["pixel_values"]}
        return {"pixel_values": self.augment(self.augmentation, images, [pair["seed"] for pair in pairs])}

    def augment(self, augmentation: Augmentation, images: list[Image.Image], seeds: list[int]) -> torch.Tensor:
        """Augmented, normalised pixels of shape `(batch, 3, size, size)`; RGBA images keep their transparency."""
        image_processor = self.processor.image_processor
        images = [image if image.mode == "RGBA" else image_processor.process_image(image) for image in images]
        pixels = augmentation(images, image_processor.size["height"], seeds)
        mean = torch.tensor(image_processor.image_mean).view(1, -1, 1, 1)
        std = torch.tensor(image_processor.image_std).view(1, -1, 1, 1)
        return (pixels - mean) / std


class ContrastiveCollator(ImageTextCollator):
    """Turn [`Pair`]s into the inputs of a contrastive model; arguments are those of [`ImageTextCollator`].

    Returns:
        On call: `pixel_values` (or `vision_features`), `input_ids` and `attention_mask` (or `text_features`), and
        `pair_ids` of shape `(batch,)`.
    """

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        batch = self.images(pairs) | self.texts([pair["caption"] for pair in pairs])
        batch["pair_ids"] = torch.tensor([pair_id(pair["id"]) for pair in pairs])
        return batch


class CaptionCollator(ImageTextCollator):
    """Turn [`Pair`]s into the inputs of a captioning model: those of [`ContrastiveCollator`], and `labels`.

    Labels are the captions' tokens, -100 at padding and in the prompt.

    Args:
        processor: The model's processor.
        augmentation: See [`ImageTextCollator`].
        prompt: Text before every caption; it is not supervised (BLIP, section 5.2: "a picture of ").
        pair_ids: Whether to add `pair_ids`, for models with a contrastive loss.
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
        # Minus the [SEP] at its end.
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
    """Turn [`Question`]s into the inputs of a question-answering model.

    Args:
        processor: The model's processor.
        augmentation: See [`ImageTextCollator`].

    Returns:
        On call: `pixel_values`; the questions' `input_ids` and `attention_mask`; for all answers `labels` of shape
        `(answers, length)`, -100 at padding, and `answer_index` and `answer_weights` of shape `(answers,)`.
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
