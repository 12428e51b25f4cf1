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

from cases import tiny
from hf_vlm import VlmBlipForImageTextRetrieval, VlmBlipForPreTraining, VlmClipModel
from hf_vlm.data.batches.pairs import Pair, PairDataset
from hf_vlm.models import losses
from hf_vlm.models.distributed import gather_with_grad
from hf_vlm.models.losses import positive_pairs, sample_negatives
from hf_vlm.training.grad_cache import grad_cache_backward
from scripts import tiny_training

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# Equal ids within a rank (0, 0 and 3, 3) and across two (0, 0, 0 and 1, 1).
PAIR_IDS = torch.tensor([0, 1, 2, 0, 1, 3, 0, 3])
CASES = list(itertools.product(["softmax", "sigmoid"], ["ids", "no ids"], ["plain", "cached", "blocks"]))

BLIP_HEADS = {"pretraining": VlmBlipForPreTraining, "retrieval": VlmBlipForImageTextRetrieval}
BLIP_CASES = [
    ("blip", *case)
    for case in itertools.product(
        BLIP_HEADS, ["ids", "no ids"], ["8 pairs", "2 pairs"], ["plain", "checkpointed", "not shared"]
    )
    if case[0] == "pretraining" or case[3] == "plain"
]


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


def blip_batch(num_pairs: int) -> dict[str, torch.Tensor]:
    """Pairs with short captions in the first half and long captions in the second."""
    captions = sorted((2 * tiny.CAPTIONS)[:num_pairs], key=len)
    ids = PAIR_IDS[:num_pairs] if num_pairs > 2 else torch.tensor([4, 5])
    return {**tiny.blip_inputs(captions), "pair_ids": ids}


def blip_step(head: str, ids: str, num_pairs: str, way: str) -> dict[str, torch.Tensor]:
    """Two micro-steps with an enqueue between them: the second one's losses and gradients, and the queue after it."""
    torch.manual_seed(0)
    options = {"share_encoder_decoder": way != "not shared", "queue_size": 12, "momentum": 0.9}
    model = tiny.blip_model(BLIP_HEADS[head], **options).train()
    count = int(num_pairs.split()[0])
    batches = [blip_batch(count), blip_batch(count)]
    model.update_momentum()
    with torch.no_grad():
        for parameter in model.parameters():  # so that the averages lag behind
            parameter.add_(0.05 * torch.randn_like(parameter))
    if way == "checkpointed":
        model.activation_checkpointing_enable()
    wrapped = DistributedDataParallel(model) if RANKS > 1 else model
    for batch in batches:
        model.zero_grad()
        batch = share(batch)
        longest = int(batch["attention_mask"].sum(dim=1).max())
        batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
        if ids == "no ids":
            del batch["pair_ids"]
        output = wrapped(**batch, return_loss=True, sample_seed=5)
        # Each part over its own count of all ranks; data parallelism takes the mean of the gradients.
        parts = {name: (total, gather_with_grad(n.detach()[None]).sum()) for name, (total, n) in output.parts.items()}
        loss = sum(total * RANKS / n for total, n in parts.values())
        loss.backward()
        model.enqueue()
    found = {f"loss_{name}": gather_with_grad(total.detach()[None]).sum() / n for name, (total, n) in parts.items()}
    queue = torch.cat(model.momentum.queue.filled()[:2], dim=1)
    found["queue"] = queue[queue[:, 0].argsort()]
    found["queue ids"] = model.momentum.queue.filled()[2].sort().values.float() + 2
    found["longest text"] = torch.tensor(float(longest))
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


def drawn_negatives(ids: str) -> dict[str, torch.Tensor]:
    """Hard negatives of eight rows, by fifty seeds."""
    torch.manual_seed(0)
    logits, pair_ids = torch.randn(8, 8).chunk(RANKS)[RANK], PAIR_IDS.chunk(RANKS)[RANK]
    positives = positive_pairs(pair_ids if ids == "ids" else None, len(logits), logits.device)
    draws = [sample_negatives(logits, positives, seed) for seed in range(50)]
    return {"rows": gather_with_grad(torch.stack([rows for rows, _ in draws], dim=1))}


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
    results |= {case: blip_step(*case[1:]) for case in BLIP_CASES}
    results |= {("negatives", ids): drawn_negatives(ids) for ids in ("ids", "no ids")}
    if RANK == 0:
        torch.save(results, folder / f"results-{RANKS}.pt")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()  # a process that ends with its threads running may abort
