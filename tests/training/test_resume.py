"""A run that is killed and resumed ends bit by bit where an uninterrupted one ends.

With dropout, augmentation, gradient accumulation, worker processes, evaluation, a partial last batch, several epochs.
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_vlm.data.batches.pairs import PairDataset
from hf_vlm.files import hold_folder
from hf_vlm.training import last_checkpoint, resume
from hf_vlm.training.resume import MARK, damage_of
from processes import curve, equal
from scripts import tiny_training
from scripts.damage import DAMAGES, FILES

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


# Whole checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_training.trainer(folder, tiny_training.model(), save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("file", [*FILES, MARK])
def test_a_damaged_checkpoint_is_set_aside(run: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    for name, damage in DAMAGES.items():
        if file == MARK and name == "missing":
            continue
        newest, copied = run / "checkpoint-3", run / "checkpoint-4"
        shutil.copytree(newest, copied)
        damage(copied / file)
        with caplog.at_level(logging.WARNING):
            assert last_checkpoint(run) == str(newest), name
        assert not copied.exists()
        (warning,) = [record.getMessage() for record in caplog.records]
        assert warning.startswith(f"{copied} is not whole: {file} "), name
        assert warning.endswith("It is now called damaged-checkpoint-4.")
        shutil.rmtree(run / "damaged-checkpoint-4")
        caplog.clear()


@pytest.mark.parametrize("file", FILES)
def test_checkpoints_of_other_versions_are_checked_by_their_formats(run: Path, file: str) -> None:
    """Without checkpoint.json only values within the weights can change unseen."""
    for step in (2, 3):
        (run / f"checkpoint-{step}" / MARK).unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-3")
    whole = run / "whole"
    shutil.copytree(run / "checkpoint-3", whole)
    for name, damage in DAMAGES.items():
        damaged = run / "checkpoint-3"
        damage(damaged / file)
        if last_checkpoint(run) == str(run / "checkpoint-2"):
            shutil.rmtree(run / "damaged-checkpoint-3")
        else:
            shutil.rmtree(damaged) if reads_the_same(damaged / file, whole / file, name) else pytest.fail(name)
        shutil.copytree(whole, damaged)


def reads_the_same(damaged: Path, whole: Path, name: str) -> bool:
    """Whether a file says what it said, or is one whose format has no checksum."""
    if damaged.suffix in (".pt", ".pth"):
        return equal(*(torch.load(path, weights_only=False) for path in (damaged, whole)))
    if damaged.suffix == ".json" and name != "middle byte flipped":
        return json.loads(damaged.read_text()) == json.loads(whole.read_text())
    return name in ("zeroed at its end", "middle byte flipped")


def test_a_state_of_another_step_is_damage(run: Path) -> None:
    for step in (2, 3):
        (run / f"checkpoint-{step}" / MARK).unlink()
    shutil.copy(run / "checkpoint-2" / "trainer_state.json", run / "checkpoint-3")
    assert damage_of(run / "checkpoint-3") == "trainer_state.json is of step 2"
    (run / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    assert damage_of(run / "checkpoint-2") == "trainer_state.json has no epoch"


def test_random_states_of_all_ranks_are_needed(run: Path) -> None:
    folder = run / "checkpoint-3"
    (folder / MARK).unlink()
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
    assert damage_of(folder) == "rng_state_0.pth is missing"


def test_a_shard_is_needed(tmp_path: Path, run: Path) -> None:
    folder = run / "checkpoint-3"
    (folder / MARK).unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors, which is missing" in damage_of(folder)


def test_a_checkpoint_that_cannot_be_read_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system that is away for a moment must not cost a checkpoint."""

    def stale(path: Path) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(resume, "checksum", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        last_checkpoint(run)
    assert sorted(path.name for path in run.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]


def test_damaged_checkpoints_are_never_overwritten_or_rotated(run: Path) -> None:
    (run / "damaged-checkpoint-3").mkdir()
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    tiny_training.trainer(run, tiny_training.model(), **options).train(resume_from_checkpoint=last_checkpoint(run))
    names = sorted(path.name for path in run.glob("*checkpoint*"))
    assert names == ["checkpoint-3", "damaged-checkpoint-3", "damaged-checkpoint-3-2"]


def test_last_checkpoint_of_a_new_run(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_counts_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are synced before the mark is written, and older checkpoints are deleted only then."""
    events: list[str] = []
    monkeypatch.setattr(resume, "sync", lambda path: events.append(path.name))

    def write(path: Path, text: str) -> None:
        older = "old one is there" if (tmp_path / "checkpoint-1").exists() else "first"
        events.append(f"{path.parent.name} {'begins' if 'unfinished' in text else 'is whole'}, {older}")
        path.write_text(text)

    monkeypatch.setattr(resume, "write_text", write)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    tiny_training.trainer(tmp_path, tiny_training.model(), **options).train()
    second = events[events.index("checkpoint-2 begins, old one is there") :]
    assert second[-2:] == ["checkpoint-2 is whole, old one is there", tmp_path.name]
    assert {*FILES} <= set(second[:-2])
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_full_disk_costs_one_line_and_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, options = torch.save, {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}

    def full(value: object, path: str, *args, **kwargs) -> None:
        if "checkpoint-2/optimizer" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(value, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-2 could not be saved \(Pytorch.*MiB are free. Make room"):
            tiny_training.trainer(tmp_path, tiny_training.model(), **options).train()
    assert damage_of(tmp_path / "checkpoint-2") == "the run was stopped while saving it"
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


# One process in a folder


HOLD = "import sys; from hf_vlm.files import hold_folder; held = hold_folder(sys.argv[1]); print('held', flush=True)"


def other_process(folder: Path, code: str = HOLD) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with hold_folder(tmp_path), hold_folder(tmp_path):
        line = other_process(tmp_path).stderr.splitlines()[-1]
    assert f"{tmp_path} is in use by process {os.getpid()} on " in line
    assert " since " in line
    assert other_process(tmp_path).stdout == "held\n"


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    """Nor do its children, such as the workers of a loader."""
    code = f"{HOLD}; import os, time; os.fork() or time.sleep(100); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
        hold_folder(tmp_path)
    with pytest.raises(ValueError, match="in use by"):
        tiny_training.trainer(tmp_path, tiny_training.model()).train()
    time.sleep(0.2)  # until it has forked
    children = subprocess.run(["pgrep", "-P", str(holder.pid)], capture_output=True, text=True, check=False).stdout
    holder.kill()
    holder.wait()
    try:
        with hold_folder(tmp_path):
            pass
    finally:
        for child in children.split():
            os.kill(int(child), signal.SIGKILL)


def test_ranks_of_one_run_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with hold_folder(tmp_path):
        assert other_process(tmp_path, f"import os; os.environ['RANK'] = '0'; {HOLD}").stdout == "held\n"


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match=r"/proc/run cannot be written to \(.*\): choose another folder."):
        hold_folder("/proc/run")


# The same run


def resumed(run: Path, model=None, **options):
    """A trainer of the finished run with other options, and its logged rates after one more step."""
    values = {"max_steps": 4, "save_strategy": "no", **options}
    trainer = tiny_training.trainer(run, model or tiny_training.model(), **values)
    trainer.train(resume_from_checkpoint=last_checkpoint(run))
    return trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 8}, "rows of a step was 4 and is 8. Set it back"),
        ({"seed": 7}, "seed was 42 and is 7. Set it back"),
        ({"train_dataset": PairDataset(tiny_training.rows(20))}, "rows was 16 and is 20. Set it back"),
        ({"muon_learning_rate": 0.1}, "Muon was False and is True."),
        ({"learning_rates": {"vision_model": 0.1}}, "modules with learning_rates was .* and is .*vision_model"),
        ({"optim": "sgd"}, "optim was .*adamw_torch.* and is .*sgd"),
        ({"model": tiny_training.model(projection_dim=24)}, r"has shape \(16, 24\), in this model \(24, 24\)"),
        (
            {"model": tiny_training.model(vision={"num_hidden_layers": 3})},
            "does not hold .*layers.2.*which this",
        ),
        (
            {"model": tiny_training.model(vision={"num_hidden_layers": 1})},
            "holds .*layers.1.*which this",
        ),
    ],
)
def test_another_run_is_not_resumed(run: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint-3.*{message}"):
        resumed(run, **options)


def test_other_rows_are_taken_if_they_are_asked_for(run: Path) -> None:
    rows = PairDataset(tiny_training.rows(20))
    assert resumed(run, train_dataset=rows, ignore_data_skip=True, max_steps=5).state.global_step == 5


def test_other_parameters_are_not_resumed(run: Path) -> None:
    model = tiny_training.model()
    model.lock_tower("text")
    with pytest.raises(ValueError, match=r"trained parameters was \d+ and is \d+"):
        resumed(run, model)


def test_kept_and_taken_values_are_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = resumed(run, learning_rate=5.0, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    kept, taken = [record.getMessage() for record in caplog.records if "checkpoint-3: " in record.getMessage()]
    assert kept.endswith("checkpoint-3: learning_rate was 0.001 and is 5.0. The checkpoint's value is kept.")
    assert "max_steps was 3 and is 4; per_device_train_batch_size was 4 and is 2; " in taken
    assert taken.endswith("The new value is taken from here on.")
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.001


def test_a_longer_run_does_not_begin_at_rate_zero(run: Path) -> None:
    """The schedule of three steps ended at 0; that of six goes on at one half."""
    trainer = resumed(run, max_steps=6)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates[:3] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert rates[3:] == pytest.approx([1e-3 / 2, 1e-3 / 3, 1e-3 / 6])


def test_an_interrupt_names_the_step(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = tiny_training.trainer(tmp_path, tiny_training.model(), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted at step 1\."):
        trainer.train()


# Data that ends


def test_an_epoch_that_ends_early_is_an_error(tmp_path: Path) -> None:
    class Ending:
        """A collator with a mistake, which the loader takes for the end of the data."""

        def __init__(self):
            self.left, self.collate = 2, tiny_training.collator()

        def __call__(self, rows):
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return self.collate(rows)

    trainer = tiny_training.trainer(tmp_path, tiny_training.model(), data_collator=Ending())
    with pytest.raises(RuntimeError, match="The training data ended after step 2, but the epoch has 3 more steps"):
        trainer.train()
