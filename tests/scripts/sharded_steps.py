"""Gradients with parameters sharded by FSDP2: `torchrun --nproc_per_node 2 -m scripts.sharded_steps FOLDER`.

The whole gradients go to FOLDER/sharded.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cases import tiny
from hf_vlm import VlmClipModel
from hf_vlm.training.grad_cache import grad_cache_backward
from scripts import distributed_steps


def sharded(loss_type: str) -> VlmClipModel:
    """The model of [`distributed_steps.gradients`], sharded layer by layer."""
    torch.manual_seed(0)
    model = tiny.clip_model(loss_type=loss_type).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [*model.vision_model.layers, *model.text_model.layers]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(loss_type: str, way: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of every parameter, of eight pairs shared by the ranks."""
    model = sharded(loss_type)
    batch = distributed_steps.share(distributed_steps.whole_batch())
    if way == "cached":
        loss = grad_cache_backward(model, batch, 3, torch.Tensor.backward)
    else:
        loss = model(**batch, return_loss=True).loss
        loss.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    grads = {name: value.grad.full_tensor() for name, value in model.named_parameters()}
    return {"loss": loss / dist.get_world_size(), **grads}


def main(folder: Path) -> None:
    """Both losses, plain and by GradCache."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        (loss_type, way): gradients(loss_type, way)
        for loss_type in ("softmax", "sigmoid")
        for way in ("plain", "cached")
    }
    if dist.get_rank() == 0:
        torch.save(results, folder / "sharded.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
