"""LLaVA to transformers and back, with every parameter randomised."""

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, LlavaProcessor

from cases import tiny, tiny_blip2, tiny_llava
from cases.tiny_llava import GRIDS, SIZES, batch, native_inputs, pair
from hf_vlm import VlmImageProcessor, VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.hub.convert import (
    convert_folder,
    from_transformers,
    processor_from_transformers,
    processor_to_transformers,
    to_transformers,
)
from hf_vlm.models import with_image_token
from hf_vlm.models.messages import flat_content
from hf_vlm.models.processing_llava import VICUNA_TEMPLATE


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits * inputs["attention_mask"][..., None]


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("llm", ["llama", "llama, tied", "qwen2"])
def test_from_transformers_and_back(anyres, llm):
    native, _ = pair(anyres, llm)
    own = from_transformers(native)
    assert own.config.vision_config.model_type == "vlm_tower"
    assert (own.get_input_embeddings().weight is own.get_output_embeddings().weight) == ("tied" in llm)
    inputs = batch(anyres, own)
    theirs = native_inputs(inputs, anyres, own.config.vision_config.patch_size)
    wanted = logits(native, theirs)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(logits(own, inputs), wanted, atol=1e-5, rtol=1e-5)
    back = to_transformers(own)
    assert type(back) is type(native)
    for name, tensor in native.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(back, theirs), wanted, atol=0, rtol=0)


def test_our_own_checkpoint_goes_out():
    for anyres, expected in ((False, LlavaForConditionalGeneration), (True, LlavaNextForConditionalGeneration)):
        own = tiny_llava.llava_model(anyres=anyres)
        native = to_transformers(own)
        assert type(native) is expected
        text = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        torch.testing.assert_close(logits(native, text), logits(own, text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("llm", "options", "message"),
    [
        ("llama", {"projector_type": "linear"}, "projector_type='linear'"),
        ("gemma2", {}, "final_logit_softcapping"),
        ("granite", {}, "logits_scaling"),
        ("cohere", {}, "logit_scale"),
    ],
)
def test_what_transformers_cannot_express_is_refused(llm, options, message):
    tower = tiny.clip_model().vision_model
    own = VlmLlavaForConditionalGeneration.from_parts(tower, tiny_blip2.llm(llm), **options)
    with pytest.raises(ValueError, match=message):
        to_transformers(own)


def test_several_layers_are_refused():
    native, _ = pair(False)
    native.config.vision_feature_layer = [-2, -1]
    with pytest.raises(ValueError, match="vision_feature_layer"):
        from_transformers(native)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad", "anyres"])
def test_processors_give_the_same_pixels_and_tokens(mode, tmp_path):
    grids = GRIDS if mode == "anyres" else None
    images = VlmImageProcessor(size={"height": 32, "width": 32}, resize_mode=mode, image_grid_pinpoints=grids)
    own = VlmLlavaProcessor(images, with_image_token(tiny_blip2.llm_tokenizer()), patch_size=8)
    native = processor_to_transformers(own)
    pictures = [tiny.image(width, height, seed=i) for i, (width, height) in enumerate(SIZES)]
    texts = ["<image> a red cat <image>", "<image> dog", "<image> tree <image> a"]
    wanted, found = native(images=pictures, text=texts, padding=True, return_tensors="pt"), own(pictures, texts)
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    assert torch.equal(found["attention_mask"], wanted["attention_mask"])
    pixels = wanted["pixel_values"]
    if mode == "anyres":
        pixels = native_inputs_flat(pixels, found["pixel_values"], wanted["image_sizes"])
    torch.testing.assert_close(found["pixel_values"], pixels, atol=1e-5, rtol=0)
    native.save_pretrained(tmp_path)
    again = processor_from_transformers(AutoProcessor.from_pretrained(tmp_path))
    assert again.image_processor.resize_mode == mode
    assert torch.equal(again(pictures, texts)["pixel_values"], found["pixel_values"])
    assert torch.equal(again(pictures, texts)["input_ids"], found["input_ids"])


CHATS = [
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red cat"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "the left"}]},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "tree"}]}],
]


@pytest.mark.parametrize("template", [VICUNA_TEMPLATE, tiny_llava.CHATML, tiny_llava.IN_PARTS])
def test_conversations_read_alike_on_both_sides(template):
    """In parts, as transformers' users write them, and as texts; whatever the template reads."""
    own = tiny_llava.llava_processor()
    own.chat_template = template
    native = processor_to_transformers(own)
    for chat in CHATS:
        shown = own.apply_chat_template(chat, add_generation_prompt=True)
        assert native.apply_chat_template(chat, add_generation_prompt=True) == shown
        assert all(part["text"] in shown for turn in chat for part in turn["content"] if part["type"] == "text")
        assert shown.count("<image>") == sum(part["type"] == "image" for turn in chat for part in turn["content"])
        texts = [{**turn, "content": flat_content(turn["content"])} for turn in chat]
        assert own.apply_chat_template(texts, add_generation_prompt=True) == shown
        if template != tiny_llava.IN_PARTS:
            assert native.apply_chat_template(texts, add_generation_prompt=True) == shown
    assert processor_from_transformers(native).chat_template == template
    assert processor_to_transformers(processor_from_transformers(native)).chat_template == native.chat_template


def native_inputs_flat(padded: torch.Tensor, flat: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The views of each image without those that transformers adds as padding."""
    from hf_vlm.models.anyres import anyres_layout

    counts = [anyres_layout(size, GRIDS, 32, 8).num_views for size in sizes]
    assert sum(counts) == len(flat)
    return torch.cat([views[:count] for views, count in zip(padded, counts, strict=True)])


def test_a_folder_is_converted_both_ways(tmp_path):
    tiny_llava.llava_model().save_pretrained(tmp_path / "own")
    tiny_llava.llava_processor().save_pretrained(tmp_path / "own")
    convert_folder(tmp_path / "own", tmp_path / "native", to="native")
    assert type(AutoProcessor.from_pretrained(tmp_path / "native")) is LlavaProcessor
    convert_folder(tmp_path / "native", tmp_path / "again", to="hf_vlm")
    first, second = (
        VlmLlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("own", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
