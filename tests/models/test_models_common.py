"""What holds for every model, each a row of CASES; then what holds for CLIP's locked, foreign and cached towers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import tiny
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipModel,
    VlmClipModel,
    VlmTextTowerModel,
    VlmTowerModel,
)
from hf_vlm.models.modeling_blip import VlmBlipHead

Inputs = dict[str, torch.Tensor]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT_SIZES = {**tiny.layer_sizes(width=24, heads=2), "vocab_size": len(tiny.VOCABULARY)}
VISION_SIZES = tiny.layer_sizes(image_size=tiny.IMAGE_SIZE, patch_size=8)


def pooled_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The distance of the pooled outputs from arbitrary ones, for towers, which have no loss of their own."""
    pooled = model(**inputs).pooler_output
    return (pooled - torch.arange(pooled.numel()).view_as(pooled).sin()).square().mean()


def own_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**inputs, return_loss=True).loss


def first_token_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """The distance of the texts' first states from arbitrary ones, for BLIP's body, which has no loss of its own."""
    states = model(**inputs).last_hidden_state[:, 0]
    return (states - torch.arange(states.numel()).view_as(states).sin()).square().mean()


def seeded_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    model.update_momentum()
    return model(**inputs, return_loss=True, sample_seed=0).loss


def caption_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss


def answer_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**{**inputs, "labels": inputs["decoder_input_ids"], "decoder_input_ids": None}).loss


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, its loss, and the shapes of its outputs on that batch."""

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]
    loss: Callable[[PreTrainedModel, Inputs], torch.Tensor]
    shapes: dict[str, tuple[int, ...]]


def tower_case(layout: str, tokens: int) -> Case:
    shapes = {"last_hidden_state": (5, tokens, 32), "pooler_output": (5, 32)}
    return Case(
        lambda: VlmTowerModel(tiny.tower_config(layout)), lambda: {"pixel_values": tiny.pixels()}, pooled_loss, shapes
    )


def clip_case(build: Callable[[], PreTrainedModel]) -> Case:
    shapes = dict.fromkeys(("logits_per_image", "logits_per_text"), (5, 5))
    shapes |= dict.fromkeys(("text_embeds", "image_embeds"), (5, 16))
    return Case(build, tiny.clip_inputs, own_loss, shapes)


def blip_case(head_class: type[PreTrainedModel], loss: Callable, shapes: dict[str, tuple[int, ...]], **options) -> Case:
    """Without what keeps a loss from reaching zero soon: smoothed labels, soft targets, slow averages."""
    options = {"label_smoothing": 0.0, "soft_target_weight": 0.0, "momentum": 0.5, **options}
    options = {**(head_class.layout if issubclass(head_class, VlmBlipHead) else {}), **options}

    def inputs() -> Inputs:
        answers = {"decoder_input_ids": tiny.blip_tokens(["red", "two tree", "a", "right", "blue"])["input_ids"]}
        return tiny.blip_inputs() | (answers if head_class is VlmBlipForQuestionAnswering else {})

    return Case(lambda: head_class(tiny.blip_config(**options)), inputs, loss, shapes)


BLIP_STATES = {"last_hidden_state": (5, 11, 24)}
BLIP_PAIRS = {"itm_logits": (5, 2), "image_embeds": (5, 16), "text_embeds": (5, 16)}
BLIP_CAPTIONS = {"logits": (5, 11, len(tiny.BLIP_VOCABULARY)), **BLIP_STATES}
BLIP_ANSWERS = {"logits": (5, 4, len(tiny.BLIP_VOCABULARY)), "last_hidden_state": (5, 4, 24)}


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**VISION_SIZES))


def dinov2() -> Dinov2Model:
    return Dinov2Model(Dinov2Config(**VISION_SIZES, mlp_ratio=2))


def vit() -> ViTModel:
    return ViTModel(ViTConfig(**VISION_SIZES, **NO_DROPOUT))


def bert() -> BertModel:
    return BertModel(BertConfig(**TEXT_SIZES, **NO_DROPOUT))


def roberta() -> RobertaModel:
    return RobertaModel(RobertaConfig(**TEXT_SIZES, **NO_DROPOUT, pad_token_id=tiny.PAD))


def distilbert() -> DistilBertModel:
    sizes = {"dim": 24, "hidden_dim": 48, "n_heads": 2, "n_layers": 2, "vocab_size": len(tiny.VOCABULARY)}
    return DistilBertModel(DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0))


def clip_text() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**TEXT_SIZES, eos_token_id=tiny.END))


def whole_clip() -> CLIPModel:
    return CLIPModel(tiny.native_clip_config())


def our_vision() -> VlmTowerModel:
    return VlmTowerModel(tiny.tower_config())


def our_text() -> VlmTextTowerModel:
    return VlmTextTowerModel(tiny.text_config())


PARTS = {
    "siglip + bert": (siglip, bert),
    "dinov2 + clip text": (dinov2, clip_text),
    "vit + roberta": (vit, roberta),
    "whole clip + distilbert": (whole_clip, distilbert),
    "our tower + whole clip": (our_vision, whole_clip),
    "siglip + our text tower": (siglip, our_text),
}


def from_parts(vision: Callable[[], PreTrainedModel], text: Callable[[], PreTrainedModel], **options) -> VlmClipModel:
    return VlmClipModel.from_parts(vision=vision(), text=text(), projection_dim=16, **options)


CASES = {
    "tower, clip layout": tower_case("clip", 17),
    "tower, blip layout": tower_case("blip", 17),
    "tower, eva layout": tower_case("eva", 17),
    "tower, mean of patches": tower_case("mean", 16),
    "text tower": Case(
        our_text, tiny.tokens, pooled_loss, {"last_hidden_state": (5, 11, 24), "pooler_output": (5, 24)}
    ),
    "clip": clip_case(lambda: VlmClipModel(tiny.clip_config())),
    "clip, sigmoid loss": clip_case(lambda: VlmClipModel(tiny.clip_config(loss_type="sigmoid"))),
    "clip, means of tokens": clip_case(
        lambda: VlmClipModel(tiny.clip_config(vision_pooling="mean", text_pooling="mean"))
    ),
    **{f"clip, {name}": clip_case(lambda parts=parts: from_parts(*parts)) for name, parts in PARTS.items()},
    "blip, encoder": blip_case(VlmBlipModel, first_token_loss, BLIP_STATES, use_text_decoder=False),
    "blip, decoder": blip_case(VlmBlipModel, first_token_loss, BLIP_STATES, use_text_encoder=False),
    "blip, pretraining": blip_case(VlmBlipForPreTraining, seeded_loss, BLIP_PAIRS),
    "blip, pretraining, nothing shared": blip_case(
        VlmBlipForPreTraining, seeded_loss, BLIP_PAIRS, share_encoder_decoder=False, queue_size=0
    ),
    "blip, pretraining, tied words": blip_case(
        VlmBlipForPreTraining, seeded_loss, BLIP_PAIRS, tie_word_embeddings=True
    ),
    "blip, retrieval": blip_case(VlmBlipForImageTextRetrieval, seeded_loss, BLIP_PAIRS),
    "blip, retrieval, means of tokens": blip_case(
        VlmBlipForImageTextRetrieval,
        seeded_loss,
        BLIP_PAIRS,
        vision={"layout": "mean", "final_norm": "sequence"},
        vision_pooling="mean",
    ),
    "blip, captions": blip_case(VlmBlipForConditionalGeneration, caption_loss, BLIP_CAPTIONS),
    "blip, captions, tied words, dinov2": blip_case(
        VlmBlipForConditionalGeneration,
        caption_loss,
        BLIP_CAPTIONS,
        vision_config=dinov2().config,
        tie_word_embeddings=True,
    ),
    "blip, answers": blip_case(VlmBlipForQuestionAnswering, answer_loss, BLIP_ANSWERS),
    "blip, answers, tied words": blip_case(
        VlmBlipForQuestionAnswering, answer_loss, BLIP_ANSWERS, tie_word_embeddings=True
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@contextmanager
def calls_of(*modules: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules among these that are called, in order, once for each call."""
    calls: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: calls.append(module)) for module in modules]
    yield calls
    for handle in handles:
        handle.remove()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_all_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def assert_loads_equal(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Saves the model and loads it (by AutoModel, if no head): nothing missing or left over, all tensors equal."""
    model.save_pretrained(folder)
    loader = type(model) if isinstance(model, VlmBlipHead) else AutoModel
    loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for tensors in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(loaded, tensors)()), dict(getattr(model, tensors)())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
    return loaded


# --- every model


def test_shapes(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        outputs = model(**inputs)
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == case.shapes
    assert all(tensor.isfinite().all() for tensor in outputs.values())


def test_new_model_has_no_unset_weights(case: Case) -> None:
    """A parameter that the initialisation forgets is garbage, and would be so after loading too."""
    with torch.device("meta"):
        model = case.build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    loaded = assert_loads_equal(model, tmp_path)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    with torch.no_grad():
        assert_all_close(dict(loaded(**inputs)), dict(model(**inputs)))


def test_sdpa_is_eager(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    outputs = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        attentions = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
        assert attentions == {attention}
        outputs.append(dict(model(**inputs)))
    assert_all_close(*outputs)


def test_sdpa_in_bfloat16_on_a_cpu(case: Case) -> None:
    """There it is written out: the same numbers as PyTorch's kernel in float32, to bfloat16's precision."""
    model, inputs = case.build().eval(), case.inputs()
    with torch.no_grad():
        expected = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**inputs)
    for name in case.shapes:
        assert (found[name] - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_tuple_is_dict(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        as_dict, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for found, expected in zip(as_tuple, as_dict.to_tuple(), strict=True):
        assert torch.equal(found, expected)


def test_every_trained_parameter_has_a_gradient(case: Case) -> None:
    model = tiny.randomise(case.build())
    found = gradients(model, case.loss(model, case.inputs()))
    for name, parameter in model.named_parameters():
        assert (found[name] is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert found[name].isfinite().all()
            assert found[name].abs().max() > 0, name


def test_gradient_checkpointing(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()).train(), case.inputs()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    norms = [next(module for module in layer.modules() if isinstance(module, nn.LayerNorm)) for layer in layers]
    case.loss(model, inputs)  # makes the momentum encoders, whose calls do not count
    results, num_calls = [], []
    for _ in range(2):
        with calls_of(*norms) as calls:
            loss = case.loss(model, inputs)
            results.append({"loss": loss.detach(), **gradients(model, loss)})
        num_calls.append({norm: calls.count(norm) for norm in norms})
        model.activation_checkpointing_enable()
    # What a checkpointed layer holds runs once more in the backward pass.
    assert min(num_calls[0].values()) > 0
    assert num_calls[1] == {norm: 2 * count for norm, count in num_calls[0].items()}
    plain, checkpointed = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert_all_close(checkpointed, plain)


def test_one_batch_is_overfitted(case: Case) -> None:
    model, inputs = case.build().train(), case.inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses: list[float] = []
    while len(losses) < 200 and (not losses or losses[-1] > 0.1 * losses[0]):
        optimizer.zero_grad()
        loss = case.loss(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0
    assert losses[-1] <= 0.1 * losses[0]


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
