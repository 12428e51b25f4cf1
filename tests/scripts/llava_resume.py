"""Trains LLaVA without interruption, killed, and resumed: `python -m scripts.llava_resume FOLDER`.

As `resume_runs.py` does; each run is a fork of this process.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import torch
from torch import nn

from hf_vlm.training import VlmSFTTrainer, last_checkpoint
from scripts import llava_training
from scripts.resume_runs import DieWhileAccumulating, die_in_optimizer, die_in_state

# Ten rows in micro-batches of two, two a step: three steps an epoch, the last of one micro-batch.
NUM_ROWS, STEPS = 10, 6
# What is trained, whether rows are packed, and how they are chosen.
RUNS = {
    "by LoRA": ("llava-1.5-lora", False, "random"),
    "projector and LLM": ("llava-1.5-instruct", True, "random"),
    "grouped by length": ("llava-1.5-instruct", False, "group_by_length"),
    "all": ("llava-1.6-instruct", True, "random"),
}
# How a run ends, and at which step. What it is resumed from is the last checkpoint before, of the steps 2 and 4.
DEATHS = {
    "by LoRA, between micro-batches": ("accumulating", 4),
    "by LoRA, half of the optimizer saved": ("optimizer", 4),
    "by LoRA, half of the state saved": ("state", 4),
    "projector and LLM, between micro-batches": ("accumulating", 4),
    "grouped by length, between micro-batches": ("accumulating", 4),
    "all, between micro-batches": ("accumulating", 4),
}


def trainer(output: Path, name: str, callbacks: list | None = None, **options) -> VlmSFTTrainer:
    """A run with dropout and tiles; what it is to train is noise where there is a checkpoint to read it from."""
    stage, packed, strategy = RUNS[name]
    torch.manual_seed(0)
    model = llava_training.staged(stage, anyres=True, dropout=0.1)
    if last_checkpoint(output) is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    defaults = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": STEPS}
    defaults |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1}
    defaults["train_sampling_strategy"] = strategy
    return llava_training.trainer(
        output,
        model,
        train_rows=llava_training.rows(NUM_ROWS),
        data_collator=llava_training.collator(True, packed),
        callbacks=callbacks,
        **{**defaults, **options},
    )


def train(output: Path, death: str | None = None, step: int = 0) -> None:
    """One run, resumed from its last complete checkpoint if there is one; `death` at `step` is how it ends."""
    torch.set_num_threads(1)
    callbacks = [DieWhileAccumulating(step)] if death == "accumulating" else None
    run = trainer(output, output.name.split(",")[0], callbacks, dataloader_num_workers=2)
    if death == "optimizer":
        die_in_optimizer(step)
    elif death == "state":
        die_in_state(step)
    run.train(resume_from_checkpoint=last_checkpoint(output))


def fork(*args) -> int:
    """Runs [`train`] in a child of this process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=train, args=args)
    process.start()
    process.join()
    return process.exitcode


def main(folder: Path) -> None:
    """Whole runs and, by the names of the deaths, the killed and resumed ones; their exit codes go to a file."""
    codes = {name: [fork(folder / name)] for name in RUNS}
    for name, (death, step) in DEATHS.items():
        codes[name] = [fork(folder / name, death, step), fork(folder / name)]
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
