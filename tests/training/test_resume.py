"""A run that is killed and resumed ends bit by bit where an uninterrupted one ends.

With dropout, augmentation, gradient accumulation, worker processes, evaluation, a partial last batch, several epochs.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vlm.training import last_checkpoint
from processes import curve, equal

TESTS = Path(__file__).parents[1]
DEATHS = [
    "between micro-batches",
    "after an epoch's checkpoint",
    "half of the optimizer saved",
    "half of the state saved",
    "in the fourth pass of a stream",
    "with Muon",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "scripts.resume_runs", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", DEATHS)
def test_killed_and_resumed_equals_uninterrupted(runs: Path, name: str) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    uninterrupted = next((f"whole {kind}" for kind in ("stream", "with Muon") if kind in name), "whole")
    assert codes[uninterrupted] == [0]
    assert codes[name] == [-9, 0]
    whole, resumed = runs / uninterrupted / "checkpoint-12", runs / name / "checkpoint-12"
    assert curve(resumed) == curve(whole)
    assert equal(load_file(resumed / "model.safetensors"), load_file(whole / "model.safetensors"))
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(run / file, weights_only=False) for run in (resumed, whole)]
        assert equal(*states), file


def test_runs_are_not_trivially_equal(runs: Path) -> None:
    """Every step moves the weights, every epoch has other losses, and the random state moves on."""
    lines = [line for line in curve(runs / "whole" / "checkpoint-12") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["epoch"] == 3
    assert len({line["loss"] for line in lines}) == 12
    states = [
        torch.load(runs / "whole" / f"checkpoint-{step}" / "rng_state.pth", weights_only=False) for step in (9, 12)
    ]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


def checkpoint(folder: Path, step: int, state: str | None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_last_checkpoint_is_the_newest_complete_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    complete = checkpoint(tmp_path, 9, "{}")
    checkpoint(tmp_path, 2, "{}")
    cut, empty = checkpoint(tmp_path, 10, '{"epoch": 1.'), checkpoint(tmp_path, 100, None)
    (tmp_path / "checkpoint-best").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == str(complete)
    assert not cut.exists()
    assert not empty.exists()
    assert (tmp_path / "checkpoint-best").exists()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"Removing {empty}", f"Removing {cut}"]


def test_last_checkpoint_of_a_new_run(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    assert last_checkpoint(tmp_path) is None
