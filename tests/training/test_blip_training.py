"""BLIP's trainer: how a batch is split, momentum and queue, schedules, the log, evaluation, adapters."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

from cases import tiny
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
)
from hf_vlm.data import ContrastiveCollator, PairDataset, PairStream
from hf_vlm.models.modeling_blip import VlmBlipHead
from hf_vlm.training import BlipTrainer
from hf_vlm.training.pretraining import MOMENTUM_NAME
from processes import equal, relative_errors, torchrun
from scripts import blip_resume, blip_steps, blip_training
from scripts.blip_training import ONE_GRADIENT, SPLITS

TESTS = Path(__file__).parents[1]
Weights = dict[str, torch.Tensor]
ONLY_LM = {"itc_weight": 0.0, "itm_weight": 0.0, "lm_weight": 0.5}


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def changed(before: Weights, after: Weights) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def log_lines(trainer: Trainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_one_step_of(before: Weights, model: nn.Module, expected: Weights) -> None:
    """That plain gradient descent at rate 1 took these gradients off the weights."""
    assert any(gradient.norm() > 1e-3 for gradient in expected.values())
    for name, parameter in model.named_parameters():
        error = (before[name] - parameter.detach() - expected[name]).norm()
        assert error <= 1e-6 * before[name].norm() + 1e-4 * expected[name].norm(), name


def gradients(model: nn.Module, loss: torch.Tensor) -> Weights:
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


# Splits of a batch


def language_model(head: type[VlmBlipHead]) -> VlmBlipHead:
    torch.manual_seed(0)
    return blip_training.model(head, **(ONLY_LM if head is VlmBlipForPreTraining else {}))


WRITERS = [VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering, VlmBlipForPreTraining]


@pytest.mark.parametrize("head", WRITERS)
def test_how_a_batch_is_split_changes_nothing(head: type[VlmBlipHead], tmp_path: Path) -> None:
    """Texts of unequal length, answers of unequal number: loss and gradients are those of the eight rows at once."""
    data = blip_training.dataset(head, 8)
    batch = blip_training.collator(head)([data[i] for i in range(8)])
    assert len({*(batch["labels"] != -100).sum(dim=1).tolist()}) > 1
    model = language_model(head)
    inputs = {**batch, "return_loss": True} if head is VlmBlipForPreTraining else batch
    loss = model(**inputs).loss
    expected = gradients(model, loss)
    for size, steps in SPLITS:
        model = language_model(head)
        before = weights(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = blip_training.trainer(tmp_path, model, data, **options, **ONE_GRADIENT)
        trainer.train()
        (line,) = log_lines(trainer)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        weight = 0.5 if head is VlmBlipForPreTraining else 1.0
        assert line["loss_lm"] * weight == pytest.approx(loss.item(), rel=1e-5)
        assert_one_step_of(before, model, expected)


@pytest.mark.parametrize("split", [(4, 2), (1, 8)], ids=str)
def test_transformers_trainer_takes_the_same_step(split: tuple[int, int], tmp_path: Path) -> None:
    """With our collator and a prompt; it divides by the tokens of all micro-batches as well."""
    head = VlmBlipForConditionalGeneration
    data, collator = blip_training.dataset(head, 8), blip_training.collator(head, prompt="the left of ")
    model = language_model(head)
    loss = model(**collator([data[i] for i in range(8)])).loss
    expected = gradients(model, loss)
    before = weights(model)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    options |= {"remove_unused_columns": False, "logging_steps": 1, "per_device_train_batch_size": split[0]}
    arguments = TrainingArguments(str(tmp_path), gradient_accumulation_steps=split[1], **options, **ONE_GRADIENT)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    assert log_lines(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_one_step_of(before, model, expected)


@pytest.mark.parametrize("head", [VlmBlipForPreTraining, VlmBlipForImageTextRetrieval])
def test_contrasts_of_micro_batches_are_averaged(head: type[VlmBlipHead], tmp_path: Path) -> None:
    """Also of batches without labels. Two micro-batches of the same pairs, without a queue, have the loss of one.

    Every negative is drawn from one candidate, so that it does not matter which number a micro-batch has.
    """
    found = []
    for copies, is_labelled in [(1, True), (2, True), (2, False)]:
        torch.manual_seed(0)
        model = blip_training.model(head, queue_size=0)
        before = weights(model)
        collator = blip_training.collator(head) if is_labelled else ContrastiveCollator(tiny.blip_processor())
        data = PairDataset(copies * blip_training.rows(2), shuffle_captions=False)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": copies, "max_steps": 1}
        options |= {"train_sampling_strategy": "sequential"}
        trainer = blip_training.trainer(tmp_path, model, data, collator, **options, **ONE_GRADIENT)
        trainer.train()
        steps = {name: value - before[name] for name, value in weights(model).items()}
        found.append((log_lines(trainer)[0], steps))
    (line, expected), *others = found
    assert ("loss_lm" in line) == (head is VlmBlipForPreTraining)
    for other, steps in others:
        for name in ("loss", "grad_norm", *(name for name in line if name.startswith("loss_"))):
            assert other[name] == pytest.approx(line[name], rel=1e-4), name
        for name, step in expected.items():
            assert (steps[name] - step).norm() <= 1e-5 + 1e-4 * step.norm(), name


# Momentum, queue, temperature, what is frozen


class Note(TrainerCallback):
    """Notes weights, averages and queued ids at the times of a step."""

    def __init__(self, model: VlmBlipForPreTraining):
        self.model = model
        self.at: dict[str, list[tuple[Weights, Weights, list[int]]]] = {"begin": [], "substep": [], "end": []}

    def note(self, time: str) -> None:
        averages = {
            f"{part}.{name}": value.clone()
            for part, module in self.model.momentum.encoders.items()
            for name, value in module.named_parameters()
        }
        queue = self.model.momentum.queue
        self.at[time].append((weights(self.model), averages, queue.filled()[2].tolist()))

    def on_step_begin(self, *args, **kwargs):
        self.note("begin")  # before the trainer's own callback

    def on_substep_end(self, *args, **kwargs):
        self.note("substep")

    def on_step_end(self, *args, **kwargs):
        self.note("end")

    def on_evaluate(self, *args, **kwargs):
        self.note("end")


class NoteBatches:
    """A collator that notes the ids of its batches."""

    def __init__(self):
        self.ids: list[list[int]] = []
        self.collator = blip_training.collator()

    def __call__(self, pairs):
        batch = self.collator(pairs)
        self.ids.append(batch["pair_ids"].tolist())
        return batch


def test_averages_move_once_a_step_and_the_queue_is_filled_once(tmp_path: Path) -> None:
    """Two micro-batches a step and an evaluation after each: closed form of the averages, ids of the queue in order."""
    model = blip_training.model(dropout=True, momentum=0.9, queue_size=18)
    note, collator = Note(model), NoteBatches()
    trainer = blip_training.trainer(
        tmp_path,
        model,
        data_collator=collator,
        eval_dataset=blip_training.dataset(VlmBlipForPreTraining, 6),
        callbacks=[note],
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    begun, halfway, ended = (note.at[time] for time in ("begin", "substep", "end"))
    ended, evaluated = ended[::2], ended[1::2]
    assert (len(begun), len(halfway), len(ended), len(evaluated)) == (3, 3, 3, 3)
    names = {name: f"model.{name}" if not name.startswith("similarity") else name for name in begun[0][1]}
    expected = {name: begun[0][0][own] for name, own in names.items()}
    assert any(name.startswith("text_encoder") for name in names)
    queued: list[int] = []
    for step in range(3):
        current = begun[step][0]
        expected = {name: 0.9 * value + 0.1 * current[names[name]] for name, value in expected.items()}
        assert begun[step][2] == halfway[step][2] == queued  # not before the last micro-batch
        queued = queued + collator.ids[2 * step] + collator.ids[2 * step + 1]
        if len(queued) > 18:  # it begins again at its first place
            queued = queued[18:] + queued[len(queued) - 18 : 18]
        for _, averages, _ in (halfway[step], ended[step], evaluated[step]):
            for name, value in averages.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert ended[step][2] == evaluated[step][2] == queued
        assert changed(begun[step][0], ended[step][0]) != set()
    assert max((ended[-1][1][name] - begun[0][1][name]).abs().max() for name in names) > 1e-3


def test_without_contrast_there_are_no_averages(tmp_path: Path) -> None:
    model = blip_training.model(itc_weight=0.0)
    trainer = blip_training.trainer(tmp_path, model, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert not model._momentum
    assert not (tmp_path / "checkpoint-1" / MOMENTUM_NAME).exists()
    assert "loss_itc" not in log_lines(trainer)[0]


@pytest.mark.parametrize(("start", "limits"), [(0.4, (0.001, 0.35)), (0.05, (0.06, 0.5))])
def test_temperature_is_clamped_after_each_step(start: float, limits: tuple[float, float], tmp_path: Path) -> None:
    """The log has the temperature that the loss was made with: the first line's is not clamped yet."""
    model = blip_training.model(min_temperature=limits[0], max_temperature=limits[1])
    nn.init.constant_(model.similarity.temperature, start)
    trainer = blip_training.trainer(tmp_path, model, max_steps=2, learning_rate=1e-6)
    trainer.train()
    nearest = min(limits, key=lambda limit: abs(limit - start))
    assert [line["temperature"] for line in log_lines(trainer)] == pytest.approx([start, nearest], rel=1e-4)
    assert limits[0] - 1e-7 <= model.similarity.temperature.item() <= limits[1] + 1e-7


def test_frozen_stays_frozen(tmp_path: Path) -> None:
    model = blip_training.model()
    model.model.vision_model.requires_grad_(False)
    before = weights(model)
    blip_training.trainer(tmp_path, model, weight_decay=0.5, learning_rate=1e-2).train()
    still = before.keys() - changed(before, weights(model))
    assert still == {name for name in before if name.startswith("model.vision_model.")}
    averages = dict(model.momentum.encoders.named_parameters())
    assert not any(parameter.requires_grad for parameter in averages.values())
    for name, value in model.model.vision_model.named_parameters():
        torch.testing.assert_close(averages[f"vision_model.{name}"], value, rtol=1e-5, atol=1e-6)


def test_everything_else_is_trained(tmp_path: Path) -> None:
    model = blip_training.model()
    before = weights(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    blip_training.trainer(tmp_path, model, learning_rate=1e-2).train()
    assert changed(before, weights(model)) == trained
    assert {name for name in before if "pooler" not in name} >= trained


# What the model is told


def told(model: VlmBlipForPreTraining) -> list[tuple[float, int, bool]]:
    """Filled with soft-target weight, seed and mode of each forward pass."""
    notes: list[tuple[float, int, bool]] = []

    def note(module, args, kwargs):
        notes.append((kwargs["soft_target_weight"], kwargs["sample_seed"], module.training))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return notes


@pytest.mark.parametrize(
    ("kind", "ramp", "steps_to_full"), [("rows", 1.5, 6), ("stream", 1.5, 6), ("rows", 0.0, 0)], ids=str
)
def test_soft_targets_rise_over_epochs(kind: str, ramp: float, steps_to_full: int, tmp_path: Path) -> None:
    """Four steps an epoch: of 32 rows at 8 a step, or of a stream whose three epochs have 12 steps."""
    model = blip_training.model(soft_target_weight=0.4)
    notes = told(model)
    data = blip_training.dataset(VlmBlipForPreTraining, 32)
    if kind == "stream":
        data = PairStream(tiny_stream(32))
    # A stream's epochs are said by num_train_epochs; that of rows is what it is.
    epochs = {"num_train_epochs": 3.0 if kind == "stream" else 7.0}
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 12, **epochs}
    blip_training.trainer(tmp_path, model, data, soft_target_ramp_epochs=ramp, **options).train()
    shares = [weight for weight, *_ in notes]
    assert shares[::2] == shares[1::2]
    expected = [0.4 * min(1.0, step / steps_to_full) if steps_to_full else 0.4 for step in range(12)]
    assert shares[::2] == pytest.approx(expected)
    seeds = [seed for _, seed, _ in notes]
    assert len({seed + draw for seed in seeds for draw in (0, 1)}) == 48  # two draws a micro-batch, each its own


def tiny_stream(count: int) -> IterableDataset:
    rows = [{name: row[name] for name in ("image", "caption", "id")} for row in blip_training.rows(count)]
    return Dataset.from_list(rows).to_iterable_dataset(2)


@pytest.mark.parametrize("kind", ["epochs", "steps", "stream"])
def test_learning_rate_steps_down_after_each_epoch(kind: str, tmp_path: Path) -> None:
    """Warm-up of two steps from the lowest rate, then the peak times 0.1 an epoch of three steps, never below it."""
    lengths = {"epochs": {"num_train_epochs": 5, "max_steps": -1}, "steps": {"max_steps": 15}}
    length = lengths.get(kind, {"num_train_epochs": 5, "max_steps": 15})
    model = blip_training.model(VlmBlipForConditionalGeneration)
    data = PairStream(tiny_stream(24)) if kind == "stream" else blip_training.dataset(type(model), 24)
    options = {"learning_rate": 1e-3, "min_learning_rate": 1e-6, "lr_decay_per_epoch": 0.1, "warmup_steps": 2}
    trainer = blip_training.trainer(tmp_path, model, data, per_device_train_batch_size=8, **options, **length)
    trainer.train()
    expected = [1e-6, (1e-6 + 1e-3) / 2, *(max(1e-6, 1e-3 * 0.1 ** (step // 3)) for step in range(2, 15))]
    assert [line["learning_rate"] for line in log_lines(trainer)] == pytest.approx(expected, rel=1e-6)
    assert expected[-1] == 1e-6


# Log


def test_log_lines_add_up(tmp_path: Path) -> None:
    """The loss is the weighted sum of its parts, each averaged over the micro-batches of the steps since the last."""
    torch.manual_seed(0)
    by_step, by_two = [], []
    parts = {"itc": 0.5, "itm": 2.0, "lm": 0.25}
    for logging_steps, lines in ((1, by_step), (2, by_two)):
        torch.manual_seed(0)
        model = blip_training.model(**{f"{name}_weight": weight for name, weight in parts.items()})
        options = {"gradient_accumulation_steps": 2, "logging_steps": logging_steps, "max_steps": 4}
        trainer = blip_training.trainer(tmp_path, model, **options)
        trainer.train()
        lines += log_lines(trainer)
    assert [line["step"] for line in by_two] == [2, 4]
    for line in by_step + by_two:
        assert line["samples_per_second"] > 0
        total = sum(weight * line[f"loss_{name}"] for name, weight in parts.items())
        assert total == pytest.approx(line["loss"], rel=1e-5)
    for name in ("temperature", "loss_itc", "loss_itm", "loss_lm"):
        pairs = [(one[name] + two[name]) / 2 for one, two in zip(by_step[::2], by_step[1::2], strict=True)]
        assert [line[name] for line in by_two] == pytest.approx(pairs, rel=1e-5)


# Evaluation


def recall(predictions) -> dict[str, float]:
    (images, texts), ids = predictions.predictions, predictions.label_ids
    assert images.shape == texts.shape == (6, 16)
    return {"score": float((images * texts).sum()), "ids": ids.tolist()}


def test_evaluation_is_deterministic_and_disturbs_nothing(tmp_path: Path) -> None:
    ends, scores = [], []
    for strategy in ("no", "steps"):
        torch.manual_seed(0)
        model = blip_training.model()  # with dropout it would: a data loader draws its seed
        data = blip_training.dataset(VlmBlipForPreTraining, 6, shuffle_captions=False)
        options = {"eval_strategy": strategy, "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 2}
        trainer = blip_training.trainer(
            tmp_path, model, eval_dataset=data, compute_metrics=recall, gradient_accumulation_steps=2, **options
        )
        trainer.train()
        ends.append(weights(model))
        scores += [trainer.evaluate() for _ in range(2)]
    assert changed(*ends) == set()
    names = ("eval_loss", "eval_score", "eval_ids")
    assert len({tuple(map(str, (score[name] for name in names))) for score in scores}) == 1
    assert scores[0]["eval_ids"] == [row["id"] for row in blip_training.rows(6)]
    assert math.isfinite(scores[0]["eval_loss"])


@pytest.mark.parametrize("head", [VlmBlipForPreTraining, VlmBlipForQuestionAnswering])
def test_the_best_checkpoint_is_loaded_at_the_end(head: type[VlmBlipHead], tmp_path: Path) -> None:
    """The model is ruined after the first step: the first is the best, and its weights come back."""
    model = blip_training.model(head, tie_word_embeddings=True)

    class Ruin(TrainerCallback):
        saved: Weights = {}

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.saved.update(weights(model))
            else:
                with torch.no_grad():
                    model.lm_head.decoder.bias[0] += 50  # padding, which is never right

    data = blip_training.dataset(head, 6)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 1e-4}
    trainer = blip_training.trainer(tmp_path, model, eval_dataset=data, callbacks=[Ruin()], **options)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[0] < min(losses[1:])
    assert trainer.state.best_global_step == 1
    assert changed(Ruin.saved, weights(model)) == set()


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BlipTrainer]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    trainer = blip_training.trainer(folder, blip_training.model(), save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    trainer.save_model()
    return folder, trainer


def test_saved_model_has_no_averages_and_loads(trained: tuple[Path, BlipTrainer]) -> None:
    folder, trainer = trained
    assert not (folder / MOMENTUM_NAME).exists()
    with safe_open(folder / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) <= set(trainer.model.state_dict())
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert {name.split(".")[0] for name in info["unexpected_keys"]} == {"similarity", "itm_head", "lm_head"}
    inputs = tiny.blip_inputs()
    expected = trainer.model.model.eval()(**inputs).last_hidden_state
    torch.testing.assert_close(model.eval()(**inputs).last_hidden_state, expected)


def test_run_without_its_averages_does_not_go_on(trained: tuple[Path, BlipTrainer], tmp_path: Path) -> None:
    folder, _ = trained
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for path in (folder / "checkpoint-2").iterdir():
        if path.name != MOMENTUM_NAME:
            (checkpoint / path.name).write_bytes(path.read_bytes())
    trainer = blip_training.trainer(tmp_path, blip_training.model(), max_steps=3)
    with pytest.raises(ValueError, match=rf"^{checkpoint / MOMENTUM_NAME} is missing: .*queue\.$"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# Adapters


def with_lora(model: nn.Module):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "fc1", "key_value"]))


def test_adapter_of_a_captioner(tmp_path: Path) -> None:
    """It alone is trained and saved; loaded, and merged, it gives the same logits."""
    peft = pytest.importorskip("peft")
    model = blip_training.model(VlmBlipForConditionalGeneration)
    before = weights(model)
    adapted = with_lora(model)
    trainer = blip_training.trainer(
        tmp_path, adapted, head=type(model), learning_rate=0.05, gradient_accumulation_steps=2, max_steps=4
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    own = weights(adapted.get_base_model())
    assert changed(before, {name.replace(".base_layer", ""): value for name, value in own.items()}) == set()
    inputs = tiny.blip_inputs()
    with torch.no_grad():
        expected = adapted.eval()(**inputs).logits
        fresh = blip_training.model(VlmBlipForConditionalGeneration)
        fresh.load_state_dict(before)
        assert (fresh(**inputs).logits - expected).abs().max() > 0.01
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [VlmBlipForQuestionAnswering, VlmBlipForPreTraining])
def test_adapter_of_another_head_is_trained_like_the_head(head: type[VlmBlipHead], tmp_path: Path) -> None:
    """The first loss is that of the head without an adapter, whose change is nothing yet; and the queue fills."""
    lines = []
    for adapt in (False, True):
        torch.manual_seed(0)
        model = blip_training.model(head)
        wrapped = with_lora(model) if adapt else model
        trainer = blip_training.trainer(tmp_path, wrapped, head=head, gradient_accumulation_steps=2)
        trainer.train()
        lines.append(log_lines(trainer)[0])
        if head is VlmBlipForPreTraining:
            assert int(model.momentum.queue.count) == 8
    plain, adapted = lines
    for name in (name for name in plain if name.startswith("loss") or name == "temperature"):
        assert adapted[name] == pytest.approx(plain[name], rel=1e-5), name


def test_one_process_with_several_gpus_is_refused(tmp_path: Path) -> None:
    arguments = blip_training.arguments(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        BlipTrainer(blip_training.model(), arguments, data_collator=blip_training.collator())


def test_texts_with_nothing_to_learn(tmp_path: Path) -> None:
    """The loss is 0, not NaN, and nothing moves."""
    model = blip_training.model(VlmBlipForConditionalGeneration)
    before = weights(model)
    collator = blip_training.collator(type(model))

    def unlabelled(pairs):
        batch = collator(pairs)
        return {**batch, "labels": batch["labels"].fill_(-100)}

    trainer = blip_training.trainer(tmp_path, model, data_collator=unlabelled, max_steps=1)
    trainer.train()
    assert log_lines(trainer)[0]["loss"] == 0
    assert not any(np.isnan(value).any() for value in weights(model).values())
    assert changed(before, weights(model)) == set()


# Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What one process did, and what two ranks did."""
    one = blip_steps.main(tmp_path_factory.mktemp("one"))
    folder = tmp_path_factory.mktemp("two")
    torchrun("blip_steps", folder)
    return one, torch.load(folder / "results-2.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", blip_steps.CASES)
def test_two_ranks_are_one_process(case: str, ranks: tuple[dict, dict]) -> None:
    """Weights, averages and queue after three steps, every line of the log, and the evaluation."""
    one, two = (results[case] for results in ranks)
    for kind in ("weights", "averages", "queue"):
        errors = relative_errors(two[kind], one[kind])
        assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}
    assert bool(one["queue"]) == (case == "retrieval" or ("pretraining" in case and "contrast" not in case))
    names = {"loss", "grad_norm", "learning_rate", "temperature", "eval_loss", "loss_itc", "loss_itm", "loss_lm"}
    lines, others = (
        [{name: value for name, value in line.items() if name in names} for line in run["log"]] for run in (one, two)
    )
    assert len([line for line in lines if "loss" in line]) == 3
    assert "eval_loss" in lines[3]
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, rel=1e-4)


# Interruption


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "scripts.blip_resume", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", blip_resume.DEATHS)
def test_killed_and_resumed_equals_uninterrupted(runs: Path, name: str) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    uninterrupted = "whole answers" if name == "answers" else "whole"
    assert codes[uninterrupted] == [0]
    assert codes[name] == [-9, 0]
    whole, resumed = (runs / run / f"checkpoint-{blip_resume.STEPS}" for run in (uninterrupted, name))
    names = "step loss loss_itc loss_itm loss_lm grad_norm learning_rate temperature eval_loss".split()
    lines, others = (
        [
            {name: line[name] for name in names if name in line}
            for line in json.loads((run / "trainer_state.json").read_text())["log_history"]
        ]
        for run in (whole, resumed)
    )
    assert others == lines
    assert len({line["loss"] for line in lines if "loss" in line}) == blip_resume.STEPS
    files = ["model.safetensors"] + [MOMENTUM_NAME] * (name != "answers")
    for file in files:
        assert equal(load_file(resumed / file), load_file(whole / file)), file
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(run / file, weights_only=False) for run in (resumed, whole)]
        assert equal(*states), file
