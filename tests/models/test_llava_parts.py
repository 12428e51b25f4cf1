"""LLaVA: its towers, frozen parts, cached features, text alone, saving, ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel

from cases import tiny, tiny_blip2, tiny_llava
from cases.case import CLOSE, Case, assert_all_close, assert_tensors_equal, calls_of, gradients, trained
from cases.llava import CASES, Llava, own_loss
from cases.tiny_llava import GRIDS, LAYERS, TOWERS
from hf_vlm import VlmBlip2ForConditionalGeneration, VlmLlavaConfig, VlmLlavaModel
from hf_vlm.models.towers import layer_states
from processes import relative_errors, torchrun
from scripts import llava_steps


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def layers_of(tower: PreTrainedModel) -> nn.ModuleList:
    """All of a tower's layers."""
    (found,) = (m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    return found


def layers_run(layer: int) -> int:
    return layer if layer >= 0 else LAYERS + 1 + layer


# --- the common


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is Llava
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_tensors_equal(loaded, model)
    assert trained(loaded) == trained(model)
    assert not any(module.training for module in loaded.modules())
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is VlmLlavaConfig
    assert config.to_diff_dict() == model.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_automodel_has_the_body(case: Case, tmp_path: Path) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.save_pretrained(tmp_path)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(body) is VlmLlavaModel
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_tensors_equal(body, model.model)
    with torch.no_grad():
        assert torch.equal(body(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_a_loaded_model_is_saved_under_the_same_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, model in (
        ("llava", tiny_llava.llava_model()),
        ("blip2", tiny_blip2.blip2_model(VlmBlip2ForConditionalGeneration, "llama")),
    ):
        model.save_pretrained(tmp_path / name)
        type(model).from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name} again")
        first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, f"{name} again"))
        assert first.keys() == second.keys()


@pytest.mark.parametrize("tower", [None, "unfrozen"])
def test_gradient_checkpointing(case: Case, tower: str | None) -> None:
    """Gradients are equal; what holds trained parameters runs once more, what is frozen does not."""
    model, inputs = tiny.randomise(case.build()), case.inputs()
    if tower == "unfrozen":
        model.model.unfreeze_tower()
    model.train()
    embedding, results = model.model.language_model.model.layers[0], []
    for _ in range(2):
        with calls_of(embedding.mlp, model.model.vision_model) as calls:
            loss = case.loss(model, inputs)
            results.append({"loss": loss.detach(), **gradients(model, loss)})
        assert calls.count(model.model.vision_model) == 1
        assert calls.count(embedding.mlp) == len(results)
        model.activation_checkpointing_enable()
    plain, checkpointed = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert any("vision_model" in name for name in plain) == (tower == "unfrozen")
    assert_all_close(checkpointed, plain)


@pytest.mark.parametrize("tower", ["own", "clip"])
def test_gradients_reach_a_tower_that_is_checkpointed_reentrantly(tower: str) -> None:
    """The layer's states are taken by a hook, which must not be within what is run without a graph."""
    model, inputs, results = tiny_llava.on_tower(tower), tiny_llava.llava_inputs(), []
    model.model.unfreeze_tower()
    model.train()
    for _ in range(2):
        loss = own_loss(model, inputs)
        results.append(gradients(model, loss))
        results[-1] = {name: tensor.clone() for name, tensor in results[-1].items() if tensor is not None}
        model.activation_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model.model.vision_model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "pixel_values": kwargs["pixel_values"].requires_grad_()}),
            with_kwargs=True,
        )
    assert_all_close(results[1], results[0])


def test_cached_features_take_the_place_of_the_tower(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    features = model.model.get_vision_features(inputs["pixel_values"])
    assert not features.requires_grad
    cached = {**{k: v for k, v in inputs.items() if k != "pixel_values"}, "vision_features": features}
    results, tokens = [], []
    for batch, num_calls in ((inputs, 1), (cached, 0)):
        with calls_of(model.model.vision_model) as calls:
            loss = case.loss(model, batch)
            results.append({"loss": loss.detach(), **gradients(model, loss)})
            assert len(calls) == num_calls
            tokens.append(model.generate(**{**batch, "use_cache": True}, max_new_tokens=3, do_sample=False))
    from_pixels, from_cache = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert_all_close(from_cache, from_pixels)
    assert torch.equal(*tokens)


def test_features_may_be_cached_in_bfloat16() -> None:
    model, inputs = tiny_llava.llava_model(), tiny_llava.llava_inputs()
    features = model.model.get_vision_features(inputs.pop("pixel_values"))
    wanted = own_loss(model, {**inputs, "vision_features": features})
    found = own_loss(model, {**inputs, "vision_features": features.bfloat16()})
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert found != wanted


# --- layers


@pytest.mark.parametrize("layer", [-2, -1, 1, 2, -4, 4])
@pytest.mark.parametrize("name", TOWERS)
def test_layers_behind_the_chosen_one_are_not_run(name: str, layer: int) -> None:
    """Neither is anything of theirs read; the states are those that the whole tower has there, before any norm."""
    tower, pixels = tiny_llava.tower(name), tiny.pixels(2)
    layers, count = layers_of(tower), layers_run(layer)
    with torch.no_grad():
        with calls_of(*layers) as calls:
            states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert calls == list(layers)
        wanted = states[layer]
        assert len({float(state.sum()) for state in states}) == LAYERS + 1
        with calls_of(*layers) as calls:
            found = layer_states(tower, pixels, layer)
        assert calls == list(layers[:count])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        for parameter in layers[count:].parameters():
            parameter.fill_(torch.nan)
        assert torch.equal(layer_states(tower, pixels, layer), found)
        if count > 0:
            next(layers[count - 1].parameters()).fill_(torch.nan)
            assert layer_states(tower, pixels, layer).isnan().any()


@pytest.mark.parametrize("name", TOWERS)
def test_layers_behind_the_chosen_one_are_not_run_by_the_model(name: str) -> None:
    model, inputs = tiny_llava.on_tower(name, vision_feature_layer=-3), tiny_llava.llava_inputs()
    layers = layers_of(model.model.vision_model)
    with torch.no_grad(), calls_of(*layers) as calls:
        wanted = model(**inputs).logits
        assert calls == list(layers[:2])
        for parameter in layers[2:].parameters():
            parameter.fill_(torch.nan)
        assert torch.equal(model(**inputs).logits, wanted)
    states = model.model.vision_model.eval()
    assert layers_of(states) is layers


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_is_afterwards_as_before(name: str) -> None:
    """Also after an exception, from within a layer or before the first."""
    tower, pixels = tiny_llava.tower(name), tiny.pixels(2)
    layers = layers_of(tower)
    members = list(layers)
    names = list(tower.state_dict())
    with torch.no_grad():
        wanted = tower(pixel_values=pixels).last_hidden_state

        def fail(module: nn.Module, inputs: tuple) -> None:
            raise ArithmeticError("in a layer")

        hook = layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError, match="in a layer"):
            layer_states(tower, pixels, -2)
        hook.remove()
        with pytest.raises((ValueError, RuntimeError)):
            layer_states(tower, torch.zeros(2, 5, 32, 32), -2)
        layer_states(tower, pixels, -2)
        assert layers_of(tower) is layers
        assert list(layers) == members
        assert list(tower.state_dict()) == names
        assert not any(layer._forward_hooks for layer in layers if not layer_hooks_are_its_own(layer))
        assert torch.equal(tower(pixel_values=pixels).last_hidden_state, wanted)


def layer_hooks_are_its_own(layer: nn.Module) -> bool:
    """Whether the only hooks are those by which transformers records hidden states."""
    return all("output_capturing" in hook.__module__ for hook in layer._forward_hooks.values())


@pytest.mark.parametrize("name", TOWERS)
def test_layers_that_are_not_there_are_refused(name: str) -> None:
    tower, pixels = tiny_llava.tower(name), tiny.pixels(1)
    for layer in (LAYERS + 1, -LAYERS - 2):
        with pytest.raises(ValueError, match="outside the 5 hidden states"):
            layer_states(tower, pixels, layer)
    if name.startswith("own"):
        assert torch.equal(layer_states(tower, pixels, 0), layer_states(tower, pixels, -LAYERS - 1))
    else:
        with pytest.raises(ValueError, match="vision_feature_layer=0 is the embeddings"):
            layer_states(tower, pixels, 0)


@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("name", TOWERS)
def test_an_unfrozen_tower_is_trained_up_to_the_layer_that_is_read(name: str, layer: int) -> None:
    """Trained is what has a gradient; a trained parameter without one stalls data parallelism."""
    model, inputs = tiny_llava.on_tower(name, vision_feature_layer=layer), tiny_llava.llava_inputs()
    model.model.unfreeze_tower()
    model.train()
    tower = model.model.vision_model
    assert tower.training
    found = gradients(model, own_loss(model, inputs))
    for i, module in enumerate(layers_of(tower)):
        assert all(p.requires_grad == (i < layers_run(layer)) for p in module.parameters()), i
    with_gradient = {key for key, gradient in found.items() if gradient is not None}
    assert sorted(with_gradient ^ trained(model)) == []
    assert all(found[key].abs().max() > 0 for key in with_gradient)
    model.model.freeze_tower()
    model.train()
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.training


def test_frozen_parts_stay_as_they_are(case: Case) -> None:
    """Two steps with weight decay, with the tower frozen, then with the LLM as well."""
    model, inputs = tiny.randomise(case.build()), case.inputs()
    for frozen in ([model.model.vision_model], [model.model.vision_model, model.model.language_model]):
        for part in frozen:
            part.requires_grad_(False)
        model.train()
        assert not any(module.training for part in frozen for module in part.modules())
        assert all(module.training for module in model.model.projector.modules())
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            case.loss(model, inputs).backward()
            optimizer.step()
        changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
        assert changed == trained(model)
        assert {name.split(".")[1] for name in changed} == {"projector", "language_model"} - {
            "language_model" if len(frozen) == 2 else ""
        }


# --- text alone


TEXT = {
    "input_ids": torch.tensor([[0, 4, 5, 6], [7, 8, 9, 10]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4]),
}


@pytest.mark.parametrize("training", [False, True])
def test_text_alone_is_the_llm_alone(case: Case, training: bool) -> None:
    """The tower, frozen, is not called; an empty batch of pixels is the same as none."""
    model = tiny.randomise(case.build()).train(training)
    llm = model.model.language_model
    nothing = {"pixel_values": torch.zeros(0, 3, 32, 32), "image_sizes": torch.zeros(0, 2, dtype=torch.long)}
    with calls_of(model.model.vision_model) as calls:
        found = model(**TEXT).logits
        same = model(**TEXT, **nothing).logits
        written = model.eval().generate(**TEXT, max_new_tokens=3, do_sample=False)
    assert not calls
    expected = llm(**TEXT).logits
    mask = TEXT["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], **CLOSE)
    torch.testing.assert_close(same[mask], expected[mask], **CLOSE)
    assert torch.equal(written, llm.generate(**TEXT, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("tower", ["frozen", "unfrozen"])
def test_text_alone_leaves_no_trained_parameter_without_a_gradient(case: Case, tower: str) -> None:
    """Those of the projector, and of a tower that is trained, are zero."""
    model = tiny.randomise(case.build())
    if tower == "unfrozen":
        model.model.unfreeze_tower()
    model.train()
    with calls_of(model.model.vision_model) as calls:
        loss = model(**TEXT, labels=TEXT["input_ids"].masked_fill(TEXT["attention_mask"] == 0, -100)).loss
    assert (len(calls) == 0) == (tower == "frozen")
    found = gradients(model, loss)
    assert sorted(name for name in trained(model) if found[name] is None) == []
    assert {name for name, gradient in found.items() if gradient is not None} == trained(model)
    own_parts = [name for name in trained(model) if "language_model" not in name]
    assert any("vision_model" in name for name in own_parts) == (tower == "unfrozen")
    assert not any(found[name].any() for name in own_parts)
    assert any(found[name].any() for name in trained(model))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Results of one process, and of two ranks when one of them sees only text."""
    folder = tmp_path_factory.mktemp("ranks")
    one = llava_steps.main(folder)
    torchrun("llava_steps", folder)
    return one, torch.load(folder / "results-2.pt", weights_only=False)


@pytest.mark.parametrize("case", llava_steps.CASES, ids=", ".join)
def test_two_ranks_of_which_one_has_text_alone_are_one_process(case: tuple[str, ...], ranks: tuple[dict, dict]) -> None:
    one, two = (results[case] for results in ranks)
    assert not isinstance(two, str), two
    errors = relative_errors(two, one)
    for name in [name for name in errors if name.endswith("k_proj.bias")]:  # softmax leaves its gradient zero
        assert max(two[name].abs().max(), one[name].abs().max()) < 1e-6
        del errors[name]
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    assert any("vision_model" in name for name in errors) == (case[2] == "unfrozen")
    assert ("model.projector.newline" in errors) == (case[1] == "anyres")


# --- from parts


@pytest.mark.parametrize("llm", ["llama", "llama, tied", "qwen2"])
@pytest.mark.parametrize("image_token_id", [None, 3, 90])
def test_from_parts_grows_the_embeddings_and_keeps_ties(image_token_id: int | None, llm: str) -> None:
    language_model = tiny_blip2.llm(llm)
    size = language_model.get_input_embeddings().num_embeddings
    before = language_model.get_input_embeddings().weight.detach().clone()
    own = Llava.from_parts(tiny_llava.tower("own"), language_model, image_token_id)
    rows = {None: 64, 3: size, 90: 128}[image_token_id]
    assert own.config.image_token_id == (size if image_token_id is None else image_token_id)
    assert own.config.text_config.vocab_size == own.model.language_model.config.vocab_size == rows
    embeddings, head = own.get_input_embeddings().weight, own.get_output_embeddings().weight
    assert len(embeddings) == len(head) == rows
    assert torch.equal(embeddings[:size], before)
    assert (embeddings is head) == (llm == "llama, tied")
    assert own.model.language_model is language_model
    assert own(torch.tensor([[4, rows - 1]])).logits.shape == (1, 2, rows)


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_from_parts_copies_the_tower(name: str, anyres: bool, tmp_path: Path) -> None:
    """From an instance, which stays unchanged, or from a folder."""
    tower = tiny_llava.tower(name).train()
    tower.save_pretrained(tmp_path)
    config = tower.config.to_dict()
    weights = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
    options = {"image_grid_pinpoints": GRIDS if anyres else None, "projector_type": "linear"}
    if name == "siglip":
        options["vision_feature_select_strategy"] = "full"
    if name.startswith("own"):
        options |= {"image_size": 64, "image_grid_pinpoints": [[64, 128], [128, 64]] if anyres else None}
    models = [Llava.from_parts(source, tiny_blip2.llm(), **options) for source in (tower, str(tmp_path))]
    assert tower.training
    assert all(p.requires_grad for p in tower.parameters())
    assert tower.config.to_dict() == config
    assert all(torch.equal(tensor, weights[key]) for key, tensor in tower.state_dict().items())
    own = {id(p) for p in tower.parameters()}
    for model in models:
        assert not any(id(p) in own or p.requires_grad for p in model.model.vision_model.parameters())
        assert not any(module.training for module in model.modules())
        assert model.config.projector_type == "linear"
        for key, tensor in model.model.vision_model.state_dict().items():
            if "position_embedding" not in key:
                assert torch.equal(tensor, weights[key]), key
        model.train()
        assert not any(module.training for module in model.model.vision_model.modules())
        assert model.model.projector.training


def test_image_size_interpolates_our_tower(tmp_path: Path) -> None:
    tower, pixels = tiny_llava.tower("own"), tiny.pixels(1, size=48)
    model = Llava.from_parts(tower, tiny_blip2.llm(), tiny_blip2.IMAGE_TOKEN_ID, image_size=48)
    assert model.config.vision_config.image_size == 48
    with torch.no_grad():
        expected = tower(pixel_values=pixels, interpolate_pos_encoding=True, stop_at_layer=-2).last_hidden_state
        torch.testing.assert_close(model.model.get_vision_features(pixels), expected[:, 1:], **CLOSE)
    assert len(model.get_image_features(pixels).pooler_output[0]) == 36
    model.save_pretrained(tmp_path)
    loaded = Llava.from_pretrained(tmp_path)
    assert_tensors_equal(loaded, model)
    with pytest.raises(ValueError, match="A clip_vision_model tower takes images of 32 pixels, not of 48"):
        Llava.from_parts(tiny_llava.tower("clip"), tiny_blip2.llm(), image_size=48)


def test_grids_fit_the_tiles_that_image_size_asks_for() -> None:
    """Not those of the tower before."""
    llm, grids = tiny_blip2.llm, [[48, 96], [96, 48], [96, 96]]
    model = Llava.from_parts(
        tiny_llava.tower("own"), llm(), tiny_blip2.IMAGE_TOKEN_ID, image_size=48, image_grid_pinpoints=grids
    )
    features = model.get_image_features(tiny.pixels(3, size=48), torch.tensor([[40, 90]])).pooler_output
    assert features[0].shape[1] == 20
    assert len(features[0]) > 36


def test_grids_that_do_not_fit_the_tiles_are_refused() -> None:
    message = "multiples of the tower's image size, 48 pixels"
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        Llava.from_parts(tiny_llava.tower("own"), tiny_blip2.llm(), image_size=48, image_grid_pinpoints=[[32, 64]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_llava.llava_config(image_grid_pinpoints=[[33, 64]]), "of the tower's image size, 32 pixels"),
        (lambda: tiny_llava.llava_config(image_grid_pinpoints=[[32]]), "of the tower's image size, 32 pixels"),
        (lambda: tiny_llava.llava_config(image_grid_pinpoints=[[0, 32]]), "of the tower's image size, 32 pixels"),
        (lambda: tiny_llava.llava_config(text_config=tiny_blip2.llm_config("t5")), "LLaVA needs a causal one"),
        (lambda: tiny_llava.llava_config(projector_type="conv"), "'projector_type' expected one of"),
        (lambda: tiny_llava.llava_config(vision_feature_select_strategy="cls"), "select_strategy' expected one of"),
    ],
)
def test_configs_that_contradict_themselves(build: Callable[[], object], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        build()


def test_a_tower_without_a_class_token_has_none_to_leave_out() -> None:
    """ "default" would leave out a patch."""
    for tower in (tiny.tower_config("mean"), tiny_llava.tower("siglip").config):
        with pytest.raises(ValueError, match="has no class token"):
            tiny_llava.llava_model(vision_config=tower)


# --- precision


def test_loaded_in_bfloat16(tmp_path: Path) -> None:
    """All weights; rotary frequencies stay in float32, and so do the numbers, to bfloat16's precision."""
    model, inputs = tiny_llava.llava_model(), tiny_llava.llava_inputs()
    model.save_pretrained(tmp_path)
    loaded = Llava.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in loaded.named_buffers() if "inv_freq" in name} == {torch.float32}
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, expected = loaded(**inputs).logits[mask].float(), model(**inputs).logits[mask]
        assert (found - expected).norm() < 0.1 * expected.norm()
        assert own_loss(loaded, inputs).dtype == torch.float32
    generated = loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (3, 3 + inputs["input_ids"].shape[1])


@pytest.mark.parametrize("anyres", [False, True])
def test_an_llm_in_bfloat16_beside_a_projector_in_float32(anyres: bool, tmp_path: Path) -> None:
    tiny_blip2.llm().save_pretrained(tmp_path / "llm")
    model = Llava.from_parts(
        tiny_llava.tower("own"),
        str(tmp_path / "llm"),
        tiny_blip2.IMAGE_TOKEN_ID,
        language_model_kwargs={"dtype": torch.bfloat16},
        image_grid_pinpoints=GRIDS if anyres else None,
    )
    dtypes = {name: {p.dtype for p in part.parameters()} for name, part in model.model.named_children()}
    assert dtypes["language_model"] == {torch.bfloat16}
    assert dtypes["projector"] == dtypes["vision_model"] == {torch.float32}
    model.train()
    for inputs in (tiny_llava.llava_inputs(anyres), TEXT):
        found = gradients(model, own_loss(model, inputs))
        assert all(found[name] is not None and found[name].isfinite().all() for name in trained(model))
    assert model.generate(**tiny_llava.llava_inputs(anyres), max_new_tokens=2).shape[0] == 3
