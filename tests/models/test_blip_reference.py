"""BLIP's numbers against a recorded pretraining step of LAVIS, and against transformers' three BLIP classes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedModel,
)

from cases import tiny
from hf_vlm import (
    VlmBlipConfig,
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipTextConfig,
    VlmTowerConfig,
)
from hf_vlm.hub.convert import from_original, from_transformers
from hf_vlm.hub.convert.blip import NAMES, REDUNDANT, fuse_text
from hf_vlm.hub.convert.state_dict import flipped, rename
from hf_vlm.models import BLIP_VISION
from hf_vlm.models.losses import language_modeling_loss

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RECORDED = Path(__file__).parents[1] / "data" / "blip_pretrain"
META = json.loads((RECORDED / "meta.json").read_text())
VOCABULARY = (RECORDED / "vocab.txt").read_text().split()

# --- the recorded step


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "io.safetensors")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "lavis_state.safetensors")


@pytest.fixture
def model(state: dict[str, torch.Tensor]) -> VlmBlipForPreTraining:
    """The recorded model before the step, in training mode; dropout is off, as it was there."""
    vision = VlmTowerConfig(**{**BLIP_VISION, **META["vision"]})
    text = VlmBlipTextConfig(
        **META["text"],
        bos_token_id=META["bos_token_id"],
        enc_token_id=META["enc_token_id"],
        sep_token_id=VOCABULARY.index("[SEP]"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    sizes = {"projection_dim": META["embed_dim"], "queue_size": META["queue_size"], "tie_word_embeddings": True}
    config = VlmBlipConfig(vision_config=vision, text_config=text, momentum=META["momentum"], **sizes)
    return from_original(state, config=config).train()


def forward(model: VlmBlipForPreTraining, recorded: dict[str, torch.Tensor], length: int = 16):
    """The pretraining losses; the weight of the soft targets is ramped over the first two epochs."""
    ramp = (META["epoch"] * META["num_iters_per_epoch"] + META["iters"]) / (2 * META["num_iters_per_epoch"])
    return model(
        recorded["pixel_values"],
        recorded["input_ids"][:, :length],
        recorded["attention_mask"][:, :length],
        soft_target_weight=META["alpha"] * ramp,
        return_loss=True,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [16, 13], ids=["padded as there", "padded to the longest"])
def test_recorded_losses_and_logits(model, recorded, length: int, attention: str) -> None:
    assert recorded["attention_mask"].sum(dim=1).max() <= 13
    model.set_attn_implementation(attention)
    model.update_momentum()
    output = forward(model, recorded, length)
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        torch.testing.assert_close(getattr(output, name).detach(), recorded[name], rtol=0, atol=1e-5)
        assert abs(recorded[name].item() - META["loss"][name]) < 1e-6
    found = {
        "sim_i2t": output.logits_per_image,
        "sim_t2i": output.logits_per_text,
        "sim_i2t_targets": output.targets_per_image,
        "itm_logits": output.itm_logits,
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.detach(), recorded[name], **CLOSE)


def test_recorded_states_and_decoder_logits(model, recorded) -> None:
    captioner_inputs = recorded["input_ids"].clone()
    captioner_inputs[:, 0] = META["bos_token_id"]
    with torch.no_grad():
        states = model.model.encode_images(recorded["pixel_values"])
        memory = model.model.text_decoder.project_memory(states)
        decoded = model.model.text_decoder(captioner_inputs, recorded["attention_mask"], memory).last_hidden_state
        logits = model.lm_head(decoded)
    torch.testing.assert_close(states, recorded["image_embeds"], **CLOSE)
    real = recorded["attention_mask"].bool()
    torch.testing.assert_close(logits[real], recorded["decoder_logits"][real], **CLOSE)


def test_recorded_gradients(model, recorded) -> None:
    model.update_momentum()
    forward(model, recorded).loss.backward()
    encoder, decoder = model.model.text_encoder, model.model.text_decoder
    width = META["text"]["hidden_size"]
    found = {
        "itm_head.weight": model.itm_head.weight.grad,
        "temp": model.similarity.temperature.grad[0],
        "text_proj.weight": model.similarity.text_proj.weight.grad,
        "vision_proj.weight": model.similarity.vision_proj.weight.grad,
        "visual_encoder.blocks.0.attn.qkv.weight": model.model.vision_model.layers[0].attn.qkv.weight.grad,
        "text_encoder.embeddings.word_embeddings.weight": encoder.embeddings.word_embedding.weight.grad,
        "text_encoder.encoder.layer.0.crossattention.self.key.weight": encoder.layers[
            0
        ].cross_attention.key_value.weight.grad[:width],
        "text_decoder.bert.encoder.layer.0.attention.self.query.weight": decoder.layers[
            0
        ].self_attention.qkv.weight.grad[:width],
        "text_decoder.cls.predictions.decoder.weight": model.lm_head.decoder.weight.grad,
    }
    assert {f"grad.{name}" for name in found} == {name for name in recorded if name.startswith("grad.")}
    for name, gradient in found.items():
        expected = recorded[f"grad.{name}"]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name


def test_recorded_momentum_and_queue(model, recorded, state) -> None:
    queue, encoders = model.momentum.queue, model.momentum.encoders
    assert int(queue.count) == META["queue_size"]
    torch.testing.assert_close(queue.images.T, state["image_queue"])
    model.update_momentum()
    forward(model, recorded)
    torch.testing.assert_close(queue.images.T, state["image_queue"])  # not before enqueue
    model.enqueue()
    torch.testing.assert_close(queue.images.T, recorded["image_queue_after"], **CLOSE)
    torch.testing.assert_close(queue.texts.T, recorded["text_queue_after"], **CLOSE)
    averaged = encoders["vision_model"].layers[0].attn.qkv.weight
    torch.testing.assert_close(averaged, recorded["visual_encoder_m_after"], rtol=1e-6, atol=1e-6)
    assert not torch.equal(averaged, state["visual_encoder_m.blocks.0.attn.qkv.weight"])


# --- transformers' classes

CONFIGS = {
    "tied": {"tie": True},
    "untied, images wider": {"vision": tiny.layer_sizes(width=48, heads=3, layers=3, patch_size=16)},
    "texts wider": {
        "vision": tiny.layer_sizes(width=16, heads=1, layers=1, hidden_act="gelu_new", layer_norm_eps=1e-5),
        "text": tiny.layer_sizes(width=40, heads=5, layers=3, hidden_act="relu"),
        "tie": True,
    },
    "another image size": {"vision": {"image_size": 48}},
}
SAME_WIDTH = {
    **CONFIGS,
    "untied, images wider": {"vision": tiny.layer_sizes(layers=3, patch_size=16), "text": tiny.layer_sizes()},
    "texts wider": {"vision": tiny.layer_sizes(width=24, heads=3, layers=1), "text": {"layer_norm_eps": 1e-5}},
}


def native_config(vision: dict | None = None, text: dict | None = None, tie: bool = False) -> BlipConfig:
    vision = {**tiny.layer_sizes(width=24, heads=2), "image_size": 32, "patch_size": 8, **(vision or {})}
    text = {
        **tiny.layer_sizes(width=24, heads=2),
        "vocab_size": len(tiny.BLIP_VOCABULARY),
        "encoder_hidden_size": vision["hidden_size"],
        "max_position_embeddings": 24,
        "bos_token_id": tiny.DEC,
        "sep_token_id": tiny.SEP,
        "eos_token_id": tiny.SEP,
        "pad_token_id": 0,
        "tie_word_embeddings": tie,
        **(text or {}),
    }
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16, tie_word_embeddings=tie)


def pair(native_class: type[PreTrainedModel], **options) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' model with every parameter redrawn, and ours, converted from it."""
    native = tiny.randomise(native_class(native_config(**options)))
    return from_transformers(native), native


def batch(native: PreTrainedModel, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, texts as the tokenizer gives them, the same with another first token, and the mask."""
    tokens = tiny.blip_tokens()
    marked = tokens["input_ids"].clone()
    marked[:, 0] = first
    return tiny.pixels(5, native.config.vision_config.image_size), tokens["input_ids"], marked, tokens["attention_mask"]


def native_gradients(ours: nn.Module, native: nn.Module) -> None:
    """Compares every gradient, in our names."""
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in native.named_parameters(remove_duplicate=False)
        if not name.endswith(REDUNDANT)
    }
    renamed = fuse_text(rename(expected, flipped(NAMES)))
    for name, parameter in ours.named_parameters():
        if name == "similarity.temperature":
            continue
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = (found - renamed[name].view_as(found)).norm()
        assert error <= 1e-5 + 1e-4 * renamed[name].norm(), (name, error)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_captions(options: dict) -> None:
    ours, native = pair(BlipForConditionalGeneration, **options)
    pixel_values, ids, marked, mask = batch(native, tiny.DEC)
    with torch.no_grad():
        found, expected = ours(pixel_values, ids, mask).logits, native(pixel_values, marked, mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    labels = ids.masked_fill(mask == 0, -100)
    loss = ours(pixel_values, ids, mask, labels).loss
    native_loss = native(pixel_values, marked, mask, labels=labels).loss
    torch.testing.assert_close(loss, native_loss, **CLOSE)
    loss.backward()
    native_loss.backward()
    native_gradients(ours, native)


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 0.5}], ids=str)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_captions_are_written_alike(options: dict, generation: dict) -> None:
    ours, native = pair(BlipForConditionalGeneration, **options)
    pixel_values = batch(native, tiny.DEC)[0]
    found = ours.generate(pixel_values, max_new_tokens=8, **generation)
    assert torch.equal(found, native.generate(pixel_values, max_new_tokens=8, **generation))
    prompt = torch.tensor([[tiny.CLS, 7, 10, tiny.SEP]]).expand(5, -1)
    found = ours.generate(pixel_values, prompt, torch.ones_like(prompt), max_new_tokens=6, **generation)
    expected = native.generate(pixel_values, prompt.clone(), torch.ones_like(prompt), max_new_tokens=6, **generation)
    assert torch.equal(found, expected)


def test_images_of_another_size() -> None:
    """Interpolated in passing, and for good."""
    ours, native = pair(BlipForConditionalGeneration)
    ids = batch(native, tiny.DEC)[2]
    larger = VlmBlipForConditionalGeneration.from_pretraining(ours, image_size=48).eval()
    pixel_values = tiny.pixels(5, 48)
    with torch.no_grad():
        expected = native(pixel_values, ids, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(ours(pixel_values, ids, interpolate_pos_encoding=True).logits, expected, **CLOSE)
        torch.testing.assert_close(larger(pixel_values, ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_retrieval(options: dict) -> None:
    ours, native = pair(BlipForImageTextRetrieval, **options)
    pixel_values, ids, marked, mask = batch(native, tiny.ENC)
    found = ours(pixel_values, ids, mask)
    expected = native(marked, pixel_values, attention_mask=mask).itm_score
    torch.testing.assert_close(found.itm_logits, expected, **CLOSE)
    similarity = native(ids, pixel_values, use_itm_head=False, attention_mask=mask).itm_score
    torch.testing.assert_close(found.image_embeds @ found.text_embeds.T, similarity, **CLOSE)
    (found.itm_logits.sin().sum() + (found.image_embeds @ found.text_embeds.T).sin().sum()).backward()
    (expected.sin().sum() + similarity.sin().sum()).backward()
    native_gradients(ours, native)


def native_answer_logits(native, pixel_values, questions, mask, answers) -> torch.Tensor:
    """transformers' class gives no logits: its parts do."""
    states = native.vision_model(pixel_values).last_hidden_state
    read = native.text_encoder(input_ids=questions, attention_mask=mask, encoder_hidden_states=states).last_hidden_state
    return native.text_decoder(input_ids=answers, encoder_hidden_states=read).logits


@pytest.mark.parametrize("options", SAME_WIDTH.values(), ids=SAME_WIDTH.keys())
def test_answers(options: dict) -> None:
    """Questions without padding: transformers' decoder looks at the padding of a question as well."""
    ours, native = pair(BlipForQuestionAnswering, **options)
    ids, pixel_values = torch.randint(5, tiny.DEC, (5, 7)), batch(native, tiny.ENC)[0]
    questions, answers = ids.clone(), torch.randint(5, tiny.DEC, (5, 4))
    questions[:, 0], starts = tiny.ENC, answers.clone()
    starts[:, 0] = tiny.DEC
    mask = torch.ones_like(ids)
    found = ours(pixel_values, ids, mask, decoder_input_ids=answers).logits
    expected = native_answer_logits(native, pixel_values, questions, mask, starts)
    torch.testing.assert_close(found, expected, **CLOSE)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    native_gradients(ours, native)
    for generation in ({}, {"num_beams": 3}):
        found = ours.generate(pixel_values, ids, mask, max_new_tokens=6, **generation)
        expected = native.generate(questions, pixel_values, attention_mask=mask, max_new_tokens=6, **generation)
        assert torch.equal(found, expected)


def test_padded_questions_are_answered_as_if_alone() -> None:
    """Ours together, of different lengths, and transformers' one by one, without padding."""
    ours, native = pair(BlipForQuestionAnswering)
    pixel_values, ids, marked, mask = batch(native, tiny.ENC)
    answers = torch.randint(5, tiny.DEC, (5, 4))
    answers[:, 0] = tiny.DEC
    with torch.no_grad():
        together = ours(pixel_values, ids, mask, decoder_input_ids=answers).logits
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            one = slice(row, row + 1)
            expected = native_answer_logits(
                native, pixel_values[one], marked[one, :length], mask[one, :length], answers[one]
            )
            torch.testing.assert_close(together[one], expected, **CLOSE)


# --- one thing in two ways


def test_tokens_are_learned_in_blocks_alike() -> None:
    states, labels, head = torch.randn(5, 7, 8, requires_grad=True), torch.randint(0, 9, (5, 7)), nn.Linear(8, 9)
    weights, results = torch.rand(5), []
    for size in (1024, 4):
        total, count = language_modeling_loss(states, labels, head, 0.1, weights, size)
        results.append((total, count, *torch.autograd.grad(total, [states, head.weight])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_several_texts_an_image() -> None:
    """Consecutive texts belong to one image, as if it had been given again for each."""
    for head in (VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering, VlmBlipForImageTextRetrieval):
        model, inputs = tiny.blip_model(head), tiny.blip_inputs((tiny.CAPTIONS * 2)[:6])
        inputs["pixel_values"] = inputs["pixel_values"][:3]
        extra = {"decoder_input_ids": torch.full((6, 3), 7)} if head is VlmBlipForQuestionAnswering else {}
        repeated = {**inputs, "pixel_values": inputs["pixel_values"].repeat_interleave(2, dim=0)}
        name = "itm_logits" if head is VlmBlipForImageTextRetrieval else "logits"
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, **extra)[name], model(**repeated, **extra)[name], **CLOSE)
