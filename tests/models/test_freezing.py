"""Freezing: gradients off and eval mode, also after loading; `train()` never changes `requires_grad`."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cases import tiny, tiny_blip2
from hf_vlm import VlmBlipForPreTraining
from hf_vlm.models.freezing import freeze, is_frozen, keep_frozen_in_eval


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_frozen_part_stays_in_eval_mode_and_a_parameter_can_be_frozen_alone() -> None:
    frozen, trained = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2)
    freeze(frozen, trained.bias)
    assert is_frozen(frozen)
    assert not frozen.training
    assert trainable(trained) == {"weight"}
    both = nn.ModuleList([frozen, trained]).train()
    keep_frozen_in_eval(frozen, trained, None)
    assert not any(module.training for module in frozen.modules())
    assert both[1].training


@pytest.mark.parametrize("build", [tiny.clip_model, tiny.blip_model, tiny_blip2.blip2_model])
def test_train_and_eval_change_no_requires_grad(build) -> None:
    model = build()
    assert 0 < len(trainable(model)) <= len(dict(model.named_parameters()))
    before = trainable(model)
    assert trainable(model.eval()) == trainable(model.train()) == before
    model.requires_grad_(True).train()
    assert trainable(model) == dict(model.named_parameters()).keys()


def test_without_language_modelling_a_tied_word_embedding_is_trained(tmp_path: Path) -> None:
    model = tiny.blip_model(lm_weight=0.0, tie_word_embeddings=True)
    assert "model.text_encoder.embeddings.word_embedding.weight" in trainable(model)
    assert not any(name.startswith(("lm_head.", "model.text_decoder.")) for name in trainable(model))
    model.save_pretrained(tmp_path)
    assert trainable(VlmBlipForPreTraining.from_pretrained(tmp_path)) == trainable(model)


@pytest.mark.parametrize("frozen", [False, True])
def test_resizing_keeps_positions_frozen_or_trainable(frozen: bool) -> None:
    tower = tiny.clip_model().vision_model
    tower.requires_grad_(not frozen)
    tower.resize_images(2 * tower.config.image_size)
    assert is_frozen(tower) == frozen
    assert tower.embeddings.position_embedding.weight.requires_grad != frozen
    assert torch.isfinite(tower.embeddings.position_embedding.weight).all()
