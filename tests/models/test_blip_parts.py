"""BLIP from pretrained parts, and from one head to the next: whose weights it has, and what it leaves as it was."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, RobertaConfig, RobertaModel

from cases import tiny
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
)

SIZES = tiny.layer_sizes(width=24, heads=2)


def bert() -> BertModel:
    config = BertConfig(vocab_size=30, max_position_embeddings=16, **SIZES)
    return tiny.randomise(BertModel(config))


def from_parts(**options) -> VlmBlipForPreTraining:
    options = {"vision": tiny.clip_model(), "text": bert(), "projection_dim": 8, "queue_size": 4, **options}
    return VlmBlipForPreTraining.from_parts(**options)


def texts() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(1, 30, (3, 7))
    attention_mask = torch.tensor([7, 4, 2])[:, None] > torch.arange(7)
    return {"input_ids": input_ids, "attention_mask": attention_mask.long()}


def test_without_an_image_the_encoder_is_the_bert() -> None:
    text, batch = bert(), texts()
    model = from_parts(text=text).eval()
    with torch.no_grad():
        expected = text(**batch).last_hidden_state
        found = model.model.text_encoder(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_encoder_and_decoder_begin_with_the_same_self_attention() -> None:
    model = from_parts().model
    for one, other in zip(model.text_encoder.layers, model.text_decoder.layers, strict=True):
        assert torch.equal(one.self_attention.qkv.weight, other.self_attention.qkv.weight)
        assert one.self_attention.qkv.weight is not other.self_attention.qkv.weight
        assert other.owner is one


def test_the_tower_is_copied_and_its_owner_stays_as_it_was() -> None:
    clip, pixels = tiny.clip_model(), tiny.pixels(2)
    before = clip.get_image_features(pixels).pooler_output
    model = from_parts(vision=clip, image_size=2 * tiny.IMAGE_SIZE)
    assert model.config.vision_config.image_size == 2 * tiny.IMAGE_SIZE
    assert model.model.vision_model.config.final_norm == "sequence"
    states = model.eval().model(tiny.pixels(2, 2 * tiny.IMAGE_SIZE)).last_hidden_state
    assert states.shape == (2, 1 + (2 * tiny.IMAGE_SIZE // 8) ** 2, 32)
    assert torch.equal(clip.get_image_features(pixels).pooler_output, before)
    assert clip.config.vision_config.image_size == tiny.IMAGE_SIZE


def test_class_token_is_the_towers_own() -> None:
    """What the contrastive loss takes of an image is what CLIP pools."""
    clip, pixels = tiny.clip_model(), tiny.pixels(2)
    states = from_parts(vision=clip).eval().model(pixels).last_hidden_state
    torch.testing.assert_close(states[:, 0], clip.vision_model(pixels).pooler_output, rtol=1e-5, atol=1e-5)


def test_dropout_is_the_berts_or_as_asked_for() -> None:
    assert from_parts().config.text_config.hidden_dropout == 0.1
    text = from_parts(dropout=0.0).config.text_config
    assert (text.hidden_dropout, text.attention_dropout) == (0.0, 0.0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="start from a BERT, not a roberta"):
        from_parts(text=RobertaModel(RobertaConfig(vocab_size=30, **SIZES)))
    dino = Dinov2Model(Dinov2Config(image_size=32, patch_size=8, mlp_ratio=2, **SIZES))
    with pytest.raises(ValueError, match="takes images of 32 pixels, not of 64"):
        from_parts(vision=dino, image_size=64)


@pytest.mark.parametrize("head", [VlmBlipForImageTextRetrieval, VlmBlipForConditionalGeneration])
def test_the_attention_asked_for_is_kept(head: type, tmp_path: Path) -> None:
    tiny.blip_model().save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    pretrained = VlmBlipForPreTraining.from_pretrained(tmp_path, attn_implementation="eager")
    assert head.from_pretraining(pretrained).config._attn_implementation == "eager"


def test_new_weights_are_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are as wide as texts, images may not be: the decoder's keys and values are then new."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_vlm"), "propagate", True)
    equal = tiny.blip_model(vision={"hidden_size": 24, "num_attention_heads": 2})
    VlmBlipForQuestionAnswering.from_pretraining(equal)
    assert "newly initialised weights" not in caplog.text
    VlmBlipForQuestionAnswering.from_pretraining(tiny.blip_model(vision={"hidden_size": 40}))
    named = "model.text_decoder.layers.0.cross_attention.key_value.weight"
    assert f"newly initialised weights (not in the source checkpoint): {named}" in caplog.text
