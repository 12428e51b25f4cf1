"""CLIP: bad inputs, towers from elsewhere, locked towers, features from a cache, pipelines."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CLIPModel,
    PreTrainedModel,
    SiglipTextConfig,
    SiglipTextModel,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from cases import tiny
from cases.case import CLOSE, Inputs, assert_all_close, calls_of, gradients
from cases.clip import PARTS, bert, dinov2, from_parts, our_text, our_vision, own_loss, siglip, vit
from hf_vlm import (
    VlmClipModel,
    VlmTowerModel,
)

# --- bad inputs


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny.tower_config(num_attention_heads=5), r"hidden_size \(32\) must be a multiple of .* \(5\)"),
        (lambda: tiny.text_config(num_attention_heads=5), r"hidden_size \(24\) must be a multiple of .* \(5\)"),
        (lambda: tiny.tower_config(patch_size=5), r"image_size \(32\) must be a multiple of patch_size \(5\)"),
        (lambda: tiny.tower_config(use_class_token=False), 'pooling="class" needs use_class_token=True'),
        (lambda: tiny.tower_config(final_norm="none"), "'final_norm' expected one of"),
        (lambda: tiny.clip_config(loss_type="hinge"), "'loss_type' expected one of"),
    ],
)
def test_configs_that_contradict_themselves(build: Callable[[], object], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        build()


def test_image_of_another_size() -> None:
    model = tiny.clip_model()
    with pytest.raises(ValueError, match=r"Images of 40x32 pixels do not fit a tower of 32x32: resize them"):
        model.get_image_features(torch.randn(2, 3, 40, 32))
    with pytest.raises(ValueError, match=r"Image sides 44x32 must be multiples of the patch size 8"):
        model.get_image_features(torch.randn(2, 3, 44, 32), interpolate_pos_encoding=True)


def test_text_that_is_too_long() -> None:
    ids = tiny.tokens(["a " * 20], truncation=False)
    with pytest.raises(ValueError, match="Texts of 22 tokens do not fit 12 positions: tokenize with truncation=True"):
        tiny.clip_model().get_text_features(**ids)
    assert tiny.clip_processor()(text=["a " * 20])["input_ids"].shape == (1, 12)


def test_inputs_that_are_missing_or_too_many() -> None:
    model, inputs = tiny.clip_model(), tiny.clip_inputs()
    with pytest.raises(ValueError, match="Pass either pixel_values or vision_features"):
        model.get_image_features()
    with pytest.raises(ValueError, match="Pass either pixel_values or vision_features"):
        model.get_image_features(inputs["pixel_values"], vision_features=torch.randn(5, 17, 32))
    with pytest.raises(ValueError, match="Pass either input_ids or text_features"):
        model.get_text_features(inputs["input_ids"], text_features=torch.randn(5, 24))
    inputs["pixel_values"] = inputs["pixel_values"][:3]
    with pytest.raises(ValueError, match="The loss needs pairs, not 3 images and 5 texts"):
        model(**inputs, return_loss=True)
    assert model(**inputs).logits_per_image.shape == (3, 5)


# --- CLIP: towers from elsewhere, locked towers, features from a cache


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_from_parts_keeps_the_towers_weights(parts: tuple[Callable, Callable], tmp_path: Path) -> None:
    vision, text = (tiny.randomise(part()) for part in parts)
    vision.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    from_instances = VlmClipModel.from_parts(vision=vision, text=text, projection_dim=16)
    from_folders = VlmClipModel.from_parts(
        vision=str(tmp_path / "vision"), text=str(tmp_path / "text"), projection_dim=16
    )
    vision = vision.vision_model if isinstance(vision, CLIPModel) else vision
    text = text.text_model if isinstance(text, CLIPModel) else text
    for model in (from_instances, from_folders):
        for found, expected in ((model.vision_model, vision), (model.text_model, text)):
            for name, tensor in expected.state_dict().items():
                assert torch.equal(found.state_dict()[name], tensor), name


def test_from_parts_in_the_dtypes_asked_for(tmp_path: Path) -> None:
    vit().to(torch.bfloat16).save_pretrained(tmp_path / "vision")
    bert().save_pretrained(tmp_path / "text")
    for text_kwargs, text_dtype in ((None, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        model = VlmClipModel.from_parts(str(tmp_path / "vision"), str(tmp_path / "text"), text_kwargs=text_kwargs)
        assert {parameter.dtype for parameter in model.vision_model.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in model.text_model.parameters()} == {text_dtype}
        loss = own_loss(model, tiny.clip_inputs())
        assert loss.isfinite()
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_embeddings_do_not_depend_on_the_batch(parts: tuple[Callable, Callable]) -> None:
    model, inputs = tiny.randomise(from_parts(*parts)), tiny.clip_inputs()
    with torch.no_grad():
        together = model(**inputs)
        for row, caption in enumerate(tiny.CAPTIONS):
            alone = model(pixel_values=inputs["pixel_values"][row : row + 1], **tiny.tokens([caption]))
            torch.testing.assert_close(alone.image_embeds[0], together.image_embeds[row], **CLOSE)
            torch.testing.assert_close(alone.text_embeds[0], together.text_embeds[row], **CLOSE)


@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize("vision", [our_vision, dinov2])
def test_locked_tower_stays_as_it_is(name: str, vision: Callable[[], PreTrainedModel]) -> None:
    model, inputs = from_parts(vision, bert), tiny.clip_inputs()
    model.lock_tower(name)
    locked = model.get_submodule(f"{name}_model")
    other = model.get_submodule("text_model" if name == "vision" else "vision_model")
    model.train()
    assert not any(module.training for module in locked.modules())
    assert all(module.training for module in other.modules())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        own_loss(model, inputs).backward()
        assert all(parameter.grad is None for parameter in locked.parameters())
        optimizer.step()
    unchanged = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert {key for key in before if key.startswith(f"{name}_model.")} <= unchanged
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not trained & unchanged


def test_locking_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="There is no tower 'audio' to lock"):
        tiny.clip_model().lock_tower("audio")


def hidden_states(model: VlmClipModel, inputs: Inputs) -> Inputs:
    features = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    return {"vision_features": features, "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def pooled_images(model: VlmClipModel, inputs: Inputs) -> Inputs:
    return {**hidden_states(model, inputs), "vision_features": model.vision_pooled(inputs["pixel_values"])}


def pooled_texts(model: VlmClipModel, inputs: Inputs) -> Inputs:
    texts = model.text_pooled(inputs["input_ids"], inputs["attention_mask"])
    return {"pixel_values": inputs["pixel_values"], "text_features": texts}


@pytest.mark.parametrize(
    ("parts", "locked", "cache"),
    [
        ((our_vision, our_text), "vision", hidden_states),
        ((our_vision, bert), "vision", pooled_images),
        ((vit, our_text), "vision", hidden_states),
        ((siglip, our_text), "vision", pooled_images),
        ((our_vision, our_text), "text", pooled_texts),
        ((dinov2, bert), "text", pooled_texts),
    ],
)
def test_cached_features_take_the_place_of_a_tower(
    parts: tuple[Callable, Callable], locked: str, cache: Callable[[VlmClipModel, Inputs], Inputs]
) -> None:
    model, inputs = tiny.randomise(from_parts(*parts)), tiny.clip_inputs()
    model.lock_tower(locked)
    tower = model.get_submodule(f"{locked}_model")
    with torch.no_grad():
        cached = cache(model, inputs)
    results = []
    for batch, num_calls in ((inputs, 1), (cached, 0)):
        with calls_of(tower, *tower.modules()) as calls:
            loss = own_loss(model, batch)
        assert calls.count(tower) == num_calls * 2  # it is its own first module
        assert num_calls or not any(isinstance(module, GradientCheckpointingLayer) for module in calls)
        results.append({"loss": loss.detach(), **gradients(model, loss)})
    from_pixels, from_cache = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert_all_close(from_cache, from_pixels)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == from_cache.keys() - {"loss"}
    assert all(from_cache[name].abs().max() > 0 for name in trained)


def test_hidden_states_of_a_foreign_pooler_are_refused() -> None:
    model, inputs = from_parts(siglip, our_text), tiny.clip_inputs()
    with pytest.raises(ValueError, match="pooled output of a siglip_vision_model tower cannot be recomputed"):
        model(**hidden_states(model, inputs))


# --- pipelines


def save_with_processor(folder: Path) -> VlmClipModel:
    model = tiny.clip_model()
    model.save_pretrained(folder)
    tiny.clip_processor().save_pretrained(folder)
    return model


def test_zero_shot_image_classification_pipeline(tmp_path: Path) -> None:
    model = save_with_processor(tmp_path)
    labels = ["cat", "dog", "red house"]
    found = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        tiny.image(), candidate_labels=labels, hypothesis_template="a {}"
    )
    inputs = tiny.clip_processor()(images=[tiny.image()], text=[f"a {label}" for label in labels])
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.softmax(-1)[0].tolist()
    assert {row["label"]: row["score"] for row in found} == pytest.approx(dict(zip(labels, expected, strict=True)))


def test_image_feature_extraction_pipeline_of_a_tower(tmp_path: Path) -> None:
    tower = tiny.randomise(VlmTowerModel(tiny.tower_config()))
    tower.save_pretrained(tmp_path)
    tiny.clip_processor().image_processor.save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path))
    pixel_values = tiny.clip_processor()(images=[tiny.image()])["pixel_values"]
    with torch.no_grad():
        expected = tower(pixel_values)
    torch.testing.assert_close(extract(tiny.image(), return_tensors=True), expected.last_hidden_state)
    torch.testing.assert_close(extract(tiny.image(), return_tensors=True, pool=True), expected.pooler_output)


def test_image_feature_extraction_pipeline_of_clip(tmp_path: Path) -> None:
    model = save_with_processor(tmp_path)
    found = pipeline("image-feature-extraction", model=str(tmp_path))(tiny.image(), return_tensors=True)
    pixel_values = tiny.clip_processor()(images=[tiny.image()])["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(found, nn.functional.normalize(expected, dim=-1))


def test_a_tower_that_automodel_cannot_rebuild_is_refused_in_one_line() -> None:
    text = SiglipTextModel(SiglipTextConfig(vocab_size=20, **tiny.layer_sizes()))
    with pytest.raises(ValueError, match="siglip_text_model") as caught:
        VlmClipModel.from_parts(VlmTowerModel(tiny.tower_config()), text)
    assert "\n" not in str(caught.value)
