"""Gradients and training steps of one rank: `torchrun --nproc_per_node N -m scripts.distributed_steps FOLDER`.

Without torchrun it is a single process without process group. The results of rank 0 go to FOLDER/results-N.pt.
"""

import contextlib
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tiny
from hf_vlm import VlmClipModel
from hf_vlm.data.pairs import Pair, PairDataset
from hf_vlm.models import losses
from hf_vlm.training.grad_cache import grad_cache_backward
from scripts import tiny_training

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# Equal ids within a rank (0, 0 and 3, 3) and across two (0, 0, 0 and 1, 1).
PAIR_IDS = torch.tensor([0, 1, 2, 0, 1, 3, 0, 3])
CASES = list(itertools.product(["softmax", "sigmoid"], ["ids", "no ids"], ["plain", "cached", "blocks"]))


def share(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's rows of a batch."""
    return {name: tensor.chunk(RANKS)[RANK] for name, tensor in batch.items()}


def whole_batch() -> dict[str, torch.Tensor]:
    """Eight pairs."""
    return {"pixel_values": tiny.pixels(8), **tiny.tokens((2 * tiny.CAPTIONS)[:8]), "pair_ids": PAIR_IDS}


@contextlib.contextmanager
def small_blocks():
    """Makes the losses take three rows at a time, checkpointed."""
    before, losses.ROWS_PER_BLOCK = losses.ROWS_PER_BLOCK, 3
    yield
    losses.ROWS_PER_BLOCK = before


def gradients(loss_type: str, ids: str, way: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of every parameter, of eight pairs shared by the ranks."""
    torch.manual_seed(0)
    model = tiny.clip_model(loss_type=loss_type).train()
    batch = share(whole_batch())
    if ids == "no ids":
        del batch["pair_ids"]
    wrapped = DistributedDataParallel(model) if RANKS > 1 else model
    if way == "cached":
        loss = grad_cache_backward(wrapped, batch, 3, torch.Tensor.backward)
    else:
        with small_blocks() if way == "blocks" else contextlib.nullcontext():
            loss = wrapped(**batch, return_loss=True).loss
            loss.backward()
    if RANKS > 1:
        loss = loss.detach().clone()
        dist.all_reduce(loss)
    return {"loss": loss.detach() / RANKS, **{name: value.grad for name, value in model.named_parameters()}}


class NotingCollator:
    """A collator that notes which rows this rank was given."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.collator = tiny_training.collator()

    def __call__(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        self.batches.append([pair["index"] for pair in pairs])
        return self.collator(pairs)


def trained(folder: Path, model: VlmClipModel, resume: Path | None = None, **options) -> dict:
    """Weights after five steps that cross an epoch, the logged losses and each rank's rows."""
    collator = NotingCollator()
    trainer = tiny_training.trainer(
        folder,
        model,
        PairDataset(tiny_training.rows(24)),
        data_collator=collator,
        per_device_train_batch_size=8 // RANKS,
        max_steps=5,
        optim="sgd",
        learning_rate=0.1,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    rows = [collator.batches] * RANKS
    if RANKS > 1:
        dist.all_gather_object(rows, collator.batches)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "weights": model.state_dict(),
        "rows": rows,
        "loss": [line["loss"] for line in logs],
        "grad_norm": [line["grad_norm"] for line in logs],
    }


def seeded(**options) -> VlmClipModel:
    """The same model in every run and on every rank."""
    torch.manual_seed(0)
    return tiny_training.model(**options)


def main(folder: Path) -> dict[tuple[str, ...], dict]:
    """All cases; the trainer makes the process group, where there is one."""
    results = {
        (loss_type, way): trained(folder, seeded(loss_type=loss_type), grad_cache_chunk=3 if way == "cached" else None)
        for loss_type in ("softmax", "sigmoid")
        for way in ("plain", "cached")
    }
    # With dropout, and again from the middle of the second epoch.
    whole = folder / f"{RANKS}-ranks"
    results["whole",] = trained(whole, seeded(dropout=True), save_strategy="steps", save_steps=4)
    results["resumed",] = trained(folder, seeded(dropout=True), resume=whole / "checkpoint-4")
    assert dist.is_initialized() == (RANKS > 1)
    results |= {case: gradients(*case) for case in CASES}
    if RANK == 0:
        torch.save(results, folder / f"results-{RANKS}.pt")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
