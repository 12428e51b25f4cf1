"""Training steps of BLIP on one rank: `torchrun --nproc_per_node N -m scripts.blip_steps FOLDER`.

Without torchrun it is a single process without process group. The results of rank 0 go to FOLDER/results-N.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
)
from hf_vlm.models.modeling_blip import VlmBlipHead
from scripts import blip_training

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# Eight rows a step. Head, micro-batches a step, options of the config; the queue overflows in the third step.
CASES: dict[str, tuple[type[VlmBlipHead], int, dict]] = {
    "pretraining": (VlmBlipForPreTraining, 1, {}),
    "pretraining, accumulated": (VlmBlipForPreTraining, 2, {}),
    "pretraining without contrast": (VlmBlipForPreTraining, 1, {"itc_weight": 0.0}),
    "pretraining without matching": (VlmBlipForPreTraining, 1, {"itm_weight": 0.0}),
    "pretraining without writing": (VlmBlipForPreTraining, 1, {"lm_weight": 0.0}),
    "retrieval": (VlmBlipForImageTextRetrieval, 1, {}),
    "captions": (VlmBlipForConditionalGeneration, 1, {}),
    "captions, accumulated": (VlmBlipForConditionalGeneration, 2, {}),
    "answers": (VlmBlipForQuestionAnswering, 1, {}),
    "answers, accumulated": (VlmBlipForQuestionAnswering, 2, {}),
}


def trained(folder: Path, head: type[VlmBlipHead], micro_batches: int, options: dict) -> dict:
    """Three steps by plain gradient descent: weights, log lines, the averages and the queue in one order."""
    torch.manual_seed(0)
    model = blip_training.model(head, momentum=0.9, queue_size=16, **options)
    trainer = blip_training.trainer(
        folder,
        model,
        blip_training.dataset(head, 24),
        eval_dataset=blip_training.dataset(head, 6),
        per_device_train_batch_size=8 // RANKS // micro_batches,
        per_device_eval_batch_size=6 // RANKS,
        gradient_accumulation_steps=micro_batches,
        optim="sgd",
        learning_rate=0.05,
        soft_target_ramp_epochs=0.5,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    averages, queue = {}, {}
    if isinstance(model, VlmBlipForPreTraining) and model.config.itc_weight:
        averages = {name: value.detach() for name, value in model.momentum.encoders.named_parameters()}
        images, texts, ids = model.momentum.queue.filled()
        order = images[:, 0].argsort()  # accumulated rows come rank by rank
        queue = {"images": images[order], "texts": texts[order], "ids": ids[order].float()}
    return {"weights": model.state_dict(), "averages": averages, "queue": queue, "log": trainer.state.log_history}


def main(folder: Path) -> dict[str, dict]:
    """All cases; the trainer makes the process group, where there is one."""
    results = {name: trained(folder, *case) for name, case in CASES.items()}
    assert dist.is_initialized() == (RANKS > 1)
    if RANK == 0:
        torch.save(results, folder / f"results-{RANKS}.pt")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
