"""A user of LLaVA on a Hub: `python -m scripts.llava_hub push FOLDER` or `read FOLDER`.

`push` pushes every checkpoint in FOLDER/checkpoints with its code and, loaded back by its id, an adapter to it. `read`
loads both by id. What they say of FOLDER/picture.png goes to FOLDER/pushed.safetensors or FOLDER/read.safetensors.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

import hf_vlm  # noqa: F401  (registers its classes)
from hf_vlm.hub.push import push_folder
from hf_vlm.training import STAGES, apply_stage

TEXTS = ["<image> a red cat <image> on the left", "two dog", "<image> tree"]


@torch.no_grad()
def said(model: PreTrainedModel, processor: ProcessorMixin, picture: Image.Image) -> dict[str, torch.Tensor]:
    """Logits of texts with two images, with none, and with one; and how they go on."""
    inputs = processor(images=[picture] * 3, text=TEXTS)
    logits = model.eval()(**inputs).logits[inputs["attention_mask"].bool()]
    tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return {"logits": logits, "tokens": tokens.contiguous()}


def push_adapter(name: str, picture: Image.Image) -> dict[str, torch.Tensor]:
    """LoRA on a model of the Hub, with random weights, and its processor."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(name)
    processor = AutoProcessor.from_pretrained(name)
    adapted = apply_stage(model, STAGES["llava-1.5-lora"])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    adapted.push_to_hub(f"{name}-lora")
    processor.push_to_hub(f"{name}-lora")
    return said(adapted, processor, picture)


def main(command: str, folder: Path) -> None:
    """Pushes or reads all."""
    picture, found = Image.open(folder / "picture.png"), {}
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        name = f"org/{checkpoint.name}"
        if command == "push":
            push_folder(checkpoint, name, with_code=True)
            found[f"{name}-lora"] = push_adapter(name, picture)
            continue
        for repo in (name, f"{name}-lora"):
            model, info = AutoModelForImageTextToText.from_pretrained(repo, output_loading_info=True)
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
            found[repo] = said(model, AutoProcessor.from_pretrained(repo), picture)
    tensors = {f"{repo} {kind}": tensor for repo, values in found.items() for kind, tensor in values.items()}
    save_file(tensors, folder / ("pushed.safetensors" if command == "push" else "read.safetensors"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
