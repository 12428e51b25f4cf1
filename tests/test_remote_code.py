"""A checkpoint saved with its code loads where hf_vlm is not installed, with our tower inside and with a native one."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, SiglipVisionConfig, SiglipVisionModel

import tiny
from hf_vlm import VlmClipModel
from hf_vlm.hub.export import save_with_code

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
    tiny.image().save(tmp_path / "picture.png")
    packages = sysconfig.get_paths()["purelib"]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-S", "-c", LOAD, packages, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = load_file(tmp_path / "there.safetensors")
    inputs = processor(images=[tiny.image()], text=["a red cat", "tree"])
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image
    assert torch.equal(found["pixel_values"], inputs["pixel_values"])
    torch.testing.assert_close(found["logits"], expected, rtol=1e-6, atol=1e-6)


def test_saving_leaves_the_objects_as_they_were(tmp_path: Path):
    """A later plain save has no trace of the code."""
    model, processor = tiny.clip_model(), tiny.clip_processor()
    save_with_code(model, processor, tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    assert "auto_map" in json.loads((tmp_path / "with" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not list((tmp_path / "without").glob("*.py"))
