"""Runs that are damaged, killed, without room or two at once: none is stuck, none ends with other weights."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases.recipes import save_parts, tiny_values, write_yaml
from hf_vlm.training import last_checkpoint
from hf_vlm.training.resume import MARK
from processes import TESTS, curve, equal
from scripts import tiny_training
from scripts.damage import DAMAGES, FILES

pytestmark = pytest.mark.slow

STEPS = 4
ATTACKS = [(file, name) for file in (*FILES, MARK) for name in DAMAGES if (file, name) != (MARK, "missing")]
ATTACKS = sorted(random.Random(0).sample(ATTACKS, 66))


def train(folder: Path) -> None:
    """A run of four steps with dropout and a checkpoint after each, from its last checkpoint."""
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
    torch.manual_seed(0)
    trainer = tiny_training.trainer(folder, tiny_training.model(dropout=True), **options)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


def assert_same(run: Path, whole: Path) -> None:
    one, other = (each / f"checkpoint-{STEPS}" for each in (run, whole))
    assert equal(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert equal(*(torch.load(each / file, weights_only=False) for each in (one, other))), file
    assert curve(one) == curve(other)


@pytest.mark.parametrize(("file", "name"), ATTACKS)
def test_a_damaged_checkpoint(file: str, name: str, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    DAMAGES[name](run / f"checkpoint-{STEPS - 1}" / file)
    train(run)
    assert (run / f"damaged-checkpoint-{STEPS - 1}").is_dir()
    assert_same(run, whole)


def test_all_checkpoints_damaged(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for checkpoint in run.glob("checkpoint-*"):
        DAMAGES["cut in half"](checkpoint / "optimizer.pt")
    train(run)
    assert len(list(run.glob("damaged-checkpoint-*"))) == STEPS
    assert_same(run, whole)


def test_two_ranks(tmp_path: Path) -> None:
    """The first rank decides for both: one warning, and both resume from the same checkpoint."""
    save_parts(tmp_path / "parts")
    values = tiny_values("clip_pretrain", tmp_path / "parts", tmp_path / "run")
    path = write_yaml(tmp_path / "tiny.yaml", values)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "recipes.clip_pretrain", "--config", str(path)]

    def start(*options: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}"}
        return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)

    assert start().returncode == 0
    (tmp_path / "run" / "checkpoint-2" / "rng_state_1.pth").unlink()
    resumed = start("--max_steps", "3")
    assert resumed.returncode == 0
    assert resumed.stderr.count("checkpoint-2 is not whole: rng_state_1.pth is missing.") == 1
    assert resumed.stderr.count("checkpoint-1: max_steps was 2 and is 3.") == 1
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("attack", ["kills", "full_disks", "pairs"])
def test_processes(attack: str, tmp_path: Path) -> None:
    """24 kills, 24 full disks, 20 pairs of processes in one folder."""
    command = [sys.executable, "-m", "scripts.attack_runs", attack, str(tmp_path), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=500, check=True)
    assert done.stdout.splitlines() == []
