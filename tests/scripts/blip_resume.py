"""Trains BLIP without interruption, killed, and resumed: `python -m scripts.blip_resume FOLDER`.

As `resume_runs.py` does; each run is a fork of this process.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch

from hf_vlm import VlmBlipForPreTraining, VlmBlipForQuestionAnswering
from hf_vlm.training import last_checkpoint
from hf_vlm.training import pretraining as blip
from scripts import blip_training
from scripts.resume_runs import DieWhileAccumulating, die, die_in_optimizer, die_in_state

# 26 rows in micro-batches of 4, two a step: four steps an epoch, the last of one micro-batch of two rows.
NUM_ROWS, STEPS = 26, 8
# How a run ends, and at which step. What it is resumed from is the last checkpoint before, of the steps 3 and 6.
DEATHS = {
    "between micro-batches": ("accumulating", 5),
    "half of the averages saved": ("momentum", 6),
    "half of the optimizer saved": ("optimizer", 6),
    "half of the state saved": ("state", 6),
    "answers": ("accumulating", 5),
}


def die_in_momentum(step: int) -> None:
    """Kills the process when half of that checkpoint's momentum encoders are written."""
    save = blip.save_file

    def half_save(state, path):
        save(state, path)
        if f"checkpoint-{step}/" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    blip.save_file = half_save


def train(output: Path, death: str | None = None, step: int = 0) -> None:
    """One run, resumed from its last complete checkpoint if there is one; `death` at `step` is how it ends."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = VlmBlipForQuestionAnswering if "answers" in output.name else VlmBlipForPreTraining
    trainer = blip_training.trainer(
        output,
        blip_training.model(head, dropout=True, momentum=0.9, queue_size=20),
        blip_training.dataset(head, NUM_ROWS),
        blip_training.collator(head, augment=True),
        eval_dataset=blip_training.dataset(head, 6),
        callbacks=[DieWhileAccumulating(step)] if death == "accumulating" else None,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        soft_target_ramp_epochs=1.6,
        lr_decay_per_epoch=0.5,
        warmup_steps=2,
    )
    ways = {"momentum": die_in_momentum, "optimizer": die_in_optimizer, "state": die_in_state}
    if death in ways:
        ways[death](step)
    trainer.train(resume_from_checkpoint=last_checkpoint(output))


def fork(*args) -> int:
    """Runs [`train`] in a child of this process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=train, args=args)
    process.start()
    process.join()
    return process.exitcode


def main(folder: Path) -> None:
    """Whole runs and, by the names of the deaths, the killed and resumed ones; their exit codes go to a file."""
    codes = {name: [fork(folder / name)] for name in ("whole", "whole answers")}
    for name, (death, step) in DEATHS.items():
        codes[name] = [fork(folder / name, death, step), fork(folder / name)]
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
