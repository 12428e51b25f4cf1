"""LLaVA's trainer on one rank: `torchrun --nproc_per_node N -m scripts.llava_trainer_steps FOLDER`.

Every micro-batch of one rank has images, and that of the other none; in the second step they change places. Without
torchrun it is a single process without process group. The results of rank 0 go to FOLDER/results-N.pt.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scripts import llava_training

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# Eight rows a step. Stage, micro-batches a step, options of the collator. The checkpointed ones recompute activations.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "projector alone": ("llava-1.5-align", 1, {}),
    "projector alone, checkpointed": ("llava-1.5-align", 1, {}),
    "projector and LLM": ("llava-1.5-instruct", 1, {}),
    "packed, checkpointed": ("llava-1.5-instruct", 1, {"packed": True}),
    "all, accumulated, checkpointed": ("llava-1.6-instruct", 2, {"anyres": True}),
    "all, packed and accumulated": ("llava-1.6-instruct", 2, {"anyres": True, "packed": True}),
    "by LoRA, accumulated": ("llava-1.5-lora", 2, {}),
    "by LoRA with tiles, checkpointed": ("llava-1.5-lora", 1, {"anyres": True, "packed": True}),
}


def rows(micro_batches: int) -> list[dict[str, Any]]:
    """Two steps of eight rows, in the order in which two ranks take turns with their micro-batches."""
    size = 4 // micro_batches
    with_images = [row for row in llava_training.rows(16) if row["images"]]
    without = llava_training.texts(8)
    found = []
    for step in range(2):
        for start in range(4 * step, 4 * step + 4, size):
            shown, told = with_images[start : start + size], without[start : start + size]
            found += shown + told if step == 0 else told + shown
    return found


def trained(folder: Path, name: str) -> dict[str, Any]:
    """Two steps by plain gradient descent: how far each trained parameter moved, losses, and who saw images."""
    stage, micro_batches, options = CASES[name]
    torch.manual_seed(0)
    model = llava_training.staged(stage, anyres=options.get("anyres", False), lora_dropout=0.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    collator = llava_training.collator(**options)
    trainer = llava_training.trainer(
        folder,
        model,
        train_rows=rows(micro_batches),
        data_collator=collator,
        per_device_train_batch_size=8 // RANKS // micro_batches,
        gradient_accumulation_steps=micro_batches,
        train_sampling_strategy="sequential",
        activation_checkpointing="checkpointed" in name,
        max_steps=2,
        weight_decay=0.1,
        ddp_timeout=60,  # a rank that waits for the other too long gives up
        **{**llava_training.ONE_GRADIENT, "learning_rate": 0.5},
    )
    trainer.train()
    after = dict(model.named_parameters())
    moved = {name: after[name].detach() - value for name, value in before.items()}
    return {"moved": moved, "loss": llava_training.losses(trainer), "images": of_all_ranks(collator.images)}


def grouped(folder: Path) -> list[list[list[int]]]:
    """The rows of each batch of each rank in two epochs with dropout, when rows are grouped by their lengths."""
    torch.manual_seed(0)
    collator = llava_training.collator()
    llava_training.trainer(
        folder,
        llava_training.staged("llava-1.5-instruct", dropout=0.5),
        train_rows=llava_training.rows(16),
        data_collator=collator,
        per_device_train_batch_size=2,
        train_sampling_strategy="group_by_length",
        max_steps=16 // RANKS,
        ddp_timeout=60,
    ).train()
    return of_all_ranks(collator.ids)


def of_all_ranks(value: list) -> list[list]:
    """What each rank has in this place."""
    found = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(found, value)
    return found


def main(folder: Path) -> dict[str, Any]:
    """All cases; the trainer makes the process group, where there is one."""
    results = {name: trained(folder, name) for name in CASES} | {"grouped by length": grouped(folder)}
    assert dist.is_initialized() == (RANKS > 1)
    if RANK == 0:
        torch.save(results, folder / f"results-{RANKS}.pt")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
