"""BLIP-2's first stage against a recorded step of LAVIS: losses, states and gradients in one joint forward."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vlm import VlmBlip2Config, VlmBlip2ForPreTraining
from hf_vlm.hub.convert import from_original

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RECORDED = Path(__file__).parents[1] / "data" / "blip2_stage1"
META = json.loads((RECORDED / "meta.json").read_text())
VOCABULARY = (RECORDED / "vocab.txt").read_text().split()


def recorded_config(**options) -> VlmBlip2Config:
    """The config of the recorded weights, whose heads are 8 and 6 wide: no shape says so."""
    qformer = {
        **META["qformer"],
        "memory_size": META["vision"]["hidden_size"],
        "bos_token_id": META["bos_token_id"],
        "sep_token_id": VOCABULARY.index("[SEP]"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    sizes = {"projection_dim": META["embed_dim"], "label_smoothing": META["label_smoothing"]}
    return VlmBlip2Config(**{"vision_config": META["vision"], "qformer_config": qformer, **sizes, **options})


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "io.safetensors")


@pytest.fixture
def model() -> VlmBlip2ForPreTraining:
    """The recorded model in training mode; dropout is off, as it was there."""
    return from_original(RECORDED / "lavis_state.safetensors", config=recorded_config()).train()


def inputs(recorded: dict[str, torch.Tensor], length: int = 16) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": recorded["pixel_values"],
        "input_ids": recorded["input_ids"][:, :length],
        "attention_mask": recorded["attention_mask"][:, :length],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [16, 13], ids=["padded as there", "padded to the longest"])
@pytest.mark.parametrize("cached", [False, True], ids=["images", "cached features"])
def test_recorded_losses(model, recorded, length: int, attention: str, cached: bool) -> None:
    """The two pairs have one possible negative each, so that nothing is drawn."""
    assert recorded["attention_mask"].sum(dim=1).max() <= 13
    model.set_attn_implementation(attention)
    batch = inputs(recorded, length)
    if cached:
        features = model.model.vision_model(batch.pop("pixel_values"), stop_at_layer=-1).last_hidden_state
        batch["vision_features"] = features.detach()
    output = model(**batch, return_loss=True)
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        torch.testing.assert_close(getattr(output, name).detach(), recorded[name], rtol=0, atol=1e-5)
        assert abs(recorded[name].item() - META["loss"][name]) < 1e-6
    torch.testing.assert_close(output.query_output.detach(), recorded["query_output"], **CLOSE)


def test_recorded_states(model, recorded) -> None:
    with torch.no_grad():
        states = model.model.encode_images(recorded["pixel_values"])
        text = model.model.qformer(None, recorded["input_ids"], recorded["attention_mask"]).last_hidden_state
    torch.testing.assert_close(states, recorded["image_embeds"], **CLOSE)
    real = recorded["attention_mask"].bool()
    torch.testing.assert_close(text[real], recorded["text_output"][real], **CLOSE)


def test_recorded_gradients(model, recorded) -> None:
    model(**inputs(recorded), return_loss=True).loss.backward()
    qformer, width = model.model.qformer, META["qformer"]["hidden_size"]
    first, layer = qformer.layers[0], "Qformer.bert.encoder.layer.0"
    found = {
        "Qformer.bert.embeddings.word_embeddings.weight": qformer.embeddings.word_embedding.weight.grad,
        f"{layer}.attention.self.query.weight": first.self_attention.qkv.weight.grad[:width],
        f"{layer}.crossattention.self.key.weight": first.cross_attention.key_value.weight.grad[:width],
        f"{layer}.output.dense.weight": first.mlp.fc2.weight.grad,
        f"{layer}.output_query.dense.weight": first.query_mlp.fc2.weight.grad,
        "Qformer.cls.predictions.bias": model.lm_head.decoder.bias.grad,
        "itm_head.weight": model.itm_head.weight.grad,
        "ln_vision.weight": model.model.vision_norm.weight.grad,
        "query_tokens": qformer.embeddings.query_tokens.grad,
        "temp": model.similarity.temperature.grad[0],
        "text_proj.weight": model.similarity.text_proj.weight.grad,
        "vision_proj.weight": model.similarity.vision_proj.weight.grad,
    }
    assert {f"grad.{name}" for name in found} == {name for name in recorded if name.startswith("grad.")}
    for name, gradient in found.items():
        expected = recorded[f"grad.{name}"]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(p.grad is None for p in model.model.vision_model.parameters())
