"""Checkpoints written before the redesign load bit-equal: all keys match, and outputs are the recorded ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

import hf_vlm

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints"
HEADS = {
    "blip": hf_vlm.VlmBlipModel,
    "blip2": hf_vlm.VlmBlip2Model,
    "blip2_generation": hf_vlm.VlmBlip2ForConditionalGeneration,
    "blip2_generation_t5": hf_vlm.VlmBlip2ForConditionalGeneration,
    "blip2_pretraining": hf_vlm.VlmBlip2ForPreTraining,
    "blip2_retrieval": hf_vlm.VlmBlip2ForImageTextRetrieval,
    "blip_generation": hf_vlm.VlmBlipForConditionalGeneration,
    "blip_pretraining": hf_vlm.VlmBlipForPreTraining,
    "blip_retrieval": hf_vlm.VlmBlipForImageTextRetrieval,
    "blip_vqa": hf_vlm.VlmBlipForQuestionAnswering,
    "clip": hf_vlm.VlmClipModel,
    "instructblip": hf_vlm.VlmInstructBlipForConditionalGeneration,
    "instructblip_body": hf_vlm.VlmInstructBlipModel,
    "llava": hf_vlm.VlmLlavaForConditionalGeneration,
    "llava_anyres": hf_vlm.VlmLlavaForConditionalGeneration,
    "llava_body": hf_vlm.VlmLlavaModel,
    "qformer": hf_vlm.VlmQFormerModel,
    "text_tower": hf_vlm.VlmTextTowerModel,
    "tower": hf_vlm.VlmTowerModel,
}


def test_every_folder_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == HEADS.keys()


@pytest.mark.parametrize("name", HEADS)
def test_loads_bit_equal(name: str) -> None:
    model, info = HEADS[name].from_pretrained(FOLDER / name, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(FOLDER / name / "model.safetensors")
    loaded = model.state_dict()
    assert stored.keys() <= loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in stored.items())
    if not (FOLDER / name / "io.safetensors").is_file():
        return
    recorded = load_file(FOLDER / name / "io.safetensors")
    inputs = {key.removeprefix("input."): value for key, value in recorded.items() if key.startswith("input.")}
    with torch.no_grad():
        outputs = model(**inputs)
    expected = {key.removeprefix("output."): value for key, value in recorded.items() if key.startswith("output.")}
    assert expected
    for key, tensor in expected.items():
        torch.testing.assert_close(outputs[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in HEADS if (FOLDER / name / "processor_config.json").is_file()])
def test_processor_loads(name: str) -> None:
    processor = AutoProcessor.from_pretrained(FOLDER / name)
    assert type(processor).__name__.startswith("Vlm")
