"""Trains without interruption, killed, and resumed: `python -m scripts.resume_runs FOLDER`.

Each run is a fork of this process, which has imported everything already. A run writes its checkpoints below FOLDER;
the killed ones send SIGKILL to themselves.
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from hf_vlm.data.batches.pairs import PairDataset
from hf_vlm.training import last_checkpoint
from scripts import tiny_training

# 26 rows in micro-batches of 4, two a step: four steps an epoch, the last of one micro-batch of two rows.
NUM_ROWS, STEPS = 26, 12
# How a run ends, at which step, and how often it saves. What it is resumed from: the middle of an epoch, the end of one
# (8), and the checkpoint before the one that it was killed in.
DEATHS = {
    "between micro-batches": ("accumulating", 10, 3),
    "after an epoch's checkpoint": ("accumulating", 9, 4),
    "half of the optimizer saved": ("optimizer", 9, 3),
    "half of the state saved": ("state", 6, 3),
    "in the fourth pass of a stream": ("accumulating", 10, 3),
    "with Muon": ("accumulating", 10, 3),
}


def die() -> None:
    """Ends this process as a power cut would: no handler, no cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


class DieWhileAccumulating(TrainerCallback):
    """Kills the process between two micro-batches of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_in_optimizer(step: int) -> None:
    """Kills the process when half of that checkpoint's optimizer.pt is written."""
    save = torch.save

    def half_save(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if f"checkpoint-{step}/optimizer.pt" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half_save


def die_in_state(step: int) -> None:
    """Kills the process when half of that checkpoint's trainer_state.json is written."""
    save = TrainerState.save_to_json

    def half_save(state, path):
        save(state, path)
        if f"checkpoint-{step}/" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    TrainerState.save_to_json = half_save


def train(output: Path, save_steps: int, death: str | None = None, step: int = 0) -> None:
    """One run, resumed from its last complete checkpoint if there is one; `death` at `step` is how it ends."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    is_stream = "stream" in output.name
    trainer = tiny_training.trainer(
        output,
        tiny_training.model(dropout=True),
        tiny_training.stream(NUM_ROWS, 3) if is_stream else PairDataset(tiny_training.rows(NUM_ROWS)),
        data_collator=tiny_training.collator(augment=True),
        callbacks=[DieWhileAccumulating(step)] if death == "accumulating" else None,
        eval_dataset=PairDataset(tiny_training.rows(6), shuffle_captions=False),
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
        save_strategy="steps",
        save_steps=save_steps,
        eval_strategy="steps",
        eval_steps=3,
        lr_scheduler_type="cosine",
        muon_learning_rate=1e-3 if "Muon" in output.name else None,
    )
    if death == "optimizer":
        die_in_optimizer(step)
    elif death == "state":
        die_in_state(step)
    trainer.train(resume_from_checkpoint=last_checkpoint(output))


def fork(*args) -> int:
    """Runs [`train`] in a child of this process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=train, args=args)
    process.start()
    process.join()
    return process.exitcode


def main(folder: Path) -> None:
    """One whole run and, by the names of the deaths, the killed and resumed ones; their exit codes go to a file."""
    codes = {name: [fork(folder / name, 3)] for name in ("whole", "whole stream", "whole with Muon")}
    for name, (death, step, save_steps) in DEATHS.items():
        codes[name] = [fork(folder / name, save_steps, death, step), fork(folder / name, save_steps)]
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
