"""Stage-1 losses and gradients of one rank: `torchrun --nproc_per_node N -m scripts.blip2_steps FOLDER`.

Without torchrun it is a single process without process group. The results of rank 0 go to FOLDER/results-N.pt.
"""

import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cases import tiny, tiny_blip2
from hf_vlm import VlmBlip2ForImageTextRetrieval, VlmBlip2ForPreTraining
from hf_vlm.models import distributed, modeling_blip2_pretraining
from hf_vlm.models.distributed import gather_with_grad

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PAIR_IDS = torch.tensor([0, 1, 2, 0, 1, 3, 0, 3])
HEADS = {"pretraining": VlmBlip2ForPreTraining, "retrieval": VlmBlip2ForImageTextRetrieval}
CASES = list(itertools.product(HEADS, ["ids", "no ids"], ["8 pairs", "2 pairs"], ["plain", "checkpointed"]))


def step(head: str, ids: str, num_pairs: str, way: str) -> dict[str, torch.Tensor]:
    """Losses and gradients of a batch that the ranks share; the first half has short captions, the second long ones."""
    torch.manual_seed(0)
    model = tiny_blip2.blip2_model(HEADS[head]).train()
    count = int(num_pairs.split()[0])
    batch = tiny_blip2.stage1_inputs(sorted((2 * tiny.CAPTIONS)[:count], key=len))
    if ids == "ids":
        batch["pair_ids"] = PAIR_IDS[:count]
    batch = {name: tensor.chunk(RANKS)[RANK] for name, tensor in batch.items()}
    longest = int(batch["attention_mask"].sum(dim=1).max())
    batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
    if way == "checkpointed":
        model.activation_checkpointing_enable()
    # The rows that travel, and those that the first cross-attention projects.
    travelled, projected = [], []
    fetch_rows = distributed.fetch_rows

    def counted(tensor: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pool, places = fetch_rows(tensor, index)
        travelled.append(len(pool) - len(tensor))
        return pool, places

    modeling_blip2_pretraining.fetch_rows = counted
    key_value = model.model.qformer.layers[0].cross_attention.key_value
    key_value.register_forward_pre_hook(lambda _, inputs: projected.append(len(inputs[0])))
    wrapped = DistributedDataParallel(model) if RANKS > 1 else model
    output = wrapped(**batch, return_loss=True, sample_seed=5)
    modeling_blip2_pretraining.fetch_rows = fetch_rows
    parts = {name: (total, gather_with_grad(n.detach()[None]).sum()) for name, (total, n) in output.parts.items()}
    sum(total * RANKS / n for total, n in parts.values()).backward()
    found = {f"loss_{name}": gather_with_grad(total.detach()[None]).sum() / n for name, (total, n) in parts.items()}
    found["counts"] = torch.tensor([sum(travelled), sum(projected), count // RANKS, longest])
    return found | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main(folder: Path) -> dict[tuple[str, ...], dict]:
    """All cases."""
    if RANKS > 1:
        dist.init_process_group("gloo")
    results = {case: step(*case) for case in CASES}
    if RANK == 0:
        torch.save(results, folder / f"results-{RANKS}.pt")
    if RANKS > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
