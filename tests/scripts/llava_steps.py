"""LLaVA's loss and gradients of one rank: `torchrun --nproc_per_node N -m scripts.llava_steps FOLDER`.

The first half of the rows has images, the second has none: of two ranks, the second sees text alone. Without torchrun
it is a single process without process group. The results of rank 0 go to FOLDER/results-N.pt; a rank that waits forever
for another gives up after a minute.
"""

import itertools
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cases import tiny_blip2, tiny_llava
from cases.tiny_llava import IMAGE, SIZES, Batch, padded, pictures

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CASES = list(itertools.product(["own", "clip"], ["one view", "anyres"], ["frozen", "unfrozen"], ["copied", "sharded"]))


def share(anyres: bool) -> tuple[Batch, int]:
    """The rows of this rank, and the number of tokens that all ranks learn."""
    counts = [layout.num_tokens for layout in tiny_llava.layouts()] if anyres else [tiny_llava.PATCHES] * 5
    rows = [[3, *[IMAGE] * counts[0], 5, 6], [*[IMAGE] * counts[1], *[IMAGE] * counts[2], 9], [4, 5, 6, 7], [8, 9]]
    inputs = padded(rows[RANK * 4 // RANKS : (RANK + 1) * 4 // RANKS], side="right")
    unlearned = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, 0]))
    inputs["labels"] = inputs["input_ids"].masked_fill(unlearned, -100)
    if RANK == 0:
        inputs |= pictures(anyres, SIZES[:3])
    return inputs, sum(token != IMAGE for row in rows for token in row[1:])


def forward(model: nn.Module, inputs: Batch, count: float) -> torch.Tensor | str:
    """The loss; or, on all ranks, what went wrong on any."""
    try:
        found, error = model(**inputs, num_items_in_batch=count).loss, ""
    except RuntimeError as caught:
        found, error = torch.zeros(()), str(caught)
    errors = [error]
    if RANKS > 1:
        errors = [""] * RANKS
        dist.all_gather_object(errors, error)
    return "; ".join(filter(None, errors)) or found


def spread(model: nn.Module, way: str) -> nn.Module:
    """The model on all ranks: a copy on each (DDP), or sharded layer by layer (FSDP2), the tower's layers too."""
    if RANKS == 1:
        return model
    if way == "copied":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.get_input_embeddings(), mesh=mesh)
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient with the parts of all ranks."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def step(tower: str, tiles: str, state: str, way: str) -> Batch | str:
    """Loss and gradients of four rows; the loss of all ranks is a mean over their tokens together."""
    torch.manual_seed(0)
    anyres = tiles == "anyres"
    model = tiny_llava.on_tower(tower, anyres, image_token_id=IMAGE, text_config=tiny_blip2.llm_config(vocab_size=64))
    if state == "unfrozen":
        model.model.unfreeze_tower()
    model.train()
    inputs, count = share(anyres)
    wrapped = spread(model, way)
    loss = forward(wrapped, inputs, count / RANKS)  # gradients are averaged over ranks
    if isinstance(loss, str):
        return loss
    loss.backward()
    total = loss.detach() / RANKS
    if RANKS > 1:
        dist.all_reduce(total)
    return {"loss": total} | {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def main(folder: Path) -> dict[tuple[str, ...], Batch | str]:
    """All cases."""
    if RANKS > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {case: step(*case) for case in CASES}
    if RANK == 0:
        torch.save(results, folder / f"results-{RANKS}.pt")
    if RANKS > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
