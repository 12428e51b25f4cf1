"""Attacks on runs, `python -m scripts.attack_runs ATTACK FOLDER SEED`; what went wrong is printed, one line each.

A run is a fork of this process, which has imported everything. It trains clip_pretrain on eight rows for six steps and
saves a checkpoint after each. Whatever happens to it, starting it again must end with the weights, optimiser and random
states of a run that nothing happened to.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cases.recipes import recipe_module, save_parts, tiny_values, write_yaml
from hf_vlm.runs.launch import launch
from processes import curve, equal

STEPS, ROOM = 6, 60_000
MAIN = recipe_module("clip_pretrain").main


def start(folder: Path, values: dict[str, Any], full_after: float | None = None) -> int:
    """Starts a run in a child of this process, which writes what it prints to `FOLDER.log`; returns its id.

    After `full_after` seconds a file cannot grow beyond `ROOM` bytes, as on a full disk: any library's write fails in
    the middle of a file.
    """
    path = write_yaml(folder.with_suffix(".yaml"), {**values, "output_dir": str(folder)})
    child = os.fork()
    if child:
        return child
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        if full_after is not None:
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (ROOM, ROOM))
            timer = threading.Timer(full_after, limit)
            timer.daemon = True
            timer.start()
        torch.set_num_threads(1)
        launch(MAIN, ["--config", str(path)])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """The exit code of a child; -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(folder: Path, whole: Path) -> list[str]:
    """What a finished run has that an undisturbed one has not."""
    if not (folder / f"checkpoint-{STEPS}").is_dir():
        return ["is not finished"]
    wrong = [] if equal(*(load_file(each / "model.safetensors") for each in (folder, whole))) else ["weights"]
    last = [each / f"checkpoint-{STEPS}" for each in (folder, whole)]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        if not equal(*(torch.load(each / name, weights_only=False) for each in last)):
            wrong.append(name)
    if curve(last[0]) != curve(last[1]):
        wrong.append("losses")
    if json.loads((folder / "training_record.json").read_text())["training"]["steps"] != STEPS:
        wrong.append("record")
    if not (folder / "README.md").is_file():
        wrong.append("card")
    return wrong


def judge(name: str, folder: Path, whole: Path, code: int) -> list[str]:
    """Lines about a run that ended."""
    log = folder.with_suffix(".log").read_text()
    wrong = [f"exit code {code}"] if code else []
    wrong += ["a traceback"] if "Traceback" in log else []
    wrong += differences(folder, whole)
    return [f"{name}: {each}" for each in wrong]


def kills(folder: Path, values: dict[str, Any], moments: random.Random, count: int = 24) -> list[str]:
    """Four kills of each run at random moments, then a last start."""
    began = time.monotonic()
    whole, wrong = folder / "whole", []
    if finish(start(whole, values)):
        return [whole.with_suffix(".log").read_text()]
    seconds = time.monotonic() - began
    for number in range(count // 4):
        run = folder / f"killed-{number}"
        for _ in range(4):
            child = start(run, values)
            time.sleep(moments.uniform(0.1, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
            finish(child)
        wrong += judge(run.name, run, whole, finish(start(run, values)))
    return wrong


def full_disks(folder: Path, values: dict[str, Any], moments: random.Random, count: int = 24) -> list[str]:
    """A disk that is full from a random moment on, then a start with room."""
    began, refused = time.monotonic(), 0
    whole, wrong = folder / "whole", []
    if finish(start(whole, values)):
        return [whole.with_suffix(".log").read_text()]
    seconds = time.monotonic() - began
    for number in range(count):
        run = folder / f"full-{number}"
        code = finish(start(run, values, moments.uniform(0.0, 0.9) * seconds))
        refused += code == 1
        lines = [line for line in run.with_suffix(".log").read_text().splitlines() if line.startswith("Error: ")]
        if code not in (0, 1) or (code == 1 and len(lines) != 1):
            wrong.append(f"{run.name}: exit code {code} with {len(lines)} lines")
        wrong += judge(run.name, run, whole, finish(start(run, values)))
    return wrong if refused > count // 2 else [*wrong, f"only {refused} of {count} disks were full in time"]


def pairs(folder: Path, values: dict[str, Any], moments: random.Random, count: int = 20) -> list[str]:
    """Two processes in one folder, the second at once, or in the first third of the first one's run."""
    began = time.monotonic()
    whole, wrong = folder / "whole", []
    if finish(start(whole, values)):
        return [whole.with_suffix(".log").read_text()]
    seconds = time.monotonic() - began
    for number in range(count):
        run = folder / f"pair-{number}"
        children = [start(run, values)]
        time.sleep(moments.choice([0.0, moments.uniform(0.0, 0.3)]) * seconds)
        children.append(start(run, values))
        codes = sorted(finish(child) for child in children)
        if codes != [0, 1]:
            wrong.append(f"{run.name}: exit codes {codes}")
        if run.with_suffix(".log").read_text().count(f"{run} is in use by process") != 1:
            wrong.append(f"{run.name}: nobody was kept out")
        wrong += judge(run.name, run, whole, codes[0])
    return wrong


def main(attack: str, folder: Path, seed: int) -> None:
    """Runs one attack and prints its lines."""
    child = os.fork()
    if not child:
        save_parts(folder / "parts")
        os._exit(0)
    finish(child)
    values = {**tiny_values("clip_pretrain", folder / "parts", folder), "max_steps": STEPS, "augmentation": "photo"}
    attacks = {"kills": kills, "full_disks": full_disks, "pairs": pairs}
    for line in attacks[attack](folder, values, random.Random(seed)):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
