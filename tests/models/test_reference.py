"""Our numbers against transformers' own classes and closed forms, with every parameter randomised.

Outputs and gradients are equal to 1e-5, relative and absolute, in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from cases import tiny
from hf_vlm import VlmClipModel, VlmTextTowerModel, VlmTowerModel
from hf_vlm.hub.convert import clip as convert_clip
from hf_vlm.hub.convert import from_transformers
from hf_vlm.hub.convert.state_dict import Names, flipped, fuse, rename
from hf_vlm.models import losses

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

CLIP_CONFIGS = {
    "quick-gelu": {},
    "gelu, other sizes": {
        "vision": tiny.layer_sizes(width=48, heads=3, layers=3, hidden_act="gelu", patch_size=16),
        "text": tiny.layer_sizes(width=40, heads=5, layers=1, hidden_act="gelu"),
        "projection_dim": 24,
    },
    "padded with the end token": {
        "vision": tiny.layer_sizes(width=16, heads=1, layers=1, patch_size=4),
        "text": {"pad_token_id": tiny.END, "num_hidden_layers": 3},
    },
    "eos_token_id 2": {"text": {"eos_token_id": 2}, "vision": {"layer_norm_eps": 1e-6}},
}


@pytest.fixture(params=CLIP_CONFIGS.values(), ids=CLIP_CONFIGS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[VlmClipModel, CLIPModel]:
    """Our model, converted, and transformers' with the same weights."""
    native = tiny.randomise(CLIPModel(tiny.native_clip_config(**request.param)))
    return from_transformers(native), native


def longest_and_padded(native: CLIPModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same captions padded to the longest, for us, and to every position, for transformers."""
    pad_token = tiny.VOCABULARY[native.config.text_config.pad_token_id]
    tokenizer = tiny.tokenizer(pad_token=pad_token)
    ours, theirs = (
        tokenizer(tiny.CAPTIONS, padding=padding, max_length=tiny.MAX_LENGTH, return_tensors="pt")
        for padding in ("longest", "max_length")
    )
    assert ours["input_ids"].shape[1] < theirs["input_ids"].shape[1]
    return (
        {name: ours[name] for name in ("input_ids", "attention_mask")},
        {name: theirs[name] for name in ("input_ids", "attention_mask")},
    )


def test_clip_outputs(pair: tuple[VlmClipModel, CLIPModel]) -> None:
    ours, theirs = pair
    text, native_text = longest_and_padded(theirs)
    pixel_values = tiny.pixels()
    with torch.no_grad():
        found = ours(pixel_values=pixel_values, **text, return_loss=True)
        expected = theirs(pixel_values=pixel_values, **native_text, return_loss=True)
        features = ours.get_image_features(pixel_values), ours.get_text_features(**text)
        native_features = theirs.get_image_features(pixel_values), theirs.get_text_features(**native_text)
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    for feature, native_feature in zip(features, native_features, strict=True):
        torch.testing.assert_close(feature.pooler_output, native_feature.pooler_output, **CLOSE)
    # Every image and every text has an embedding of its own, or the comparison says little.
    assert torch.pdist(found.image_embeds).min() > 1e-2
    assert torch.pdist(found.text_embeds).min() > 1e-2


def test_clip_hidden_states(pair: tuple[VlmClipModel, CLIPModel]) -> None:
    text, _ = longest_and_padded(pair[1])
    pixel_values = tiny.pixels()
    real = text["attention_mask"].bool()
    with torch.no_grad():
        vision = [model.vision_model(pixel_values, output_hidden_states=True) for model in pair]
        texts = [model.text_model(**text, output_hidden_states=True) for model in pair]
    for found, expected in zip(vision[0].hidden_states, vision[1].hidden_states, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(vision[0].last_hidden_state, vision[1].last_hidden_state, **CLOSE)
    torch.testing.assert_close(vision[0].pooler_output, vision[1].pooler_output, **CLOSE)
    for found, expected in zip(texts[0].hidden_states, texts[1].hidden_states, strict=True):
        torch.testing.assert_close(found[real], expected[real], **CLOSE)
    torch.testing.assert_close(texts[0].last_hidden_state[real], texts[1].last_hidden_state[real], **CLOSE)
    torch.testing.assert_close(texts[0].pooler_output, texts[1].pooler_output, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clip_gradients(pair: tuple[VlmClipModel, CLIPModel], attention: str) -> None:
    ours, theirs = pair
    ours.set_attn_implementation(attention)
    text, native_text = longest_and_padded(theirs)
    pixel_values = tiny.pixels()
    ours(pixel_values=pixel_values, **text, return_loss=True).loss.backward()
    theirs(pixel_values=pixel_values, **native_text, return_loss=True).loss.backward()
    native = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    names = flipped(convert_clip.native_names(ours.config))
    expected = rename(fuse(native, convert_clip.QKV, "qkv_proj"), names)
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient.view_as(expected[name]), expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert gradient.abs().max() > 1e-4, name


def test_clip_interpolated_positions(pair: tuple[VlmClipModel, CLIPModel]) -> None:
    side = 2 * pair[0].config.vision_config.patch_size
    pixel_values = torch.randn(3, 3, 32 + side, 32 + 2 * side)
    with torch.no_grad():
        found, expected = (
            model.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output for model in pair
        )
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.pdist(found).min() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pooled_only_is_the_full_path(pair: tuple[VlmClipModel, CLIPModel], attention: str) -> None:
    ours, theirs = pair
    text, _ = longest_and_padded(theirs)
    ours.set_attn_implementation(attention)
    for tower, inputs in ((ours.vision_model, {"pixel_values": tiny.pixels()}), (ours.text_model, text)):
        gradients = []
        for pooled_only in (False, True):
            tower.zero_grad()
            outputs = tower(**inputs, pooled_only=pooled_only)
            assert (outputs.last_hidden_state.shape[1] == 1) == pooled_only
            (outputs.pooler_output * torch.linspace(-1, 1, outputs.pooler_output.shape[-1])).sum().backward()
            gradients.append([outputs.pooler_output.detach(), *(parameter.grad for parameter in tower.parameters())])
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


BLIP_LAYERS: Names = (
    ("layers.*.norm1.*", "encoder.layers.*.layer_norm1.*"),
    ("layers.*.norm2.*", "encoder.layers.*.layer_norm2.*"),
    ("layers.*.attn.qkv.*", "encoder.layers.*.self_attn.qkv.*"),
    ("layers.*.attn.proj.*", "encoder.layers.*.self_attn.projection.*"),
    ("layers.*.mlp.*", "encoder.layers.*.mlp.*"),
    ("embeddings.position_embedding.weight", "embeddings.position_embedding"),
    ("post_norm.*", "post_layernorm.*"),
)
TOWER_SIZES = [
    tiny.layer_sizes(width=32, heads=4, layers=2, image_size=32, patch_size=8),
    tiny.layer_sizes(width=48, heads=3, layers=3, image_size=32, patch_size=16),
    tiny.layer_sizes(width=20, heads=1, layers=1, image_size=24, patch_size=4),
]


@pytest.mark.parametrize("sizes", TOWER_SIZES, ids=["4 heads", "3 heads", "1 head"])
@pytest.mark.parametrize(
    ("layout", "native_class", "config_class"),
    [("blip", BlipVisionModel, BlipVisionConfig), ("eva", Blip2VisionModel, Blip2VisionConfig)],
)
def test_other_layouts(layout: str, native_class: type, config_class: type, sizes: dict) -> None:
    theirs = tiny.randomise(native_class(config_class(**sizes)))
    ours = VlmTowerModel(tiny.tower_config(layout, **sizes)).eval()
    assert (theirs.config.layer_norm_eps, theirs.config.hidden_act) == (ours.config.layer_norm_eps, "gelu")
    expected_shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    state_dict = rename(theirs.state_dict(), flipped(BLIP_LAYERS))
    ours.load_state_dict({name: tensor.reshape(expected_shapes[name]) for name, tensor in state_dict.items()})
    ours.double(), theirs.double()  # float32 rounds otherwise from one processor to the next
    pixel_values = tiny.pixels(3, sizes["image_size"]).double()
    with torch.no_grad():
        found, expected = (model(pixel_values, output_hidden_states=True) for model in (ours, theirs))
        larger = torch.randn(2, 3, sizes["image_size"] + 16, sizes["image_size"]).double()
        interpolated = [model(larger, interpolate_pos_encoding=True).last_hidden_state for model in (ours, theirs)]
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(found.pooler_output, expected.last_hidden_state[:, 0], **CLOSE)
    for hidden, native_hidden in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(hidden, native_hidden, **CLOSE)
    torch.testing.assert_close(*interpolated, **CLOSE)


@pytest.mark.parametrize("stop_at_layer", [-1, -2, -4, 0, 1, 3])
def test_stop_at_layer(stop_at_layer: int) -> None:
    sizes = tiny.layer_sizes(layers=3, image_size=32, patch_size=8)
    theirs = tiny.randomise(CLIPVisionModel(CLIPVisionConfig(**sizes)))
    ours = VlmTowerModel(tiny.tower_config(**sizes)).eval()
    names = flipped(convert_clip.VISION_NAMES)
    ours.load_state_dict(rename(fuse(theirs.state_dict(), convert_clip.QKV, "qkv_proj"), names))
    calls = []
    for layer in ours.layers:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    pixel_values = tiny.pixels(2)
    with torch.no_grad():
        outputs = ours(pixel_values, stop_at_layer=stop_at_layer)
        hidden_states = theirs(pixel_values, output_hidden_states=True).hidden_states
    torch.testing.assert_close(outputs.last_hidden_state, hidden_states[stop_at_layer], **CLOSE)
    assert calls == list(ours.layers)[: range(4)[stop_at_layer]]
    assert outputs.pooler_output is None


def test_stop_at_a_layer_that_is_not_there() -> None:
    tower = VlmTowerModel(tiny.tower_config())
    for stop_at_layer in (3, -4):
        with pytest.raises(ValueError, match=f"stop_at_layer={stop_at_layer} is outside the 3 hidden states"):
            tower(tiny.pixels(1), stop_at_layer=stop_at_layer)


def test_text_feature_is_at_the_first_end_token() -> None:
    tower = tiny.randomise(VlmTextTowerModel(tiny.text_config()))
    ids = torch.tensor([[tiny.START, 5, tiny.END, tiny.END], [tiny.START, 6, 7, tiny.END]])
    with torch.no_grad():
        outputs = tower(ids)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[[0, 1], [2, 3]])


# The losses, written out in numpy. Ids 3 and 0 come several times.
PAIR_IDS = {"distinct": None, "some equal": [3, 0, 3, 2, 0, 5, 3, 7], "all equal": [1] * 8}


def embeds(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-normalised embeddings that a gradient can be taken of."""
    images, texts = (nn.functional.normalize(torch.randn(batch, 4, dtype=torch.float64), dim=-1) for _ in range(2))
    return images.requires_grad_(), texts.requires_grad_()


def is_positive(pair_ids: list[int] | None, row: int, column: int) -> bool:
    return row == column if pair_ids is None else pair_ids[row] == pair_ids[column]


def softmax_closed_form(logits: np.ndarray, pair_ids: list[int] | None) -> float:
    total = 0.0
    for scores in (logits, logits.T):
        for row, row_scores in enumerate(scores):
            log_total = np.log(np.exp(row_scores).sum())
            positives = [c for c in range(len(scores)) if is_positive(pair_ids, row, c)]
            total -= np.mean([row_scores[column] - log_total for column in positives])
    return total / (2 * len(logits))


def sigmoid_closed_form(logits: np.ndarray, pair_ids: list[int] | None) -> float:
    total = 0.0
    for row in range(len(logits)):
        for column in range(len(logits)):
            sign = 1 if is_positive(pair_ids, row, column) else -1
            total += np.log(1 + np.exp(-sign * logits[row, column]))
    return total / len(logits)


@pytest.mark.parametrize("batch", [5, 8])
@pytest.mark.parametrize("pair_ids", PAIR_IDS.values(), ids=PAIR_IDS.keys())
def test_losses_are_their_closed_forms(batch: int, pair_ids: list[int] | None) -> None:
    images, texts = embeds(batch)
    ids = pair_ids and pair_ids[:batch]
    tensor_ids = None if ids is None else torch.tensor(ids)
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    logits = 3.0 * images.detach().numpy() @ texts.detach().numpy().T
    softmax = losses.contrastive_loss(images, texts, scale, tensor_ids).item()
    sigmoid = losses.sigmoid_loss(images, texts, scale, bias, tensor_ids).item()
    assert softmax == pytest.approx(softmax_closed_form(logits, ids), rel=1e-5)
    assert sigmoid == pytest.approx(sigmoid_closed_form(logits - 1.5, ids), rel=1e-5)


@contextmanager
def saved_sizes() -> Iterator[list[int]]:
    """The sizes of the tensors that are kept for the backward pass."""
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("pair_ids", PAIR_IDS.values(), ids=PAIR_IDS.keys())
@pytest.mark.parametrize("loss", [losses.contrastive_loss, losses.sigmoid_loss])
def test_blocks_of_rows_change_nothing(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., torch.Tensor], pair_ids: list[int] | None
) -> None:
    images, texts = embeds(8)
    learned = [torch.tensor(2.5, requires_grad=True)]
    if loss is losses.sigmoid_loss:
        learned.append(torch.tensor(-0.5, requires_grad=True))
    tensor_ids = None if pair_ids is None else torch.tensor(pair_ids)
    results = []
    for rows_per_block in (512, 3):
        monkeypatch.setattr(losses, "ROWS_PER_BLOCK", rows_per_block)
        with saved_sizes() as sizes:
            value = loss(images, texts, *learned, tensor_ids)
        # In blocks, no matrix of all rows by all columns is kept.
        assert (max(sizes) >= 8 * 8) == (rows_per_block == 512)
        results.append([value.detach(), *torch.autograd.grad(value, [images, texts, *learned])])
    for whole, in_blocks in zip(*results, strict=True):
        torch.testing.assert_close(in_blocks, whole, rtol=1e-5, atol=1e-6)
        assert whole.abs().max() > 1e-4


@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_model_loss(loss_type: str) -> None:
    model = tiny.clip_model(loss_type=loss_type)
    with torch.no_grad():
        outputs = model(**tiny.clip_inputs(), pair_ids=torch.tensor([4, 1, 4, 0, 1]), return_loss=True)
    logits = outputs.logits_per_image.double().numpy()
    closed_form = softmax_closed_form if loss_type == "softmax" else sigmoid_closed_form
    assert outputs.loss.item() == pytest.approx(closed_form(logits, [4, 1, 4, 0, 1]), rel=1e-5)
    scaled = outputs.image_embeds @ outputs.text_embeds.T * model.similarity.logit_scale.exp()
    shift = 0.0 if loss_type == "softmax" else model.similarity.logit_bias
    torch.testing.assert_close(outputs.logits_per_image, scaled + shift)
