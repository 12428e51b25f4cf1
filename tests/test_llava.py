"""LLaVA against transformers' Llava and LlavaNext with the same weights, and its placeholders, packing and ranks."""

import functools
import operator

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
)

import tiny
import tiny_blip2
import tiny_llava
from hf_vlm import VlmBlip2ForConditionalGeneration, VlmImageProcessor, VlmLlavaForConditionalGeneration
from hf_vlm.models.anyres import anyres_layout

GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
IMAGE = 40
SIZES = [(40, 36), (100, 30), (30, 90), (64, 64), (50, 200)]
RENAMED = (
    ("model.vision_model.", "model.vision_tower."),
    ("model.projector.newline", "model.image_newline"),
    ("model.projector.", "model.multi_modal_projector."),
    ("model.language_model.lm_head", "lm_head"),
    ("model.language_model.model.", "model.language_model."),
)


def native_name(name: str) -> str:
    for own, other in RENAMED:
        name = name.replace(own, other)
    return name


def pair(anyres: bool, llm: str = "llama") -> tuple:
    """transformers' model and ours, with the same random weights."""
    config = {
        "vision_config": tiny.native_clip_config().vision_config,
        "text_config": tiny_blip2.llm_config(llm, vocab_size=64),
        "image_token_index": IMAGE,
        "tie_word_embeddings": "tied" in llm,
    }
    if anyres:
        native = LlavaNextForConditionalGeneration(LlavaNextConfig(**config, image_grid_pinpoints=GRIDS))
    else:
        native = LlavaForConditionalGeneration(LlavaConfig(**config))
    tiny.randomise(native).eval()
    own = VlmLlavaForConditionalGeneration.from_parts(
        native.model.vision_tower,
        tiny_blip2.llm(llm, vocab_size=64),
        IMAGE,
        image_grid_pinpoints=GRIDS if anyres else None,
    )
    weights = native.state_dict()
    own.load_state_dict({name: weights[native_name(name)] for name in own.state_dict()})
    return native, own


def pictures(anyres: bool) -> dict[str, torch.Tensor]:
    mode = {"resize_mode": "anyres", "image_grid_pinpoints": GRIDS} if anyres else {"resize_mode": "pad"}
    processor = VlmImageProcessor(size={"height": 32, "width": 32}, **mode)
    return dict(processor([tiny.image(w, h, seed=i) for i, (w, h) in enumerate(SIZES)], return_tensors="pt"))


def layouts(patch: int) -> list:
    return [anyres_layout((height, width), GRIDS, 32, patch) for width, height in SIZES]


def rows(counts: list[int]) -> dict[str, torch.Tensor]:
    """Two images, then two, then one, then none; padded on the left."""
    found = [
        [3, *[IMAGE] * counts[0], 5, 6, *[IMAGE] * counts[1], 7],
        [*[IMAGE] * counts[2], *[IMAGE] * counts[3], 8, 9, 10],
        [4, 5, 6, *[IMAGE] * counts[4], 2],
        [4, 5, 6, 7, 8],
    ]
    length = max(map(len, found))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in found]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in found]),
    }


def batch(anyres: bool, model) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    counts = [layout.num_tokens for layout in layouts(vision.patch_size)] if anyres else [side**2] * 5
    return rows(counts) | pictures(anyres)


def native_inputs(inputs: dict, anyres: bool, patch: int) -> dict:
    """The same batch for transformers, which pads the views of each image to the most."""
    if not anyres:
        return inputs
    views = inputs["pixel_values"].split([layout.num_views for layout in layouts(patch)])
    most = max(map(len, views))
    padded = [torch.cat([view, view.new_zeros(most - len(view), *view.shape[1:])]) for view in views]
    return inputs | {"pixel_values": torch.stack(padded)}


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("llm", ["llama", "llama, tied", "qwen2"])
def test_logits_and_tokens_equal_transformers(anyres, llm):
    native, own = pair(anyres, llm)
    inputs = batch(anyres, own)
    theirs = native_inputs(inputs, anyres, own.config.vision_config.patch_size)
    with torch.no_grad():
        wanted, found = native(**theirs).logits, own(**inputs).logits
    mask = inputs["attention_mask"][..., None]
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found * mask, wanted * mask, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(own.generate(**inputs, **options), native.generate(**theirs, **options))


def test_views_equal_transformers():
    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    native = LlavaNextImageProcessorPil(**options, image_grid_pinpoints=GRIDS)
    images = [tiny.image(w, h, seed=i) for i, (w, h) in enumerate(SIZES)]
    wanted, found = native(images, return_tensors="pt"), pictures(True)
    counts = [layout.num_views for layout in layouts(8)]
    wanted_views = torch.cat([views[:count] for views, count in zip(wanted["pixel_values"], counts, strict=True)])
    torch.testing.assert_close(found["pixel_values"], wanted_views, atol=1e-5, rtol=0)
    assert torch.equal(found["image_sizes"], wanted["image_sizes"])


@pytest.mark.parametrize("anyres", [False, True])
def test_images_are_read_once_for_beams_and_for_a_second_turn(anyres):
    _, own = pair(anyres)
    inputs = batch(anyres, own)
    images = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if name in inputs}
    wanted = own.generate(**inputs, **images, num_beams=2, max_new_tokens=4, do_sample=False)
    features = own.get_image_features(**images)
    calls = []
    own.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    found = own.generate(
        **inputs, mm_encoder_outputs={"image": features}, num_beams=2, max_new_tokens=4, do_sample=False
    )
    assert torch.equal(found, wanted)
    assert not calls


def test_layers_behind_the_chosen_one_are_not_run():
    _, own = pair(False)
    inputs = batch(False, own)
    with torch.no_grad():
        wanted = own(**inputs).logits
        stack = next(m for m in own.model.vision_model.modules() if isinstance(m, torch.nn.ModuleList))
        for parameter in stack[-1].parameters():
            parameter.fill_(float("nan"))
        torch.testing.assert_close(own(**inputs).logits, wanted)
    assert len(stack) == own.config.vision_config.num_hidden_layers


@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize("anyres", [False, True])
def test_text_alone_costs_no_vision_pass_and_leaves_no_parameter_without_a_gradient(anyres, thawed):
    _, own = pair(anyres)
    if thawed:
        own.model.thaw_tower()
    seen = []
    own.model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    own.train()
    text = torch.tensor([[4, 5, 6, 7]])
    own(input_ids=text, labels=text).loss.backward()
    assert seen == ([1] if thawed else [])  # transformers' CLIP takes no empty batch
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert "language_model" in name or not parameter.grad.any(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_padded_ones_and_samples_do_not_see_each_other(attention):
    _, own = pair(False)
    own.set_attn_implementation(attention)
    own.train()
    samples = [[3, *[IMAGE] * 16, 5, 6, 7], [8, 9, 10, 11], [4, *[IMAGE] * 16, 12]]
    labels = [[-100 if token == IMAGE or i == 0 else token for i, token in enumerate(row)] for row in samples]
    pixels = tiny.pixels(2)
    length = max(map(len, samples))
    padded = {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in samples]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in samples]),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
    }
    packed = {
        "input_ids": torch.tensor([functools.reduce(operator.iadd, samples, [])]),
        "position_ids": torch.tensor([[i for row in samples for i in range(len(row))]]),
        "labels": torch.tensor([functools.reduce(operator.iadd, labels, [])]),
    }
    losses, gradients = [], []
    for inputs in (padded, packed):
        own.zero_grad()
        loss = own(**inputs, pixel_values=pixels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in own.parameters() if p.requires_grad]))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    own.eval()
    changed = packed["input_ids"].clone()
    changed[0, 1 + 16 : 1 + 16 + 2] = 13  # of the first sample
    with torch.no_grad():
        before, after = (
            own.model(input_ids=ids, position_ids=packed["position_ids"], pixel_values=pixels, use_cache=False)[0]
            for ids in (packed["input_ids"], changed)
        )
    assert not torch.allclose(before[0, 18], after[0, 18])
    torch.testing.assert_close(before[0, len(samples[0]) :], after[0, len(samples[0]) :])


@pytest.mark.parametrize("wrong", ["few", "many", "cut", "none"])
def test_placeholders_that_do_not_fit_the_images_are_refused(wrong):
    _, own = pair(False)
    counts = {"few": [16, 15], "many": [16, 17], "cut": [17, 15], "none": [0, 0]}[wrong]
    ids = torch.zeros(2, 20, dtype=torch.long)
    for row, count in enumerate(counts):
        ids[row, :count] = IMAGE
    with pytest.raises(ValueError, match="image placeholders"):
        own(input_ids=ids, pixel_values=tiny.pixels(2))


def test_a_batch_with_nothing_to_learn_has_loss_zero():
    _, own = pair(False)
    text = torch.tensor([[4, 5, 6]])
    loss = own.train()(input_ids=text, labels=torch.full_like(text, -100)).loss
    loss.backward()
    assert loss == 0


def test_prompts_padded_on_the_right_are_refused():
    _, own = pair(False)
    with pytest.raises(ValueError, match="padded on the right"):
        own.generate(input_ids=torch.tensor([[4, 0]]), attention_mask=torch.tensor([[1, 0]]))


@pytest.mark.parametrize("llm", ["llama", "llama, tied"])
def test_from_parts_grows_the_embeddings_and_keeps_ties(llm):
    language_model = tiny_blip2.llm(llm)
    size = language_model.get_input_embeddings().num_embeddings
    tower = tiny.clip_model().vision_model
    own = VlmLlavaForConditionalGeneration.from_parts(tower, language_model)
    assert own.config.image_token_id == size
    embeddings, head = own.get_input_embeddings().weight, own.get_output_embeddings().weight
    assert len(embeddings) == len(head) == 64
    assert (embeddings is head) == (llm == "llama, tied")
    assert own.model.vision_model is not tower


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    _, own = pair(True)
    own.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).image_grid_pinpoints == GRIDS
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is VlmLlavaForConditionalGeneration
    for name, tensor in own.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(body.projector.newline, own.model.projector.newline)
    assert not any(p.requires_grad for p in loaded.model.vision_model.parameters())


def test_a_loaded_model_is_saved_under_the_same_names(tmp_path):
    for name, model in (
        ("llava", tiny_llava.llava_model()),
        ("blip2", tiny_blip2.blip2_model(VlmBlip2ForConditionalGeneration, "llama")),
    ):
        model.save_pretrained(tmp_path / name)
        type(model).from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name} again")
        first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name} again"))
        assert first.keys() == second.keys()
