"""Peak memory of one GradCache step above the resident batch: `python -m scripts.peak_memory BATCH_SIZE`.

A transformer of ViT-S's width and three layers for images of 64 x 64 pixels, one alike for texts of 8 tokens, chunks of
256 pairs.
"""

import json
import sys

import torch
from torch.utils.checkpoint import checkpoint

from hf_vlm import VlmClipConfig, VlmClipModel, VlmTextTowerConfig, VlmTowerConfig
from hf_vlm.training.grad_cache import grad_cache_backward

IMAGE_SIZE, LENGTH, CHUNK = 64, 8, 256
SIZES = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 6}


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at its highest."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def main(batch_size: int) -> None:
    """One step, whose gradients count too."""
    torch.manual_seed(0)
    vision = VlmTowerConfig(**SIZES, image_size=IMAGE_SIZE, patch_size=16, patch_dropout=0.1)
    text = VlmTextTowerConfig(**SIZES, vocab_size=1000, eos_token_id=999, bos_token_id=998, pad_token_id=0)
    model = VlmClipModel(VlmClipConfig(vision_config=vision, text_config=text, projection_dim=256)).train()
    input_ids = torch.randint(1, 998, (batch_size, LENGTH))
    input_ids[:, -1] = 999
    batch = {
        "pixel_values": torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pair_ids": torch.arange(batch_size),
    }
    # The loss of more than a block is checkpointed, and the first use of that imports 70 MB of modules.
    checkpoint(torch.neg, torch.zeros(1, requires_grad=True), use_reentrant=False)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # resets VmHWM
    resident = memory("VmRSS")
    grad_cache_backward(model, batch, CHUNK, torch.Tensor.backward)
    print(json.dumps({"peak_bytes": memory("VmHWM") - resident, "resident_bytes": resident}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
