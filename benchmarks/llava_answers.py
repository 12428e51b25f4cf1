"""The answering contenders of `llava.py`: a batch of questions, and a second question about the same image.

Each contender is built in a separate process from a folder written by `llava_contenders.prepare`. All get the same
tensors, made by this package's processor.
"""

import copy
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import DTYPES, peak_memory, synchronize
from llava_contenders import QUESTION_WORDS, SIZES, make_pictures, make_words
from transformers import PreTrainedModel, StoppingCriteria

from hf_vlm import VlmLlavaForConditionalGeneration, VlmLlavaProcessor

Inputs = dict[str, Any]


class Answer(NamedTuple):
    """Seconds to the first token and to the last, and the new tokens of each row."""

    first: float
    whole: float
    tokens: list[list[int]]


class Clock(StoppingCriteria):
    """Records the time of the first token; never stops generation."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        if not self.first:
            synchronize(input_ids.device.type)
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Speaker:
    """A model that answers greedily with a fixed number of tokens.

    Args:
        model: The model, with its weights in the precision.
        size: A key of `SIZES`.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, model: PreTrainedModel, size: str, device: str):
        self.model, self.device = model.to(device).eval(), device
        count = SIZES[size]["answers"]["new_tokens"]
        self.options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
        self.ways: Mapping[str, Inputs] = {}

    def run(self) -> dict[str, Answer]:
        """An answer by each variant."""
        return {name: self.answer(inputs) for name, inputs in self.ways.items()}

    def answer(self, inputs: Inputs) -> Answer:
        """An answer; a given cache is copied before timing, because generation extends it."""
        inputs, clock = copy.deepcopy(inputs), Clock()
        synchronize(self.device)
        start = time.perf_counter()
        tokens = self.model.generate(**inputs, **self.options, stopping_criteria=[clock])
        synchronize(self.device)
        end = time.perf_counter()
        return Answer(clock.first - start, end - start, tokens[:, inputs["input_ids"].shape[1] :].tolist())

    def first_turn(self, inputs: Inputs, question: torch.Tensor) -> tuple[Inputs, Any]:
        """The conversation up to a second question, as tokens and mask, and the cache of the first answer."""
        output = self.model.generate(**inputs, **self.options, return_dict_in_generate=True)
        ids = torch.cat([output.sequences, question], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, output.past_key_values

    def peak_memory(self) -> int:
        """Peak memory in bytes."""
        return peak_memory(self.device)


def make_prompts(folder: Path, size: str, count: int, device: str, precision: str) -> Inputs:
    """Questions of several lengths, each about one image, padded on the left."""
    processor, chance = VlmLlavaProcessor.from_pretrained(folder / "hf_vlm"), random.Random(1)
    words = [make_words(chance, size, *QUESTION_WORDS) for _ in range(count)]
    parts = [[{"type": "image"}, {"type": "text", "text": text}] for text in words]
    chats = [[{"role": "user", "content": content}] for content in parts]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(images=make_pictures(size, count), text=texts).to(device)
    return {**inputs, "pixel_values": inputs["pixel_values"].to(DTYPES[precision])}


def make_follow_up(folder: Path, size: str, device: str) -> torch.Tensor:
    """The tokens between two answers: the end of the first, and the second question."""
    processor, question = VlmLlavaProcessor.from_pretrained(folder / "hf_vlm"), make_words(random.Random(2), size, 8, 8)
    text = "<end> " + processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)


def own_speaker(folder: Path, device: str, precision: str, size: str) -> Speaker:
    """This package's model."""
    model = VlmLlavaForConditionalGeneration.from_pretrained(folder / "hf_vlm", dtype=DTYPES[precision])
    return Speaker(model, size, device)


def native_speaker(folder: Path, device: str, precision: str, size: str) -> Speaker:
    """transformers' model."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "transformers", dtype=DTYPES[precision])
    return Speaker(model, size, device)


def build_answers(
    folder: Path, device: str, precision: str, name: str, size: str, images: int, native: bool
) -> Speaker:
    """Answers to questions about several images at once."""
    speaker = (native_speaker if native else own_speaker)(folder, device, precision, size)
    speaker.ways = {name: make_prompts(folder, size, images, device, precision)}
    return speaker


@torch.no_grad()
def build_own_turn(folder: Path, device: str, precision: str, name: str, size: str) -> Speaker:
    """The second turn of this package, from the image features and the key/value cache of the first."""
    speaker = own_speaker(folder, device, precision, size)
    inputs = make_prompts(folder, size, 1, device, precision)
    features = {"mm_encoder_outputs": {"image": speaker.model.get_image_features(inputs.pop("pixel_values"))}}
    second, cache = speaker.first_turn({**inputs, **features}, make_follow_up(folder, size, device))
    speaker.ways = {name: {**second, **features, "past_key_values": cache}}
    return speaker


def build_native_turn(folder: Path, device: str, precision: str, name: str, cached: str, size: str) -> Speaker:
    """The second turn of transformers: the whole conversation again; also with the key/value cache of the first turn.

    There the cache goes without `pixel_values`: with them, the new tokens would be expected to have the placeholders.
    """
    speaker = native_speaker(folder, device, precision, size)
    inputs = make_prompts(folder, size, 1, device, precision)
    second, cache = speaker.first_turn(inputs, make_follow_up(folder, size, device))
    speaker.ways = {
        cached: {**second, "past_key_values": cache},
        name: {**second, "pixel_values": inputs["pixel_values"]},
    }
    return speaker
