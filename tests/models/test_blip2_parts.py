"""BLIP-2 and InstructBLIP: the body of every head, frozen parts, cached features."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from cases import tiny
from cases.blip2 import CASES
from cases.case import Case, assert_all_close, assert_tensors_equal, calls_of, gradients, trained
from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2Model,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipModel,
)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_automodel_has_the_body_of_every_head(case: Case, tmp_path: Path) -> None:
    """Nothing is missing, only the head's own layers are left over, and its features are the head's."""
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.save_pretrained(tmp_path)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    is_instruct = isinstance(model, VlmInstructBlipForConditionalGeneration)
    assert type(body) is (VlmInstructBlipModel if is_instruct else VlmBlip2Model)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(("similarity.", "itm_head.", "lm_head.")) for name in info["unexpected_keys"])
    assert_tensors_equal(body, model.base_model)
    inputs = {name: value for name, value in inputs.items() if name not in ("decoder_input_ids", "use_cache")}
    with torch.no_grad():
        assert torch.equal(body(**inputs).last_hidden_state, model.base_model(**inputs).last_hidden_state)


def test_frozen_parts_stay_as_they_are(case: Case) -> None:
    """Three steps with weight decay: tower and LLM in eval mode, without gradients, and unchanged."""
    model, inputs = tiny.randomise(case.build()), case.inputs()
    model.train()
    body = model.base_model
    frozen = [body.vision_model, *([] if body.language_model is None else [body.language_model])]
    assert not any(module.training for part in frozen for module in part.modules())
    assert all(module.training for module in body.qformer.modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        case.loss(model, inputs).backward()
        assert all(p.grad is None for part in frozen for p in part.parameters())
        optimizer.step()
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == trained(model)
    prefixes = ("model.vision_model.", "model.language_model.")
    assert not any(name.startswith(prefixes) for name in changed)
    assert {"model.vision_norm.weight", "model.qformer.embeddings.query_tokens"} <= changed


def test_cached_features_take_the_place_of_the_tower(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        options = {"stop_at_layer": -1} if model.config.vision_config.model_type == "vlm_tower" else {}
        features = model.base_model.vision_model(pixel_values=inputs["pixel_values"], **options).last_hidden_state
    cached = {**{k: v for k, v in inputs.items() if k != "pixel_values"}, "vision_features": features}
    results = []
    for batch, num_calls in ((inputs, 1), (cached, 0)):
        with calls_of(model.base_model.vision_model) as calls:
            loss = case.loss(model, batch)
        assert len(calls) == num_calls
        results.append({"loss": loss.detach(), **gradients(model, loss)})
    from_pixels, from_cache = ({k: v.clone() for k, v in result.items() if v is not None} for result in results)
    assert_all_close(from_cache, from_pixels)
    with pytest.raises(ValueError, match="Pass either pixel_values or vision_features"):
        case.loss(model, {**inputs, "vision_features": features})


def test_another_image_changes_the_loss(case: Case) -> None:
    model, inputs = tiny.randomise(case.build()), case.inputs()
    with torch.no_grad():
        one = case.loss(model, inputs)
        other = case.loss(model, {**inputs, "pixel_values": tiny.pixels()})
    assert abs(one - other) > 1e-4


def test_text_branch_is_trained_where_it_is_read(case: Case) -> None:
    model = case.build()
    branch = {n for n in trained(model) if ".qformer." in n and (".mlp." in n and ".query_mlp." not in n)}
    layers = {int(name.split("layers.")[1][0]) for name in branch}
    words = {n for n in trained(model) if "word_embedding" in n or "position_embedding" in n}
    if isinstance(model, VlmInstructBlipForConditionalGeneration):
        assert layers == {0, 1}  # of the last, queries see nothing
        assert len(words) == 2
    elif isinstance(model, VlmBlip2ForConditionalGeneration):
        assert not branch | words
    else:
        assert layers == {0, 1, 2}
        assert len(words) == 2
