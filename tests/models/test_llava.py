"""LLaVA against transformers' Llava and LlavaNext with the same weights: placeholders, losses, packing, generation."""

import functools
import importlib.util
import operator

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, StaticCache

from cases import tiny, tiny_blip2, tiny_llava
from cases.case import calls_of
from cases.tiny_llava import GRIDS, IMAGE, SIZES, batch, native_inputs, one_by_one, padded, pair, pictures

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
MANY_SIZES = [(8, 8), (32, 32), (33, 32), (200, 9), (9, 200), (64, 96), (97, 65), (31, 47), (500, 333), (1, 40)]
PATCHES = tiny_llava.PATCHES


def randomised_logits(native, own, inputs: dict, theirs: dict) -> None:
    """Asserts that states and logits of the two are equal, and not all the same."""
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        wanted, found = native(**theirs).logits, own(**inputs)
        states = native.model(**theirs).last_hidden_state
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found.last_hidden_state * mask, states * mask, **CLOSE)
    torch.testing.assert_close(found.logits * mask, wanted * mask, **CLOSE)


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("llm", ["llama", "llama, tied", "qwen2"])
def test_logits_states_and_tokens_equal_transformers(anyres: bool, llm: str) -> None:
    native, own = pair(anyres, llm)
    inputs = batch(anyres, own)
    theirs = native_inputs(inputs, anyres, own.config.vision_config.patch_size)
    randomised_logits(native, own, inputs, theirs)
    for beams in (1, 3):
        wanted = native.generate(**theirs, num_beams=beams, **GREEDY)
        assert torch.equal(own.generate(**inputs, num_beams=beams, **GREEDY), wanted)
        assert len({tuple(row) for row in wanted[:, inputs["input_ids"].shape[1] :].tolist()}) > 1


@pytest.mark.parametrize("anyres", [False, True])
def test_logits_of_images_of_many_sizes_equal_transformers(anyres: bool) -> None:
    native, own = pair(anyres)
    layouts = tiny_llava.layouts(sizes=MANY_SIZES)
    counts = [layout.num_tokens for layout in layouts] if anyres else [PATCHES] * len(MANY_SIZES)
    rows = [[2, *[IMAGE] * one, 5, *[IMAGE] * two] for one, two in zip(counts[::2], counts[1::2], strict=True)]
    inputs = padded(rows) | pictures(anyres, MANY_SIZES)
    randomised_logits(native, own, inputs, native_inputs(inputs, anyres, tiny_llava.PATCH, MANY_SIZES))


@pytest.mark.parametrize(
    ("vision", "options"),
    [
        ("clip", {"vision_feature_layer": -1}),
        ("clip", {"vision_feature_layer": 1, "vision_feature_select_strategy": "full"}),
        ("clip", {"vision_feature_layer": -3, "projector_bias": False, "projector_hidden_act": "silu"}),
        ("siglip", {"vision_feature_layer": 3, "vision_feature_select_strategy": "full"}),
        ("registers", {}),
    ],
)
def test_other_layers_strategies_projectors_and_towers_equal_transformers(vision: str, options: dict) -> None:
    native, own = pair(False, vision=vision, **options)
    inputs = batch(False, own)
    randomised_logits(native, own, inputs, inputs)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("anyres", [False, True])
def test_batched_generation_is_one_by_one(anyres: bool, beams: int) -> None:
    _, own = pair(anyres)
    inputs = batch(anyres, own)
    together = own.generate(**inputs, num_beams=beams, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert len({tuple(row) for row in together.tolist()}) > 1
    for row, one in zip(together.tolist(), one_by_one(inputs, anyres), strict=True):
        alone = own.generate(**one, num_beams=beams, **GREEDY)[0, one["input_ids"].shape[1] :].tolist()
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) <= {tiny.PAD, tiny.END}


def test_generate_takes_a_generation_config() -> None:
    """As transformers' pipelines pass it."""
    _, own = pair(False)
    inputs = batch(False, own)
    by_config = own.generate(**inputs, generation_config=GenerationConfig(**GREEDY, pad_token_id=tiny.PAD))
    assert by_config.tolist() == own.generate(**inputs, **GREEDY).tolist()


def test_another_image_changes_the_logits() -> None:
    """Of its own row alone, and from its own place on."""
    _, own = pair(False)
    inputs = batch(False, own)
    changed = inputs["pixel_values"].clone()
    changed[1] += 1  # the second image of the first row
    with torch.no_grad():
        one, other = own(**inputs).logits, own(**{**inputs, "pixel_values": changed}).logits
    assert torch.equal(one[1:], other[1:])
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[PATCHES])
    torch.testing.assert_close(one[0, :first], other[0, :first], **CLOSE)
    assert (one[0, first:] - other[0, first:]).abs().max() > 1e-2


# --- placeholders


def refused(message: str, function, **inputs) -> None:
    """Asserts that it is refused, in one line."""
    with pytest.raises(ValueError, match=message) as caught:
        function(**inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("wrong", [[16, 15], [16, 17], [17, 15], [0, 0], [8, 8], [16, 0], [32, 16]])
def test_placeholders_that_do_not_fit_the_images_are_refused(wrong: list[int], method: str) -> None:
    _, own = pair(False)
    ids = torch.full((2, 40), 5)
    for row, count in enumerate(wrong):
        ids[row, :count] = IMAGE
    message = r"image placeholders, but the images need \[16, 16\], in this order: put the image token once"
    refused(message, getattr(own, method), input_ids=ids, pixel_values=tiny.pixels(2))


def test_an_image_that_is_cut_at_the_end_of_its_row_is_refused() -> None:
    """Also where a surplus elsewhere makes up for it."""
    _, own = pair(False)
    inputs = batch(False, own)
    cut = {"input_ids": inputs["input_ids"][:, :-5], "attention_mask": inputs["attention_mask"][:, :-5]}
    refused("do not truncate the text", own, **cut, pixel_values=inputs["pixel_values"])
    even = inputs["input_ids"].clone()
    even[2, -2] = 5  # one placeholder less here,
    even[1, -1] = IMAGE  # one more there
    refused("do not truncate the text", own, **{**inputs, "input_ids": even})


def test_an_image_that_is_cut_within_a_packed_row_is_refused() -> None:
    """Samples share a row there: A lacks a placeholder, B has one too many, and the row's sum is right."""
    _, own = pair(False)
    samples = [[3, *[IMAGE] * (PATCHES - 1), 5], [4, *[IMAGE] * (PATCHES + 1), 6]]
    ids = torch.tensor([functools.reduce(operator.iadd, samples, [])])
    positions = torch.tensor([[i for row in samples for i in range(len(row))]])
    refused("image placeholders", own, input_ids=ids, position_ids=positions, pixel_values=tiny.pixels(2))


@pytest.mark.parametrize("same_row", [False, True])
def test_images_in_another_order_are_refused(same_row: bool) -> None:
    """With tiles, where images have different numbers of tokens; words between them say where each ends."""
    _, own = pair(True)
    sizes = [(40, 36), (200, 50)]
    counts = [layout.num_tokens for layout in tiny_llava.layouts(sizes=sizes)]
    assert counts[0] != counts[1]
    rows = [[5, *[IMAGE] * count, 6] for count in counts]
    inputs = padded([rows[0] + rows[1]] if same_row else rows)
    own(**inputs, **pictures(True, sizes))
    refused("image placeholders", own, **inputs, **pictures(True, sizes[::-1]))


def test_more_or_fewer_images_than_placeholders_are_refused() -> None:
    _, own = pair(False)
    inputs = batch(False, own)
    for pixels in (inputs["pixel_values"][:4], tiny.pixels(6), None):
        refused("image placeholders", own, **{**inputs, "pixel_values": pixels})
    refused("image placeholders", own, input_ids=torch.tensor([[4, 5]]), pixel_values=tiny.pixels(1))


def test_wrong_image_sizes_are_refused() -> None:
    _, own = pair(True)
    inputs = batch(True, own)
    refused("pass image_sizes", own, **{**inputs, "image_sizes": None})
    sizes = inputs["image_sizes"]
    for wrong in (sizes[:4], torch.cat([sizes, sizes[:1]])):
        refused("Images of these sizes have", own, **{**inputs, "image_sizes": wrong})
    wrong = sizes.clone()
    wrong[4] = torch.tensor([64, 64])  # of another grid
    refused("Images of these sizes have", own, **{**inputs, "image_sizes": wrong})
    # Width and height exchanged: as many views, in another grid.
    refused("image placeholders", own, **{**inputs, "image_sizes": sizes.flip(1)})


def test_prompts_padded_on_the_right_are_refused() -> None:
    _, own = pair(False)
    inputs = padded([[4, 5], [4]], side="right")
    refused('padded on the right, where the answer goes: use padding_side="left"', own.generate, **inputs)


def test_pixels_and_features_together_are_refused() -> None:
    _, own = pair(False)
    inputs = batch(False, own)
    features = own.model.get_vision_features(inputs["pixel_values"])
    refused("Pass either pixel_values or vision_features", own, **inputs, vision_features=features)
    refused("Pass either pixel_values or vision_features", own.get_image_features)
    refused("Pass either input_ids or inputs_embeds", own)


# --- loss


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill((ids == IMAGE) | (ids == tiny.PAD), -100)


@pytest.mark.parametrize("anyres", [False, True])
def test_loss_is_the_cross_entropy_of_transformers_logits(anyres: bool) -> None:
    native, own = pair(anyres)
    inputs = batch(anyres, own)
    theirs = native_inputs(inputs, anyres, tiny_llava.PATCH)
    labels = labels_of(inputs["input_ids"])
    with torch.no_grad():
        logits = native(**theirs).logits
        native_loss = native(**theirs, labels=labels).loss
        output = own(**inputs, labels=labels)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    torch.testing.assert_close(output.loss, native_loss, **CLOSE)
    assert output.logits is None


def test_num_items_in_batch_is_what_the_sum_is_divided_by() -> None:
    _, own = pair(False)
    inputs = batch(False, own)
    labels = labels_of(inputs["input_ids"])
    count = int((labels[:, 1:] != -100).sum())
    whole = own(**inputs, labels=labels).loss
    torch.testing.assert_close(own(**inputs, labels=labels, num_items_in_batch=count * 2).loss, whole / 2, **CLOSE)
    parts = [
        own(**one, labels=labels_of(one["input_ids"]), num_items_in_batch=torch.tensor(count)).loss
        for one in one_by_one(inputs, False)
    ]
    missing = sum(labels[row, inputs["attention_mask"][row].argmax()] != -100 for row in range(4))
    assert missing == 3  # what a row begins with is a target after padding, not at the beginning
    assert sum(parts) < whole
    inputs["labels"] = labels.scatter(1, inputs["attention_mask"].argmax(dim=1, keepdim=True), -100)
    torch.testing.assert_close(sum(parts), own(**inputs, num_items_in_batch=count).loss, **CLOSE)


@pytest.mark.parametrize("with_images", [False, True])
def test_a_batch_with_nothing_to_learn_has_loss_zero(with_images: bool) -> None:
    _, own = pair(False)
    inputs = batch(False, own) if with_images else {"input_ids": torch.tensor([[4, 5, 6]])}
    loss = own.train()(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in own.parameters() if p.requires_grad)


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_padded_ones_and_samples_do_not_see_each_other(attention: str, anyres: bool) -> None:
    _, own = pair(anyres)
    own.set_attn_implementation(attention)
    own.train()
    counts = [layout.num_tokens for layout in tiny_llava.layouts(sizes=SIZES[:2])] if anyres else [PATCHES] * 2
    samples = [[3, *[IMAGE] * counts[0], 5, 6, 7], [8, 9, 10, 11], [4, *[IMAGE] * counts[1], 12]]
    labels = [[-100 if token == IMAGE or i == 0 else token for i, token in enumerate(row)] for row in samples]
    pixels = pictures(anyres, SIZES[:2])
    length = max(map(len, samples))
    unpacked = padded(samples, side="right")
    unpacked["labels"] = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
    packed = {
        "input_ids": torch.tensor([functools.reduce(operator.iadd, samples, [])]),
        "position_ids": torch.tensor([[i for row in samples for i in range(len(row))]]),
        "labels": torch.tensor([functools.reduce(operator.iadd, labels, [])]),
    }
    losses, gradients = [], []
    for inputs in (unpacked, packed):
        own.zero_grad()
        loss = own(**inputs, **pixels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in own.parameters() if p.requires_grad]))
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)
    own.eval()
    changed = packed["input_ids"].clone()
    first = len(samples[0])
    changed[0, first - 3 : first - 1] = 13  # of the first sample
    with torch.no_grad():
        before, after = (
            own(**{**packed, "input_ids": ids}, **pixels).last_hidden_state for ids in (packed["input_ids"], changed)
        )
    assert not torch.allclose(before[0, first - 1], after[0, first - 1])
    torch.testing.assert_close(before[0, first:], after[0, first:])


# --- generation


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized", None])
@pytest.mark.parametrize("anyres", [False, True])
def test_every_cache_gives_the_same_tokens(anyres: bool, cache: str | None) -> None:
    if cache == "quantized" and importlib.util.find_spec("optimum") is None:
        pytest.skip("A quantized cache needs optimum-quanto.")
    _, own = pair(anyres)
    inputs = batch(anyres, own)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert torch.equal(own.generate(**inputs, **GREEDY, **options), own.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("reused", [False, True], ids=["pixels", "features"])
@pytest.mark.parametrize("anyres", [False, True])
def test_a_second_turn_goes_on_from_the_first(anyres: bool, reused: bool, cache: str) -> None:
    """The cached tokens are not read again, nor is the tower called where the image's features are handed on."""
    _, own = pair(anyres)
    one = one_by_one(batch(anyres, own), anyres)[0]
    ids, images = one["input_ids"], {name: one[name] for name in ("pixel_values", "image_sizes") if name in one}
    layer, read = own.model.language_model.model.layers[0], []
    given = {"mm_encoder_outputs": {"image": own.get_image_features(**images)}} if reused else images
    with calls_of(own.model.vision_model) as calls:
        options = {**GREEDY, "return_dict_in_generate": True, "min_new_tokens": 6}
        if cache == "static":
            options["past_key_values"] = StaticCache(own.config.text_config, max_cache_len=ids.shape[1] + 20)
        first = own.generate(input_ids=ids, **given, **options)
        assert type(first.past_key_values) is (StaticCache if cache == "static" else DynamicCache)
        second = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
        found = own.generate(input_ids=second, **given, **GREEDY, past_key_values=first.past_key_values)
        hook.remove()
    assert len(calls) == (0 if reused else 2)
    assert torch.equal(found, own.generate(input_ids=second, **images, **GREEDY))
    assert found.shape[1] > second.shape[1]
    assert read[0] == 4  # the last token of the first turn, and the three new ones


def test_a_second_turn_with_an_image_of_its_own() -> None:
    _, own = pair(False)
    pixels = tiny.pixels(2)
    first = own.generate(
        input_ids=torch.tensor([[3, *[IMAGE] * PATCHES, 5]]),
        pixel_values=pixels[:1],
        return_dict_in_generate=True,
        **GREEDY,
    )
    second = torch.cat([first.sequences, torch.tensor([[IMAGE] * PATCHES + [6]])], dim=1)
    found = own.generate(input_ids=second, pixel_values=pixels, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(found, own.generate(input_ids=second, pixel_values=pixels, **GREEDY))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("anyres", [False, True])
def test_images_are_read_once_for_beams_and_not_again_for_their_features(anyres: bool, beams: int) -> None:
    _, own = pair(anyres)
    inputs = batch(anyres, own)
    images = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if name in inputs}
    with calls_of(own.model.vision_model) as calls:
        wanted = own.generate(**inputs, **images, num_beams=beams, **GREEDY)
        assert len(calls) == 1
        features = {"image": own.get_image_features(**images)}
        assert len(calls) == 2
        found = own.generate(**inputs, mm_encoder_outputs=features, num_beams=beams, **GREEDY)
        with torch.no_grad():
            logits = own(**inputs, mm_encoder_outputs=features).logits
        assert len(calls) == 2
    assert torch.equal(found, wanted)
    with torch.no_grad():
        assert torch.equal(logits, own(**inputs, **images).logits)


@pytest.mark.parametrize("llm", ["gemma2", "granite", "cohere", "opt"])
def test_llms_that_change_their_logits_write_what_they_score_highest(llm: str) -> None:
    """transformers' Llava applies the head alone, so these are compared with the model's own logits, without cache."""
    own = tiny_llava.llava_model(llm=llm)
    ids = torch.tensor([[3, *[tiny_blip2.IMAGE_TOKEN_ID] * PATCHES, 5, 6]])
    pixels, never = tiny.pixels(1), [tiny_blip2.IMAGE_TOKEN_ID, tiny.END]
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": never}
    found = own.generate(input_ids=ids, pixel_values=pixels, **options)
    features = {"image": own.get_image_features(pixels)}
    with torch.no_grad():
        embeds = own.model.embed(ids, pixels)
        logits = own(input_ids=ids, mm_encoder_outputs=features).logits
        language_model = own.model.language_model
        torch.testing.assert_close(logits, language_model(inputs_embeds=embeds).logits, **CLOSE)
        for _ in range(4):
            scores = own(input_ids=ids, mm_encoder_outputs=features).logits[:, -1]
            scores[:, never] = -torch.inf
            ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)


def test_grids_are_those_of_the_builders() -> None:
    """The two that share their weights look at the same tiles."""
    native, own = pair(True)
    assert native.config.image_grid_pinpoints == own.config.image_grid_pinpoints == GRIDS
