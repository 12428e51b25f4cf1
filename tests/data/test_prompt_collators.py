"""Batches for language models that see an image: where every token lies, what is learned, what is refused."""

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from cases.tiny import BLIP_VOCABULARY, CLS, END, PAD, SEP, START, VOCABULARY, blip_tokenizer, image, tokenizer
from hf_vlm import VlmImageProcessor, VlmInstructBlipProcessor
from hf_vlm.data import Augmentation, CaptionPromptCollator, PromptCollator, prompt_inputs

IMAGE, QUERIES = 900, 2
PLACES = [IMAGE] * QUERIES
FEATURES = {"a": torch.arange(12.0).view(4, 3, 1), "b": 100 + torch.arange(12.0).view(4, 3, 1)}


def words(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]


def make_processor(template: str = "$A", **options) -> VlmInstructBlipProcessor:
    """A tokenizer of one token a word that puts what the template says around a text."""
    llm: PreTrainedTokenizerFast = tokenizer(**options)
    special = [("<start>", START), ("<end>", END)]
    llm.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    images = VlmImageProcessor(size={"height": 8, "width": 8})
    processor = VlmInstructBlipProcessor(images, llm, blip_tokenizer(), QUERIES)
    processor.image_token_id = IMAGE
    return processor


def make_row(instruction: str = "a red cat", response: str = "two dog", index: int = 0, source: str = "a") -> dict:
    return {"source": source, "index": index, "instruction": instruction, "response": response}


@pytest.mark.parametrize(
    ("template", "before"), [("$A", []), ("<start> $A", [START]), ("<start> $A <end>", [START]), ("$A <end>", [])]
)
def test_decoder_only_layout(template: str, before: list[int]) -> None:
    rows = [make_row(), make_row("the", "left right of a", 1), make_row("", "blue", 2)]
    batch = PromptCollator(make_processor(template), vision_features=FEATURES)(rows)
    for number, (prompt, response) in enumerate([("a red cat", "two dog"), ("the", "left right of a"), ("", "blue")]):
        head = PLACES + before + words(prompt)
        tail = [*words(response), END]
        rest = batch["input_ids"].shape[1] - len(head) - len(tail)
        assert batch["input_ids"][number].tolist() == head + tail + [PAD] * rest
        assert batch["labels"][number].tolist() == [-100] * len(head) + tail + [-100] * rest
        assert batch["attention_mask"][number].tolist() == [1] * len(head + tail) + [0] * rest
    assert batch["input_ids"].shape[1] == QUERIES + len(before) + 6


@pytest.mark.parametrize(("template", "after"), [("$A <end>", [END]), ("$A", [])])
def test_encoder_decoder_layout(template: str, after: list[int]) -> None:
    collator = PromptCollator(make_processor(template), vision_features=FEATURES, is_encoder_decoder=True)
    batch = collator([make_row(), make_row("the", "left right of", 1)])
    short = PLACES + words("the") + after
    assert batch["input_ids"].tolist() == [PLACES + words("a red cat") + after, [*short, PAD, PAD]]
    assert batch["labels"].tolist() == [[*words("two dog"), END, -100], [*words("left right of"), END]]
    assert batch["attention_mask"][1].tolist() == [1] * len(short) + [0, 0]


def test_padding_that_is_the_end_token_hides_no_label() -> None:
    processor = make_processor(pad_token="<end>")
    batch = PromptCollator(processor, vision_features=FEATURES)([make_row(), make_row("a", "a", 1)])
    assert batch["labels"][1].tolist() == [-100] * 3 + [*words("a"), END] + [-100] * 3
    assert batch["attention_mask"][1].sum() == 5


@pytest.mark.parametrize("instruction", ["a red cat", "", "the"])
def test_the_newline_ends_prompts_alone(instruction: str) -> None:
    processor = make_processor()
    asked = []
    tokenize = processor.tokenizer

    class Recorder:
        def __call__(self, text, **options):
            asked.append(text)
            return tokenize(text, **options)

        def __getattr__(self, name):
            return getattr(tokenize, name)

    processor.tokenizer = Recorder()
    PromptCollator(processor, vision_features=FEATURES)([make_row(instruction)])
    assert asked[-2:] == [[f"{instruction}\n" if instruction else ""], ["two dog"]]


def test_the_response_is_cut_at_its_end() -> None:
    row = make_row("a red cat", "left right of the dog")
    processor = make_processor()
    batch = PromptCollator(processor, vision_features=FEATURES, max_length=6)([row])
    assert batch["input_ids"][0].tolist() == PLACES + words("a red cat left right of")
    assert batch["labels"][0, -3:].tolist() == words("left right of")
    whole = PromptCollator(processor, vision_features=FEATURES, max_length=9)([row])
    assert whole["labels"][0, -1] == END
    assert whole["input_ids"].shape[1] == QUERIES + 9
    target = PromptCollator(processor, vision_features=FEATURES, max_length=3, is_encoder_decoder=True)([row])
    assert target["input_ids"][0].tolist() == PLACES + words("a red cat")
    assert target["labels"][0].tolist() == words("left right of")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row("a red cat and dog", "tree", 3, "b"), r"row 3 of b: a prompt of 5 tokens .* of 2 in max_length=5"),
        (make_row(response="", index=2), "row 2 of a has an empty response: ''"),
        (make_row(response=" \n", index=2), "row 2 of a has an empty response"),
        (make_row(source="c"), r"row 0 of c: there are no images of the source 'c', only of \['a', 'b'\]"),
    ],
)
def test_refused_rows(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptCollator(make_processor(), vision_features=FEATURES, max_length=5)([row])


def test_a_placeholder_in_a_response_is_refused() -> None:
    processor = make_processor()
    processor.image_token_id = VOCABULARY.index("tree")
    row = {**make_row("a dog"), "response": "a tree"}
    with pytest.raises(ValueError, match="row 0 of a has the image placeholder in its response: 'a tree'"):
        PromptCollator(processor, vision_features=FEATURES)([row])


def test_a_placeholder_in_a_text_is_refused() -> None:
    processor = make_processor()
    processor.image_token_id = VOCABULARY.index("tree")
    with pytest.raises(ValueError, match="row 0 of a has the image placeholder in its text: 'a tree"):
        PromptCollator(processor, vision_features=FEATURES)([make_row("a tree")])
    with pytest.raises(ValueError, match="instruction 1 has the image placeholder"):
        prompt_inputs(processor, ["a", "tree"])


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_tokenizer_without_end_or_padding_is_refused(name: str) -> None:
    processor = make_processor()
    setattr(processor.tokenizer, name, None)
    with pytest.raises(ValueError, match=f"has no {name}"):
        PromptCollator(processor)


def test_features_of_several_sources_come_in_the_order_of_the_rows() -> None:
    rows = [make_row(index=index, source=source) for source, index in (("b", 3), ("a", 1), ("b", 0), ("a", 2))]
    features = PromptCollator(make_processor(), vision_features=FEATURES)(rows)["vision_features"]
    expected = [FEATURES["b"][3], FEATURES["a"][1], FEATURES["b"][0], FEATURES["a"][2]]
    assert torch.equal(features, torch.stack(expected))


def test_pictures_from_a_source_and_from_the_row() -> None:
    processor = make_processor()
    pictures = [image(seed=seed) for seed in range(3)]
    sources = {"a": [{"image": picture} for picture in pictures[:2]]}
    rows = [make_row(index=1), {"image": pictures[2], "instruction": "a", "response": "a"}, make_row(index=0)]
    batch = PromptCollator(processor, sources)(rows)
    expected = processor.image_processor([pictures[1], pictures[2], pictures[0]], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert "vision_features" not in batch
    with pytest.raises(ValueError, match="row 1 of d: there are no images of the source 'd'"):
        PromptCollator(processor, sources)([make_row(index=1, source="d")])


def test_the_qformer_reads_the_instruction_alone() -> None:
    collator = PromptCollator(make_processor(), vision_features=FEATURES, with_qformer=True)
    batch = collator([make_row("a red cat"), make_row("the")])
    vocabulary = BLIP_VOCABULARY.index
    first = [CLS, vocabulary("a"), vocabulary("red"), vocabulary("cat"), SEP]
    assert batch["qformer_input_ids"].tolist() == [first, [CLS, vocabulary("the"), SEP, 0, 0]]
    assert batch["qformer_attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="Instruction 1 of the batch has 22 tokens, but the Q-Former reads 16"):
        collator([make_row("a"), make_row("red " * 20)])


@pytest.mark.parametrize(("template", "before"), [("$A", []), ("<start> $A <end>", [START])])
def test_prompts_for_generation_are_padded_on_the_left(template: str, before: list[int]) -> None:
    processor = make_processor(template)
    batch = prompt_inputs(processor, ["a red cat", "", "the"], with_qformer=True)
    rows = [PLACES + before + words(text) for text in ("a red cat", "", "the")]
    longest = len(rows[0])
    assert batch["input_ids"].tolist() == [[PAD] * (longest - len(row)) + row for row in rows]
    assert batch["attention_mask"].tolist() == [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    assert batch["qformer_input_ids"][1].tolist() == [CLS, SEP, 0, 0, 0]
    assert set(prompt_inputs(processor, ["a"])) == {"input_ids", "attention_mask"}


def test_prompts_for_generation_are_those_of_training() -> None:
    for is_encoder_decoder in (False, True):
        processor = make_processor("<start> $A <end>")
        trained = PromptCollator(processor, vision_features=FEATURES, is_encoder_decoder=is_encoder_decoder)(
            [make_row()]
        )
        prompt = prompt_inputs(processor, ["a red cat"], is_encoder_decoder=is_encoder_decoder)["input_ids"][0]
        assert torch.equal(trained["input_ids"][0, : len(prompt)], prompt)
        assert is_encoder_decoder or trained["labels"][0, len(prompt)] == words("two")[0]


def make_pairs(*captions: str, seed: int = 0) -> list[dict]:
    pairs = enumerate(captions)
    return [{"image": image(seed=i), "caption": c, "id": i, "index": 3 - i, "seed": seed + i} for i, c in pairs]


@pytest.mark.parametrize("prompt", ["", "a red "])
def test_captions_after_a_prompt(prompt: str) -> None:
    pairs = make_pairs("cat", "dog on the house")
    batch = CaptionPromptCollator(make_processor("<start> $A"), prompt=prompt, vision_features=FEATURES["a"])(pairs)
    head = [*PLACES, START, *words(prompt)]
    rows = [[*head, *words(pair["caption"]), END] for pair in pairs]
    assert batch["input_ids"].tolist() == [rows[0] + [PAD] * 3, rows[1]]
    assert batch["labels"][1].tolist() == [-100] * len(head) + rows[1][len(head) :]
    assert torch.equal(batch["vision_features"], FEATURES["a"][[3, 2]])


def test_captions_are_split_for_an_encoder_decoder() -> None:
    caption = "two dog on the left of a green house"
    collator = CaptionPromptCollator(make_processor(), vision_features=FEATURES["a"], is_encoder_decoder=True)
    cuts = set()
    for seed in range(60):
        (pair,) = make_pairs(caption, seed=seed)
        batch = collator([pair])
        source, target = batch["input_ids"][0, QUERIES:].tolist(), batch["labels"][0].tolist()
        assert source + target == [*words(caption), END]
        assert torch.equal(collator([pair])["labels"], batch["labels"])
        cuts.add(len(source))
    assert cuts == set(range(9))
    assert collator(make_pairs("tree"))["labels"][0].tolist() == [*words("tree"), END]


def test_caption_pictures_and_refusals() -> None:
    processor = make_processor()
    pairs = make_pairs("cat", "dog")

    plain = CaptionPromptCollator(processor)(pairs)["pixel_values"]
    expected = processor.image_processor([pair["image"] for pair in pairs], return_tensors="pt")["pixel_values"]
    np.testing.assert_array_equal(plain, expected)
    with pytest.raises(ValueError, match="cannot be augmented"):
        CaptionPromptCollator(processor, Augmentation(), vision_features=FEATURES["a"])
    with pytest.raises(ValueError, match="row 3 has an empty response"):
        CaptionPromptCollator(processor, is_encoder_decoder=True)(make_pairs(" "))
