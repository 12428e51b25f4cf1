"""Programs of tests/scripts in processes of their own, and how their results are compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def torchrun(program: str, folder: Path, ranks: int = 2) -> None:
    """Runs a program of tests/scripts on gloo ranks over loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    result = subprocess.run(
        [*command, "-m", f"scripts.{program}", str(folder)],
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """By name, the norm of the difference over the norm of what is expected."""
    assert actual.keys() == expected.keys()
    return {name: ((actual[name] - value).norm() / value.norm()).item() for name, value in expected.items()}


CURVE = ("step", "epoch", "loss", "grad_norm", "learning_rate", "temperature", "eval_loss")


def equal(one: Any, other: Any) -> bool:
    """Whether two nested structures are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def curve(checkpoint: Path) -> list[dict[str, float]]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: line[name] for name in CURVE if name in line} for line in history]
