"""The contrastive trainer: what is decayed, clamped, locked, logged, accumulated, evaluated; and its arguments."""

import logging
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState

from cases import tiny
from hf_vlm import VlmClipModel
from hf_vlm.data.batches.collators import pair_id
from hf_vlm.data.batches.pairs import PairDataset
from hf_vlm.training import (
    ContrastiveTrainer,
    ContrastiveTrainingArguments,
    cache_text_features,
    cache_vision_features,
    choose_bf16,
)
from hf_vlm.training.trainer import Stopwatch
from scripts import tiny_training


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def log_lines(trainer: ContrastiveTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


class CallCounter:
    """Counts a module's forward passes and notes whether it was in training mode."""

    def __init__(self, module: nn.Module):
        self.training_modes: list[bool] = []
        module.register_forward_hook(lambda module, inputs, output: self.training_modes.append(module.training))


# Optimiser


def test_weight_decay_is_for_matrices_alone(tmp_path: Path) -> None:
    model = tiny_training.model(loss_type="sigmoid", vision={"use_patch_bias": True})
    trainer = tiny_training.trainer(tmp_path, model, weight_decay=0.2)
    trainer.create_optimizer()
    names = {value: name for name, value in model.named_parameters()}
    decay = {names[value]: g["weight_decay"] for g in trainer.optimizer.param_groups for value in g["params"]}
    assert decay.keys() == set(names.values())
    assert {value for name, value in decay.items() if name.endswith("bias") or "norm" in name} == {0.0}
    for name in ("similarity.logit_scale", "similarity.logit_bias", "vision_model.embeddings.class_embedding"):
        assert decay[name] == 0.0
    matrices = {name for name, value in decay.items() if value == 0.2}
    assert "visual_projection.weight" in matrices
    assert "vision_model.embeddings.patch_embedding.weight" in matrices
    assert all(value.ndim > 1 for value, name in names.items() if name in matrices)


def test_weight_decay_does_not_move_the_temperature(tmp_path: Path) -> None:
    """With a gradient of almost nothing left by the learning rate, a decay of 1 would show."""
    model = tiny_training.model()
    model.similarity.logit_scale.requires_grad_(False)
    before = weights(model)
    trainer = tiny_training.trainer(tmp_path, model, weight_decay=1.0, learning_rate=1e-2, max_steps=1)
    trainer.train()
    assert "similarity.logit_scale" not in changed(before, weights(model))


def test_muon_is_for_the_matrices_of_the_layers(tmp_path: Path) -> None:
    model = tiny_training.model(loss_type="sigmoid")
    model.lock_tower("text")
    before = weights(model)
    options = {"learning_rate": 1e-3, "muon_learning_rate": 1e-2, "weight_decay": 0.2, "lr_scheduler_type": "linear"}
    trainer = tiny_training.trainer(tmp_path, model, max_steps=2, **options)
    trainer.create_optimizer()
    names = {value: name for name, value in model.named_parameters()}
    group_of = {names[value]: group for group in trainer.optimizer.param_groups for value in group["params"]}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(group_of)
    assert group_of.keys() == {name for name in before if not name.startswith("text_model.")}
    for name, group in group_of.items():
        is_layer_matrix = ".layers." in name and name.endswith("weight") and "norm" not in name
        assert group["lr"] == (1e-2 if is_layer_matrix else 1e-3), name
        assert group["weight_decay"] == (0.2 if before[name].ndim > 1 else 0.0), name
    trainer.train()
    assert changed(before, weights(model)) == group_of.keys()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}  # the schedule reaches both optimisers


class NoteScale(TrainerCallback):
    """Notes the log factor before and after clamping, at each step."""

    def __init__(self, model: VlmClipModel):
        self.scale = model.similarity.logit_scale
        self.after: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.scale.item())


def test_temperature_is_clamped_after_each_step(tmp_path: Path) -> None:
    def scales(limit: float) -> list[float]:
        torch.manual_seed(0)
        model = tiny_training.model(max_logit_scale=limit)
        with torch.no_grad():
            model.similarity.logit_scale.fill_(1.0)
        note = NoteScale(model)
        trainer = tiny_training.trainer(tmp_path, model, callbacks=[note], optim="sgd", learning_rate=0.1)
        trainer.train()
        assert log_lines(trainer)[0]["temperature"] == pytest.approx(math.exp(-1.0))
        return note.after

    free = scales(100.0)
    limit = min(free) - 0.1
    clamped = scales(limit)
    assert clamped[0] == pytest.approx(limit)
    assert max(clamped) <= limit + 1e-6


# Locked towers


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
@pytest.mark.parametrize("name", ["vision", "text"])
def test_locked_tower_stays_as_it_was(name: str, cached: bool, tmp_path: Path) -> None:
    model, rows = tiny_training.model(dropout=True), tiny_training.rows(16)
    model.lock_tower(name)
    options = {}
    if cached and name == "vision":
        options = {"vision_features": cache_vision_features(model, tiny.clip_processor(), rows, batch_size=5)}
    elif cached:
        captions = [caption for row in rows for caption in row["caption"]]
        options = {"text_features": cache_text_features(model, tiny.clip_processor(), captions, batch_size=3)}
    tower, other = model.vision_model, model.text_model
    tower, other = (tower, other) if name == "vision" else (other, tower)
    locked, trained = CallCounter(tower), CallCounter(other)
    before = weights(model)
    collator = tiny_training.collator(**options)
    trainer = tiny_training.trainer(tmp_path, model, PairDataset(rows), data_collator=collator)
    trainer.train()
    assert locked.training_modes == ([] if cached else 3 * [False])
    assert trained.training_modes == 3 * [True]
    assert changed(before, weights(model)) == {key for key in before if not key.startswith(f"{name}_model.")}


@pytest.mark.parametrize("name", ["vision", "text"])
def test_training_from_cached_features_is_training_from_the_tower(name: str, tmp_path: Path) -> None:
    rows, results = tiny_training.rows(16), []
    for cached in (False, True):
        torch.manual_seed(0)
        model = tiny_training.model()
        model.lock_tower(name)
        options = {}
        if cached and name == "vision":
            options = {"vision_features": cache_vision_features(model, tiny.clip_processor(), rows)}
        elif cached:
            captions = [caption for row in rows for caption in row["caption"]]
            options = {"text_features": cache_text_features(model, tiny.clip_processor(), captions)}
        collator = tiny_training.collator(**options)
        trainer = tiny_training.trainer(tmp_path, model, PairDataset(rows), data_collator=collator, optim="sgd")
        trainer.train()
        results.append((weights(model), [line["loss"] for line in log_lines(trainer)]))
    (computed, losses), (from_cache, cached_losses) = results
    assert cached_losses == pytest.approx(losses, rel=1e-5)
    for key, value in computed.items():
        torch.testing.assert_close(from_cache[key], value, rtol=1e-5, atol=1e-6)


def test_features_of_a_trained_tower_are_not_cached() -> None:
    model, processor = tiny_training.model(), tiny.clip_processor()
    with pytest.raises(ValueError, match=r"text tower is trained.*lock_tower\('text'\)"):
        cache_text_features(model, processor, ["a cat"])
    with pytest.raises(ValueError, match=r"vision tower is trained.*lock_tower\('vision'\)"):
        cache_vision_features(model, processor, tiny_training.rows(2))


# Log


def test_log_lines(tmp_path: Path) -> None:
    trainer = tiny_training.trainer(tmp_path, tiny_training.model(), logging_steps=2, max_steps=4)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    lines = log_lines(trainer)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert 0 < line["temperature"] < 1
        assert line["samples_per_second"] > 8 / seconds - 0.1


def test_a_finished_run_that_is_started_again_does_nothing(tmp_path: Path) -> None:
    """Not even in the middle of an epoch, where the Trainer itself would do one step more."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    tiny_training.trainer(tmp_path, tiny_training.model(), **options).train()
    again = tiny_training.trainer(tmp_path, tiny_training.model(), **options)
    before = weights(VlmClipModel.from_pretrained(tmp_path / "checkpoint-3"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    assert changed(before, weights(again.model)) == set()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


class Ending(PairDataset):
    """Rows of which one raises StopIteration, as a `next` in somebody's dataset does."""

    last = 4

    def __getitem__(self, index: int) -> dict:
        return next(iter([])) if index >= self.last else super().__getitem__(index)


def ending(pairs: list[dict]) -> dict[str, torch.Tensor]:
    return next(iter([])) if any(pair["index"] >= Ending.last for pair in pairs) else tiny_training.collator()(pairs)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "collator", "accumulation", "done", "steps"),
    [
        (Ending, None, 1, 1, 4),
        (PairDataset, ending, 1, 1, 4),
        (Ending, None, 2, 0, 2),
    ],
)
def test_an_epoch_that_ends_early_is_an_error(dataset, collator, accumulation, done, steps, workers, tmp_path) -> None:
    options = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    trainer = tiny_training.trainer(
        tmp_path, tiny_training.model(), dataset(tiny_training.rows(16)), data_collator=collator, **options
    )
    trainer._get_train_sampler = lambda *args: SequentialSampler(range(16))
    message = f"training data ended after step {done}, but the epoch has {steps} more steps"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


def test_an_epoch_without_a_batch_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ending, "last", 0)
    trainer = tiny_training.trainer(tmp_path, tiny_training.model(), Ending(tiny_training.rows(16)))
    with pytest.raises(RuntimeError, match="training data ended after step 0, but the epoch has"):
        trainer.train()


def test_throughput_of_a_resumed_run_leaves_out_the_steps_before() -> None:
    watch = Stopwatch()
    watch.on_train_begin(None, TrainerState(global_step=1000), TrainerControl())
    time.sleep(0.01)
    assert 0 < watch.lap(1001) <= 1 / 0.01
    time.sleep(0.01)
    assert 0 < watch.lap(1003) <= 2 / 0.01


def test_trackio(tmp_path: Path) -> None:
    """Without a network; conftest sets TRACKIO_DIR."""
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    trainer = tiny_training.trainer(
        tmp_path, tiny_training.model(), report_to="trackio", project="tiny", run_name="one"
    )
    trainer.train()
    lines = [line for line in storage.get_logs("tiny", "one") if "train/loss" in line]
    assert [line["train/loss"] for line in lines] == [line["loss"] for line in log_lines(trainer)]
    for line in lines:
        assert {"train/grad_norm", "train/temperature", "train/samples_per_second"} <= line.keys()


# Accumulation


@pytest.mark.parametrize("steps", [1, 2])
def test_accumulation_is_not_a_larger_batch(steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tiny_training.trainer(tmp_path, tiny_training.model(), gradient_accumulation_steps=steps)
    warned = [record.getMessage() for record in caplog.records if "grad_cache_chunk" in record.getMessage()]
    assert len(warned) == steps - 1
    assert all("negatives come from the same micro-batch of 4" in message for message in warned)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_two_equal_micro_batches_are_one(loss_type: str, chunk: int | None, tmp_path: Path) -> None:
    """Nothing, not even the temperature's gradient, is multiplied by the number of micro-batches."""
    results = []
    for copies in (1, 2):
        torch.manual_seed(0)
        model = tiny_training.model(loss_type=loss_type)
        before = weights(model)
        trainer = tiny_training.trainer(
            tmp_path,
            model,
            PairDataset(copies * tiny_training.rows(4), shuffle_captions=False),
            train_sampling_strategy="sequential",
            gradient_accumulation_steps=copies,
            grad_cache_chunk=chunk,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        trainer.train()
        steps = {name: value - before[name] for name, value in weights(model).items()}
        results.append((steps, log_lines(trainer)[0]))
    (one, line), (two, accumulated) = results
    assert accumulated["loss"] == pytest.approx(line["loss"], rel=1e-5)
    assert accumulated["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
    assert one["similarity.logit_scale"].abs() > 1e-5
    for name, step in one.items():
        assert (two[name] - step).norm() <= 1e-4 * step.norm(), name


# Evaluation


def test_evaluation_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    rows, scores = tiny_training.rows(6), iter([0.1, 0.9, 0.5])
    seen: list[EvalPrediction] = []

    def metrics(predictions: EvalPrediction) -> dict[str, float]:
        seen.append(predictions)
        return {"score": next(scores)}

    model = tiny_training.model(dropout=True)
    note = NoteWeights()
    trainer = ContrastiveTrainer(
        model,
        tiny_training.arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            metric_for_best_model="score",
            load_best_model_at_end=True,
            per_device_eval_batch_size=4,
        ),
        train_dataset=PairDataset(tiny_training.rows(16)),
        eval_dataset=PairDataset(rows, shuffle_captions=False),
        data_collator=tiny_training.collator(augment=True),
        eval_collator=tiny_training.collator(),
        compute_metrics=metrics,
        callbacks=[note],
    )
    trainer.train()
    assert changed(note.by_step[2], weights(model)) == set()
    assert changed(note.by_step[3], weights(model)) != set()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]

    # The metric receives the model's outputs for the unaugmented images, without dropout.
    model.eval()
    batch = tiny_training.collator()([trainer.eval_dataset[i] for i in range(6)])
    with torch.no_grad():
        expected = model(**batch)
    (image_embeds, text_embeds), ids = seen[1].predictions, seen[1].label_ids
    np.testing.assert_allclose(image_embeds, expected.image_embeds, atol=1e-5)
    np.testing.assert_allclose(text_embeds, expected.text_embeds, atol=1e-5)
    assert ids.tolist() == [row["id"] for row in rows] == [pair_id(row["id"]) for row in rows]


class NoteWeights(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.by_step: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = weights(model)


# Precision


@pytest.mark.parametrize("chunk", [None, 3])
def test_bf16_steps_are_finite_and_in_bf16(chunk: int | None, tmp_path: Path) -> None:
    model = tiny_training.model()
    kinds: list[torch.dtype] = []
    model.visual_projection.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    before = weights(model)
    trainer = tiny_training.trainer(tmp_path, model, bf16="true", grad_cache_chunk=chunk)
    trainer.train()
    after = weights(model)
    assert set(kinds) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())
    assert changed(before, after) == set(before)
    assert all(math.isfinite(line["loss"]) for line in log_lines(trainer))


def test_bf16_is_chosen_by_a_probe() -> None:
    random_state = torch.get_rng_state()
    use, reason = choose_bf16()
    assert torch.equal(torch.get_rng_state(), random_state)
    if torch.cuda.is_available():
        assert use == torch.cuda.is_bf16_supported()
        return
    state, half, full = re.fullmatch(r"bf16: (on|off) \(probe: (\d+) GFLOP/s in bf16, (\d+) in fp32\)", reason).groups()
    assert use == (state == "on")
    assert int(full) > 0
    # The numbers are rounded: a value next to the limit is inconclusive.
    assert (int(half) + 1 >= 1.2 * (int(full) - 1)) if use else (int(half) - 1 <= 1.2 * (int(full) + 1))


@pytest.mark.parametrize(
    ("value", "expected"), [("True", True), ("true", True), (True, True), ("false", False), (False, False)]
)
def test_bf16_argument(value: str | bool, expected: bool, tmp_path: Path) -> None:
    assert ContrastiveTrainingArguments(str(tmp_path), bf16=value).bf16 is expected


def test_bf16_auto_says_what_it_chose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        args = ContrastiveTrainingArguments(str(tmp_path))
    (message,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("bf16:")]
    assert message.startswith(f"bf16: {'on' if args.bf16 else 'off'} (")


# Errors


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf16 must be true, false or auto, not 'maybe'"):
        ContrastiveTrainingArguments(str(tmp_path), bf16="maybe")
    with pytest.raises(ValueError, match="grad_cache_chunk must be a positive number of rows"):
        tiny_training.arguments(tmp_path, grad_cache_chunk=0)


def test_one_process_with_several_gpus_is_refused(tmp_path: Path) -> None:
    """The Trainer would split the batch between them, and the loss would miss most negatives."""
    args = tiny_training.arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        ContrastiveTrainer(tiny_training.model(), args, data_collator=tiny_training.collator())
