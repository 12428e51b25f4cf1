"""Processors of BLIP-2 and InstructBLIP: placeholders, sides of padding, cuts, saving."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Blip2Processor, InstructBlipProcessor, ProcessorMixin

from cases import tiny, tiny_blip2
from hf_vlm import VlmBlip2Processor


def test_first_stage_texts_are_cut_and_padded_on_the_right() -> None:
    processor = tiny_blip2.stage1_processor()
    assert processor.tokenizer.convert_tokens_to_ids("[DEC]") == tiny_blip2.DEC
    inputs = processor(images=[tiny.image()] * 2, text=["a " * 30, "tree"])
    assert inputs["input_ids"].shape == (2, tiny.BLIP_LENGTH)
    assert inputs["attention_mask"][1].tolist() == [1] * 3 + [0] * 13
    assert inputs["pixel_values"].shape == (2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}


@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_an_image_becomes_as_many_placeholders_as_queries(pad_token: str | None) -> None:
    processor = tiny_blip2.stage2_processor(pad_token=pad_token)
    inputs = processor(images=[tiny.image(seed=i) for i in range(2)], text=["<image> tree", "<image> a dog"])
    found = (inputs["input_ids"] == tiny_blip2.IMAGE_TOKEN_ID).sum(dim=1)
    assert found.tolist() == [tiny_blip2.QUERIES, tiny_blip2.QUERIES]
    assert inputs["attention_mask"][:, -1].all()
    assert inputs["attention_mask"][0, 0] == 0


@pytest.mark.parametrize("text", ["<image> a <image> dog", "a dog", "a <image> dog"])
def test_a_text_begins_with_its_only_placeholder(text: str) -> None:
    with pytest.raises(ValueError, match="Each text has one image and begins with <image>, once"):
        tiny_blip2.stage2_processor()(images=[tiny.image()], text=[text])
    with pytest.raises(ValueError, match="got 1 of them for 2 images"):
        tiny_blip2.stage2_processor()(images=[tiny.image()] * 2, text=["<image> a dog"])


def test_adding_the_placeholder_twice_adds_one() -> None:
    tokenizer = tiny_blip2.stage2_processor().tokenizer
    again = VlmBlip2Processor.for_language_model(tiny_blip2.image_processor(), tokenizer, 7)
    assert (len(again.tokenizer), again.image_token_id) == (len(tiny.VOCABULARY) + 1, tiny_blip2.IMAGE_TOKEN_ID)


def test_the_instruction_is_read_without_placeholders() -> None:
    inputs = tiny_blip2.instruct_processor()(
        images=[tiny.image()] * 2, text=["<image> red cat", "<image> a dog on the tree"]
    )
    alone = tiny_blip2.stage1_processor()(text=["red cat", "a dog on the tree"])
    assert inputs["qformer_input_ids"].tolist() == alone["input_ids"].tolist()
    assert inputs["qformer_attention_mask"].tolist() == alone["attention_mask"].tolist()


@pytest.mark.parametrize("kind", ["stage1", "stage2", "instruct"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    processor = {
        "stage1": tiny_blip2.stage1_processor,
        "stage2": tiny_blip2.stage2_processor,
        "instruct": tiny_blip2.instruct_processor,
    }[kind]()
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.num_query_tokens == processor.num_query_tokens
    texts = ["a red cat", "tree"] if kind == "stage1" else ["<image> a red cat", "<image> tree"]
    pictures = [tiny.image(seed=i) for i in range(2)]
    found, expected = loaded(images=pictures, text=texts), processor(images=pictures, text=texts)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tolist() == tensor.tolist(), name


# --- options of the call


TEXTS = ["<image>a red cat", "<image>two dog on the left of a green house", "<image>"]
PAIR = {"blip2": tiny_blip2.stage2_processor, "instructblip": tiny_blip2.instruct_processor}


def native(family: str) -> ProcessorMixin:
    """transformers' own processor of the same tokenizers; its image processor is ours."""
    ours = PAIR[family]()
    parts = (ours.image_processor, ours.tokenizer)
    if family == "blip2":
        return Blip2Processor(*parts, num_query_tokens=tiny_blip2.QUERIES)
    return InstructBlipProcessor(*parts, ours.qformer_tokenizer, num_query_tokens=tiny_blip2.QUERIES)


def unpadded(inputs: dict, prefix: str = "") -> list[list[int]]:
    pairs = zip(inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"], strict=True)
    return [[int(token) for token, kept in zip(ids, mask, strict=True) if kept] for ids, mask in pairs]


OPTIONS = [
    {"padding": "max_length", "max_length": 14},
    {"truncation": True, "max_length": 9},
    {"truncation": True, "max_length": 12, "padding": "max_length"},
    {"text_kwargs": {"truncation": True, "max_length": 9, "padding": True}},
    {"padding": False, "return_tensors": None},
    {"padding": "longest", "return_tensors": "np"},
    {"return_tensors": "np", "truncation": True, "max_length": 7, "padding": "max_length"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", PAIR)
def test_options_are_those_of_transformers_processors(family: str, options: dict) -> None:
    processor, pictures = PAIR[family](), [tiny.image(seed=i) for i in range(3)]
    inputs = processor(images=pictures, text=TEXTS, **options)
    words = [text.removeprefix("<image>") for text in TEXTS]
    other = {"padding": True, "return_tensors": "pt", **options} if "text_kwargs" not in options else options
    expected = native(family)(images=pictures, text=words, **other)
    assert unpadded(inputs) == unpadded(expected)
    assert all(
        row[: tiny_blip2.QUERIES] == [tiny_blip2.IMAGE_TOKEN_ID] * tiny_blip2.QUERIES for row in unpadded(inputs)
    )
    assert [len(row) for row in inputs["input_ids"]] == [len(row) for row in expected["input_ids"]]
    kind = {"np": np.ndarray, None: list}.get(options.get("return_tensors", "pt"), torch.Tensor)
    assert all(isinstance(value, kind) for name, value in inputs.items() if name != "pixel_values")
    assert kind is list or isinstance(inputs["pixel_values"], kind)
    if family == "instructblip":
        assert unpadded(inputs, "qformer_") == unpadded(expected, "qformer_")
        lengths = [[len(row) for row in one["qformer_input_ids"]] for one in (inputs, expected)]
        assert lengths[0] == lengths[1]


@pytest.mark.parametrize("family", PAIR)
def test_lengths_are_multiples_with_the_placeholders(family: str) -> None:
    """transformers pads the words to a multiple and then adds the placeholders, which is no multiple."""
    inputs = PAIR[family]()(text=TEXTS, pad_to_multiple_of=8)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (3, 16)
    assert unpadded(inputs) == unpadded(PAIR[family]()(text=TEXTS))
    if family == "instructblip":
        assert inputs["qformer_input_ids"].shape == (3, 16)


@pytest.mark.parametrize("family", PAIR)
def test_placeholders_are_never_truncated(family: str) -> None:
    with pytest.raises(ValueError, match="max_length=4 leaves no room for a text after 4 placeholders"):
        PAIR[family]()(text=TEXTS, truncation=True, max_length=4)
    processor = PAIR[family]()
    processor.is_encoder_decoder = False
    inputs = processor(text=TEXTS, truncation=True, max_length=7, return_attention_mask=False)
    assert [len(row) for row in inputs["input_ids"]] == [7, 7, 7]
    assert ("attention_mask" in inputs) is False
