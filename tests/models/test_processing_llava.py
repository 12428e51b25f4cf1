"""LLaVA's processor: placeholders, several images a text, conversations, saving, and transformers' pipeline."""

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, pipeline

from cases import tiny, tiny_blip2, tiny_llava
from cases.tiny_llava import CHATML, SIZES
from hf_vlm import VlmImageProcessor, VlmLlavaProcessor
from hf_vlm.models import with_image_token
from hf_vlm.models.chat_templates import reads_parts
from hf_vlm.models.processing_llava import VICUNA_TEMPLATE

IMAGE = tiny_blip2.IMAGE_TOKEN_ID
PLACEHOLDERS = tiny_llava.PATCHES
PICTURES = [tiny.image(width, height, seed=i) for i, (width, height) in enumerate(SIZES)]
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
QUESTION = {
    "role": "user",
    "content": [
        {"type": "text", "text": "a red "},
        {"type": "image", "image": PICTURES[0]},
        {"type": "text", "text": "cat"},
    ],
}
CHAT = [
    QUESTION,
    {"role": "assistant", "content": [{"type": "text", "text": "two dog"}]},
    {"role": "user", "content": "the left"},
]


def counts(inputs: dict[str, torch.Tensor]) -> list[int]:
    return (inputs["input_ids"] == IMAGE).sum(dim=1).tolist()


def expected_counts(anyres: bool) -> list[int]:
    return [layout.num_tokens for layout in tiny_llava.layouts()] if anyres else [PLACEHOLDERS] * len(SIZES)


@pytest.mark.parametrize("anyres", [False, True])
def test_each_image_becomes_as_many_placeholders_as_tokens(anyres: bool) -> None:
    processor, expected = tiny_llava.llava_processor(anyres), expected_counts(anyres)
    texts = ["<image> a red cat <image>", "two dog", "<image><image> the blue house <image>"]
    inputs = processor(images=PICTURES, text=texts)
    assert counts(inputs) == [sum(expected[:2]), 0, sum(expected[2:])]
    words = inputs["input_ids"][0][inputs["input_ids"][0] != tiny.PAD].tolist()
    assert words == [tiny.START, *[IMAGE] * expected[0], *tiny_ids("a red cat"), *[IMAGE] * expected[1]]
    assert inputs["attention_mask"][:, -1].all()
    assert torch.equal(inputs["attention_mask"] == 0, inputs["input_ids"] == tiny.PAD)
    names = {"input_ids", "attention_mask", "pixel_values"}
    assert set(inputs) == (names | {"image_sizes"} if anyres else names)
    views = sum(layout.num_views for layout in tiny_llava.layouts()) if anyres else len(PICTURES)
    assert inputs["pixel_values"].shape == (views, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert tiny_llava.llava_model(anyres=anyres)(**inputs).logits.isfinite().all()


def tiny_ids(words: str) -> list[int]:
    return [tiny.VOCABULARY.index(word) for word in words.split()]


@pytest.mark.parametrize("anyres", [False, True])
def test_text_alone_and_images_alone(anyres: bool) -> None:
    processor = tiny_llava.llava_processor(anyres)
    text = processor(text="a red cat")
    assert text["input_ids"].tolist() == [[tiny.START, *tiny_ids("a red cat")]]
    assert set(text) == {"input_ids", "attention_mask"}
    images = processor(images=PICTURES[0])
    assert set(images) == ({"pixel_values", "image_sizes"} if anyres else {"pixel_values"})
    assert processor(text=["a", "a cat"])["input_ids"].shape == (2, 3)


@pytest.mark.parametrize("images", [[PICTURES[:2], PICTURES[2:3]], [PICTURES[:2], [], PICTURES[2:3]]])
def test_images_in_nested_lists_are_those_of_each_text(images: list) -> None:
    processor = tiny_llava.llava_processor(anyres=True)
    texts = ["<image> a <image>", "cat", "<image>"][:: 4 - len(images)]
    assert len(texts) == len(images)
    nested, flat = processor(images=images, text=texts), processor(images=PICTURES[:3], text=texts)
    assert nested.keys() == flat.keys()
    for name, tensor in flat.items():
        assert torch.equal(nested[name], tensor), name


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (PICTURES[:1], ["a cat"], "have <image> 0 times, but there are 1 images"),
        (PICTURES[:1], ["<image> <image>"], "have <image> 2 times, but there are 1 images"),
        (PICTURES[:3], ["<image>", "<image>"], "have <image> 2 times, but there are 3 images"),
        (None, ["<image> a cat"], "have <image> 1 times, but there are 0 images"),
        # As many in all, but not in each text.
        ([PICTURES[:1], PICTURES[1:3]], ["<image> <image>", "<image>"], "<image>"),
    ],
)
def test_other_numbers_of_images_than_placeholders_are_refused(images, texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny_llava.llava_processor()(images=images, text=texts)
    assert "\n" not in str(caught.value)


CUTS = [{"truncation": True, "max_length": 17}, {"text_kwargs": {"truncation": True, "max_length": 5}}]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_truncating_an_image_is_refused(cut: dict, side: str) -> None:
    processor = tiny_llava.llava_processor()
    processor.tokenizer.truncation_side = side
    text = "a cat <image>" if side == "right" else "<image> a cat"
    with pytest.raises(ValueError, match="would truncate an image of text 0, which has 19 tokens: raise max_length"):
        processor(images=PICTURES[0], text=text, **cut)


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_are_truncated_as_the_tokenizer_does(side: str) -> None:
    """Also in the default length of TRL, 1024, which a text of 19 tokens fits."""
    processor = tiny_llava.llava_processor()
    processor.tokenizer.truncation_side = side
    text = "<image> a cat" if side == "right" else "a cat <image>"
    whole = processor(images=PICTURES[0], text=text)["input_ids"]
    assert whole.shape == (1, 19)
    for options in ({"max_length": 1024}, {"max_length": 19}, {}):
        assert torch.equal(processor(images=PICTURES[0], text=text, truncation=True, **options)["input_ids"], whole)
    cut = processor(images=PICTURES[0], text=text, truncation=True, max_length=18)["input_ids"]
    assert torch.equal(cut, whole[:, :18] if side == "right" else whole[:, 1:])


@pytest.mark.parametrize("cut", [CUTS[0], {"processor_kwargs": CUTS[0]}], ids=str)
def test_truncating_images_of_conversations_is_refused(cut: dict) -> None:
    with pytest.raises(ValueError, match="would truncate an image of text 0"):
        tiny_llava.llava_processor().apply_chat_template(CHAT, tokenize=True, return_dict=True, **cut)


@pytest.mark.parametrize("anyres", [False, True])
def test_the_number_of_views_is_told_on_request(anyres: bool) -> None:
    processor = tiny_llava.llava_processor(anyres).image_processor
    inputs = processor(images=PICTURES, crop_to_patches=True, return_tensors="pt")
    each = [len(processor(images=image, return_tensors="pt")["pixel_values"]) for image in PICTURES]
    assert inputs["num_patches"].tolist() == each
    assert "num_patches" not in processor(images=PICTURES, return_tensors="pt")


@pytest.mark.parametrize(("strategy", "layout", "expected"), [("default", "clip", 16), ("full", "clip", 17)])
def test_a_class_token_that_is_kept_has_a_placeholder(strategy: str, layout: str, expected: int) -> None:
    model = tiny_llava.llava_model(vision_config=tiny.tower_config(layout), vision_feature_select_strategy=strategy)
    processor = VlmLlavaProcessor.from_parts(model, tiny_blip2.llm_tokenizer())
    inputs = processor(images=PICTURES[:1], text=["<image> a cat"])
    assert counts(inputs) == [expected]
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "kept"), [*((name, 0) for name in tiny_llava.TOWERS), ("registers", tiny_llava.REGISTERS)]
)
def test_placeholders_fit_every_tower(name: str, kept: int) -> None:
    model = tiny_llava.on_tower(name)
    processor = VlmLlavaProcessor.from_parts(model, tiny_blip2.llm_tokenizer())
    inputs = processor(images=PICTURES[:1], text=["<image> a cat"])
    assert counts(inputs) == [PLACEHOLDERS + kept]
    assert model(**inputs).logits.isfinite().all()


def test_from_parts_checks_placeholder_and_mode() -> None:
    model = tiny_llava.llava_model(image_token_id=3)
    with pytest.raises(ValueError, match=f"build the model with image_token_id={IMAGE}"):
        VlmLlavaProcessor.from_parts(model, tiny_blip2.llm_tokenizer())
    for anyres, mode in ((True, "pad"), (False, "anyres")):
        with pytest.raises(ValueError, match="if and only if the model has image_grid_pinpoints"):
            VlmLlavaProcessor.from_parts(
                tiny_llava.llava_model(anyres=anyres), tiny_blip2.llm_tokenizer(), resize_mode=mode
            )
    processor = VlmLlavaProcessor.from_parts(tiny_llava.llava_model(), tiny_blip2.llm_tokenizer(), resize_mode="crop")
    assert processor.image_processor.resize_mode == "crop"
    assert tiny_llava.llava_processor().image_processor.resize_mode == "pad"


@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_tokenizers_are_made_ready(pad_token: str | None) -> None:
    tokenizer = tiny_blip2.llm_tokenizer(pad_token)
    tokenizer.padding_side = "right"
    processor = VlmLlavaProcessor.from_parts(tiny_llava.llava_model(), tokenizer)
    assert processor.tokenizer.padding_side == "left"
    assert len(processor.tokenizer) == len(with_image_token(tiny_blip2.llm_tokenizer()))
    inputs = processor(images=PICTURES[:1], text=["a", "<image> a cat"])
    assert inputs["attention_mask"][0].tolist() == [0] * (inputs["input_ids"].shape[1] - 2) + [1, 1]


# --- conversations


def test_vicunas_template() -> None:
    processor = tiny_llava.llava_processor()
    assert processor.chat_template == VICUNA_TEMPLATE
    asked = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    expected = SYSTEM + "USER: a red <image>cat ASSISTANT: two dog<end>USER: the left "
    assert asked == expected + "ASSISTANT:"
    assert processor.apply_chat_template(CHAT) == expected
    system = [{"role": "system", "content": "a dog"}, {"role": "user", "content": "a cat"}]
    assert processor.apply_chat_template(system, add_generation_prompt=True) == "a dog USER: a cat ASSISTANT:"
    assert processor.apply_chat_template([CHAT, system]) == [expected, "a dog USER: a cat "]
    assert CHAT[0] is QUESTION
    assert len(QUESTION["content"]) == 3  # the caller's messages are as they were


@pytest.mark.parametrize(
    ("template", "in_parts"),
    [
        (VICUNA_TEMPLATE, False),
        (CHATML, False),
        (tiny_llava.IN_PARTS, True),
        ("{{ raise_exception('a system turn, please') }}", False),
        ("{% for part in messages[0].content %}{{ 'a' + part.text }}{% endfor %}", True),
    ],
)
def test_templates_that_read_parts_are_told_from_those_that_read_texts(template: str, in_parts: bool) -> None:
    assert reads_parts(template) == in_parts


def test_another_template() -> None:
    """As an argument, or as the tokenizer's own."""
    tokenizer = with_image_token(tiny_blip2.llm_tokenizer())
    tokenizer.chat_template = CHATML
    own = VlmLlavaProcessor.from_parts(tiny_llava.llava_model(), tokenizer)
    expected = "<start>user\na red <image>cat<end>\n<start>assistant\ntwo dog<end>\n<start>user\nthe left<end>\n"
    assert own.apply_chat_template(CHAT) == expected
    assert own.apply_chat_template(CHAT, add_generation_prompt=True) == expected + "<start>assistant\n"
    assert tiny_llava.llava_processor().apply_chat_template(CHAT, chat_template=CHATML) == expected
    begun = own.apply_chat_template(CHAT[:2], continue_final_message=True)
    assert begun == "<start>user\na red <image>cat<end>\n<start>assistant\ntwo dog"
    # The template has written the start token, which is not put there twice.
    ids = own(images=PICTURES[0], text=expected)["input_ids"][0].tolist()
    assert ids[:2] != [tiny.START, tiny.START]
    assert ids[0] == tiny.START


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("template", [None, CHATML])
def test_conversations_are_tokenized_with_their_images(template: str | None, anyres: bool) -> None:
    processor = tiny_llava.llava_processor(anyres)
    other = [{"role": "user", "content": [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "a tree"}]}]
    options = {"add_generation_prompt": True, "chat_template": template}
    found = processor.apply_chat_template([CHAT, other], tokenize=True, return_dict=True, **options)
    texts = [processor.apply_chat_template(chat, **options) for chat in (CHAT, other)]
    expected = processor(images=PICTURES[:2], text=texts)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert counts(found) == expected_counts(anyres)[:2]
    one = processor.apply_chat_template(other, tokenize=True, return_dict=False, **options)
    assert one.shape[0] == 1
    text = processor.apply_chat_template(CHAT[1:], tokenize=True, return_dict=True, **options)
    assert set(text) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_images_of_conversations_may_be_given_by_path(key: str, tmp_path: Path) -> None:
    """As transformers' own processors, and its pipeline, take them."""
    processor, path = tiny_llava.llava_processor(), str(tmp_path / "one.png")
    PICTURES[0].save(path)
    expected = processor(images=PICTURES[0], text=processor.apply_chat_template([QUESTION]))
    text, _, more = QUESTION["content"]
    parts = [text, {"type": "image", key: path}, more]
    found = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True, return_dict=True)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


# --- files and pipeline


@pytest.mark.parametrize("anyres", [False, True])
def test_saved_and_loaded(anyres: bool, tmp_path: Path) -> None:
    processor = tiny_llava.llava_processor(anyres)
    processor.chat_template = CHATML
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VlmLlavaProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VlmImageProcessor
    for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "chat_template"):
        assert getattr(loaded, name) == getattr(processor, name), name
    assert loaded.image_processor.image_grid_pinpoints == (tiny_llava.GRIDS if anyres else None)
    texts = ["<image> a red cat <image>", "tree"]
    found, expected = (one(images=PICTURES[:2], text=texts) for one in (loaded, processor))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert loaded.apply_chat_template(CHAT) == processor.apply_chat_template(CHAT)


@pytest.fixture(params=[False, True], ids=["pad", "anyres"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved model with its processor."""
    tiny_llava.llava_model(anyres=request.param).save_pretrained(tmp_path)
    tiny_llava.llava_processor(request.param).save_pretrained(tmp_path)
    return tmp_path


def answer(folder: Path, **inputs) -> str:
    """What the model in a folder writes, by hand."""
    processor = AutoProcessor.from_pretrained(folder)
    model = tiny_llava.VlmLlavaForConditionalGeneration.from_pretrained(folder)
    inputs = processor(**inputs)
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(written, skip_special_tokens=True)


def test_pipeline_with_a_text(folder: Path) -> None:
    talk = pipeline("image-text-to-text", model=str(folder))
    options = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False}, "return_full_text": False}
    found = talk(images=PICTURES[1], text="<image> a red cat", **options)
    expected = answer(folder, images=PICTURES[1], text="<image> a red cat")
    assert expected
    assert found[0]["generated_text"].strip() == expected


def test_pipeline_with_a_conversation(folder: Path) -> None:
    talk = pipeline("image-text-to-text", model=str(folder))
    options = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False}, "return_full_text": False}
    found = talk(text=[QUESTION], **options)
    text = AutoProcessor.from_pretrained(folder).apply_chat_template([QUESTION], add_generation_prompt=True)
    expected = answer(folder, images=PICTURES[0], text=text)
    assert expected
    assert found[0]["generated_text"].strip() == expected


def test_pipeline_with_several_conversations(folder: Path) -> None:
    talk = pipeline("image-text-to-text", model=str(folder))
    options = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False}, "return_full_text": False}
    alone = [talk(text=chat, **options)[0]["generated_text"] for chat in ([QUESTION], CHAT)]
    together = [found[0]["generated_text"] for found in talk(text=[[QUESTION], CHAT], **options)]
    assert together == alone
