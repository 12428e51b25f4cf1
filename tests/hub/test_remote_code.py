"""A checkpoint saved with its code loads where hf_vlm is not installed, with our tower inside and with a native one."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import hf_vlm
from cases import tiny, tiny_blip2
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmClipModel,
    families,
)
from hf_vlm.families import heads
from hf_vlm.hub.export import save_with_code

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
# Without site (-S) an editable install does not put hf_vlm on the path.
LOAD = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hf_vlm") is None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

folder = sys.argv[2]
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
again = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.open(f"{folder}/picture.png")], text=["a red cat", "tree"])
with torch.inference_mode():
    logits = model.eval()(**inputs).logits_per_image
    assert torch.equal(logits, again.eval()(**inputs).logits_per_image)
save_file({"logits": logits, "pixel_values": inputs["pixel_values"]}, f"{folder}/there.safetensors")
"""

LOAD_BLIP = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hf_vlm") is None
import torch, transformers
from PIL import Image
from safetensors.torch import save_file

for folder, head in zip(sys.argv[3::2], sys.argv[4::2]):
    folder = f"{sys.argv[2]}/{folder}"
    body, info = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(body).__name__ == "VlmBlipModel"
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert {name.split(".")[0] for name in info["unexpected_keys"]} <= {"similarity", "itm_head", "lm_head"}, info
    auto_class = getattr(transformers, head)
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[Image.open(f"{sys.argv[2]}/picture.png")] * 2, text=["a red cat", "tree"])
    found = {"states": body.eval()(**inputs).last_hidden_state.detach()}
    if model.can_generate():
        found["tokens"] = model.eval().generate(**inputs, max_new_tokens=5, num_beams=2).contiguous()
    else:
        model.train().update_momentum()
        found["loss"] = model(**inputs, return_loss=True, sample_seed=0).loss.detach()
    save_file(found, f"{folder}/there.safetensors")
"""
BLIP_HEADS: dict[type[PreTrainedModel], dict] = {
    VlmBlipForPreTraining: {},
    VlmBlipForImageTextRetrieval: {
        "vision_config": SiglipVisionConfig(image_size=tiny.IMAGE_SIZE, patch_size=8, **tiny.layer_sizes()),
        "vision_pooling": "mean",
    },
    VlmBlipForConditionalGeneration: {"tie_word_embeddings": True},
    VlmBlipForQuestionAnswering: {},
}


LOAD_ALL = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hf_vlm") is None
import torch, transformers
from safetensors.torch import load_file, save_file

for name in sys.argv[3:]:
    folder = f"{sys.argv[2]}/{name}"
    auto_map = json.load(open(f"{folder}/config.json"))["auto_map"]
    auto_class = [key for key in auto_map if key not in ("AutoConfig", "AutoModel")] or ["AutoModel"]
    loader = getattr(transformers, auto_class[0])
    model, info = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), (name, info)
    transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**load_file(f"{folder}/inputs.safetensors"))
    found = {key: value.contiguous().clone() for key, value in outputs.items() if isinstance(value, torch.Tensor)}
    save_file(found, f"{folder}/there.safetensors")
"""


def run_without_the_package(program: str, folder: Path, *arguments: str) -> None:
    """Runs a program where hf_vlm is not installed, in the folder with the checkpoints and an image."""
    tiny.image().save(folder / "picture.png")
    packages = sysconfig.get_paths()["purelib"]
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-S", "-c", program, packages, str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def native_towers() -> VlmClipModel:
    """SigLIP's vision tower and BERT, as `from_parts` takes them."""
    sizes = tiny.layer_sizes()
    vision = SiglipVisionModel(SiglipVisionConfig(image_size=tiny.IMAGE_SIZE, patch_size=8, **sizes))
    text = BertModel(BertConfig(vocab_size=len(tiny.VOCABULARY), max_position_embeddings=tiny.MAX_LENGTH, **sizes))
    return tiny.randomise(VlmClipModel.from_parts(vision, text, projection_dim=16))


@pytest.mark.parametrize("make", [tiny.clip_model, native_towers], ids=["own-towers", "native-towers"])
def test_loads_without_the_package(make, tmp_path: Path):
    model, processor = make(), tiny.clip_processor()
    save_with_code(model, processor, tmp_path)
    run_without_the_package(LOAD, tmp_path)
    found = load_file(tmp_path / "there.safetensors")
    inputs = processor(images=[tiny.image()], text=["a red cat", "tree"])
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image
    assert torch.equal(found["pixel_values"], inputs["pixel_values"])
    torch.testing.assert_close(found["logits"], expected, rtol=1e-6, atol=1e-6)


def test_blip_loads_without_the_package(tmp_path: Path):
    """AutoModel gives the body, the head's own Auto class the head: it writes, or learns with momentum and queue."""
    processor = tiny.blip_processor()
    models = {head.__name__: tiny.blip_model(head, **options) for head, options in BLIP_HEADS.items()}
    for name, model in models.items():
        save_with_code(model, processor, tmp_path / name)
    run_without_the_package(
        LOAD_BLIP, tmp_path, *(word for name in models for word in (name, heads()[name].auto_class))
    )
    inputs = processor(images=[tiny.image()] * 2, text=["a red cat", "tree"])
    for name, model in models.items():
        found = load_file(tmp_path / name / "there.safetensors")
        with torch.no_grad():
            expected = {"states": model.model(**inputs).last_hidden_state}
            if model.can_generate():
                expected["tokens"] = model.generate(**inputs, max_new_tokens=5, num_beams=2)
            else:
                expected["loss"] = model(**inputs, return_loss=True, sample_seed=0).loss
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)


def test_every_head_loads_without_the_package(tmp_path: Path):
    """With the outputs that the recorded checkpoint of each head has."""
    stage1, stage2 = tiny_blip2.stage1_processor(), tiny_blip2.stage2_processor()
    recorded = {}
    for path in sorted(CHECKPOINTS.iterdir()):
        config = json.loads((path / "config.json").read_text())
        name = config["architectures"][0]
        if config["model_type"] not in families.FAMILIES or not (path / "io.safetensors").is_file():
            continue
        model = getattr(hf_vlm, name).from_pretrained(path)
        if (path / "processor_config.json").is_file():
            processor = AutoProcessor.from_pretrained(path)
        elif config["model_type"] == "vlm_instructblip":
            processor = tiny_blip2.instruct_processor()
        else:
            processor = stage1 if config.get("text_config") is None else stage2
        save_with_code(model, processor, tmp_path / path.name)
        tensors = load_file(path / "io.safetensors")
        inputs = {key.removeprefix("input."): value for key, value in tensors.items() if key.startswith("input.")}
        save_file(inputs, tmp_path / path.name / "inputs.safetensors")
        recorded[path.name] = {k.removeprefix("output."): v for k, v in tensors.items() if k.startswith("output.")}
    assert len(recorded) >= 15
    run_without_the_package(LOAD_ALL, tmp_path, *recorded)
    for name, expected in recorded.items():
        found = load_file(tmp_path / name / "there.safetensors")
        assert expected
        for key, tensor in expected.items():
            torch.testing.assert_close(
                found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_saving_leaves_the_objects_as_they_were(tmp_path: Path):
    """A later plain save has no trace of the code."""
    model, processor = tiny.clip_model(), tiny.clip_processor()
    save_with_code(model, processor, tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    assert "auto_map" in json.loads((tmp_path / "with" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not list((tmp_path / "without").glob("*.py"))
