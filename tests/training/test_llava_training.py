"""LLaVA's trainer: how a batch is split, TRL's own loss, nothing to learn, ranks, and what each stage trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTTrainer

from hf_vlm.data import ConversationCollator
from hf_vlm.training import STAGES
from processes import torchrun
from scripts import llava_trainer_steps, llava_training
from scripts.llava_training import ONE_GRADIENT, SPLITS

Weights = dict[str, torch.Tensor]
WAYS = [(anyres, packed) for anyres in (False, True) for packed in (False, True)]
WAY_NAMES = [f"{'tiles' if anyres else 'one view'}, {'packed' if packed else 'padded'}" for anyres, packed in WAYS]


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def moved(before: Weights, module: nn.Module) -> Weights:
    """What plain gradient descent at rate 1 took off the weights that are trained: the gradient."""
    return {name: before[name] - value.detach() for name, value in module.named_parameters() if value.requires_grad}


def assert_same_step(found: Weights, expected: Weights) -> None:
    """To a relative 1e-4, and to the precision with which a weight can move."""
    assert found.keys() == expected.keys()
    assert all(step.isfinite().all() for step in found.values())
    assert max(step.norm() for step in expected.values()) > 0.01
    errors = {name: (found[name] - step).norm() - 1e-4 * step.norm() for name, step in expected.items()}
    assert {name: float(error) for name, error in errors.items() if not error <= 1e-5} == {}


def one_by_one(model: PreTrainedModel, collator: ConversationCollator, rows: list[dict]) -> tuple[float, Weights]:
    """Loss and gradients of rows that are read alone, without padding: a mean over all of their supervised tokens.

    By transformers' usual path: logits at every position, and torch's cross-entropy of them.
    """
    batches = [collator([row]) for row in rows]
    labels = [batch.pop("labels")[:, 1:] for batch in batches]
    count = sum(int((one != -100).sum()) for one in labels)
    total = sum(
        cross_entropy(model(**batch).logits[0, :-1], one[0], reduction="sum")
        for batch, one in zip(batches, labels, strict=True)
    )
    (total / count).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    return total.item() / count, gradients


def a_step(folder: Path, model: PreTrainedModel, **options) -> tuple[list[float], Weights]:
    """The losses and the gradient of one step of the trainer; for the options, see `llava_training.trainer`."""
    before = weights(model)
    trainer = llava_training.trainer(folder, model, **{"max_steps": 1, **ONE_GRADIENT, **options})
    trainer.train()
    return llava_training.losses(trainer), moved(before, model)


def test_a_checkpoint_leaves_the_model_card_alone(tmp_path: Path) -> None:
    """TRL's own trainer writes README.md at every save."""
    card = tmp_path / "README.md"
    card.write_text("our card")
    model = llava_training.staged("llava-1.5-align")
    llava_training.trainer(tmp_path, model, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-1").is_dir()
    assert card.read_text() == "our card"


# --- how a batch is split


@pytest.mark.parametrize(("anyres", "packed"), WAYS, ids=WAY_NAMES)
def test_how_a_batch_is_split_changes_nothing(anyres: bool, packed: bool, tmp_path: Path) -> None:
    """Eight rows with one image, two, or none: every split takes the step of the rows read one by one.

    Also when activations are recomputed.
    """
    rows, collator = llava_training.rows(), llava_training.collator(anyres, packed)
    assert {len(row["images"]) for row in rows} == {0, 1, 2}
    assert len({int((collator([row])["labels"] != -100).sum()) for row in rows}) == 8
    model = llava_training.staged("llava-1.6-instruct", anyres=anyres)
    start = model.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    loss, expected = one_by_one(model, llava_training.collator(anyres), rows)
    for size, micro_batches in SPLITS:
        model.load_state_dict(start)
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        split["activation_checkpointing"] = size == 4
        losses, step = a_step(tmp_path, model, train_rows=rows, data_collator=collator, **split)
        assert losses == pytest.approx([loss], rel=1e-5)
        assert_same_step(step, expected)


def test_how_a_batch_is_split_changes_nothing_of_lora(tmp_path: Path) -> None:
    model = llava_training.staged("llava-1.5-lora", anyres=True, lora_dropout=0.0)
    start = weights(model)
    loss, expected = one_by_one(model, llava_training.collator(True), llava_training.rows())
    for size, micro_batches in SPLITS:
        model.load_state_dict(start, strict=False)
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        split["activation_checkpointing"] = size == 4
        losses, step = a_step(tmp_path, model, **split)
        assert losses == pytest.approx([loss], rel=1e-5)
        assert_same_step(step, expected)


LLMS = ["llama", "llama, tied", "qwen2", "opt", "gemma2", "granite", "cohere"]


@pytest.mark.parametrize("llm", LLMS)
def test_a_packed_step_is_that_of_the_rows_one_by_one(llm: str, tmp_path: Path) -> None:
    """With each kind of positions, attention and logits that an LLM may have."""
    model, collator = llava_training.staged("llava-1.5-instruct", llm=llm), llava_training.collator(packed=True)
    if llm == "opt":
        with pytest.raises(ValueError, match="opt LLM does not keep the samples of a packed row apart: set packed"):
            llava_training.trainer(tmp_path, model, data_collator=collator)
        return
    loss, expected = one_by_one(model, llava_training.collator(), llava_training.rows())
    losses, step = a_step(tmp_path, model, data_collator=collator, per_device_train_batch_size=8)
    assert losses == pytest.approx([loss], rel=1e-5)
    assert_same_step(step, expected)


# --- TRL's own loss


@pytest.mark.parametrize(("llm", "packed"), [*((llm, False) for llm in LLMS), ("llama", True), ("granite", True)])
def test_trl_has_the_same_loss(llm: str, packed: bool, tmp_path: Path) -> None:
    """It makes its logits itself, of the states of our base model; scaled and soft-capped ones as well."""
    steps = []
    for kind in (llava_training.VlmSFTTrainer, SFTTrainer):
        torch.manual_seed(0)
        model = llava_training.staged("llava-1.5-instruct", llm=llm)
        split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        steps.append(a_step(tmp_path, model, kind=kind, data_collator=llava_training.collator(packed=packed), **split))
    (own_loss, own), (trl_loss, trl) = steps
    assert own_loss == pytest.approx(trl_loss, rel=1e-5)
    assert_same_step(own, trl)


def test_trl_has_the_same_loss_of_lora(tmp_path: Path) -> None:
    steps = []
    for kind in (llava_training.VlmSFTTrainer, SFTTrainer):
        torch.manual_seed(0)
        model = llava_training.staged("llava-1.5-lora", anyres=True, lora_dropout=0.0)
        steps.append(a_step(tmp_path, model, kind=kind))
    (own_loss, own), (trl_loss, trl) = steps
    assert own_loss == pytest.approx(trl_loss, rel=1e-5)
    assert_same_step(own, trl)


# --- nothing to learn


def silent(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what the assistant says."""
    return [{**row, "messages": [m for m in row["messages"] if m["role"] == "user"][:1]} for row in rows]


@pytest.mark.parametrize(
    ("stage", "anyres", "packed"),
    [("llava-1.5-instruct", False, False), ("llava-1.6-instruct", True, True), ("llava-1.5-lora", True, False)],
)
def test_nothing_to_learn_is_a_loss_of_zero(stage: str, anyres: bool, packed: bool, tmp_path: Path) -> None:
    model = llava_training.staged(stage, anyres=anyres)
    before = weights(model)
    trainer = llava_training.trainer(
        tmp_path, model, stage, silent(llava_training.rows()), llava_training.collator(anyres, packed)
    )
    trainer.train()
    assert llava_training.losses(trainer) == [0.0] * 3
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_answers_that_are_cut_off_teach_nothing(tmp_path: Path) -> None:
    """What is left of a sample that is too long ends before its answer."""
    rows = [row for row in llava_training.rows() if len(row["images"]) == 1]
    model, collator = llava_training.staged("llava-1.5-instruct"), llava_training.collator(max_length=20)
    assert not (collator(rows)["labels"] != -100).any()
    losses, step = a_step(tmp_path, model, train_rows=rows, data_collator=collator)
    assert losses == [0.0]
    assert not any(change.any() for change in step.values())


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), torch.tensor(0.0)], ids=str)
def test_a_forward_of_nothing_to_learn_has_a_graph(items: int | torch.Tensor | None) -> None:
    model = llava_training.staged("llava-1.6-instruct", anyres=True).train()
    batch = llava_training.collator(True)(silent(llava_training.rows()))
    loss = model(**batch, num_items_in_batch=items).loss
    assert loss.item() == 0
    loss.backward()
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert not any(gradient is None or gradient.any() for gradient in trained.values())


def test_a_micro_batch_of_nothing_to_learn_changes_nothing(tmp_path: Path) -> None:
    """Four rows alone, and after four that teach nothing."""
    rows = llava_training.rows()
    steps = []
    for chosen in (rows[4:], silent(rows[:4]) + rows[4:]):
        torch.manual_seed(0)
        model = llava_training.staged("llava-1.6-instruct", anyres=True)
        split = {"gradient_accumulation_steps": len(chosen) // 4, "train_sampling_strategy": "sequential"}
        steps.append(a_step(tmp_path, model, train_rows=chosen, **split))
    (alone_loss, alone), (loss, step) = steps
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    assert_same_step(step, alone)


# --- ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What one process did, and what two ranks did of whose batches one has no images."""
    folder = tmp_path_factory.mktemp("ranks")
    one = llava_trainer_steps.main(folder)
    torchrun("llava_trainer_steps", folder)
    return one, torch.load(folder / "results-2.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", llava_trainer_steps.CASES)
def test_two_ranks_take_the_steps_of_one_process(case: str, ranks: tuple[dict, dict]) -> None:
    one, two = (results[case] for results in ranks)
    micro_batches = llava_trainer_steps.CASES[case][1]
    turns = [True] * micro_batches + [False] * micro_batches
    assert two["images"] == [turns, [not turn for turn in turns]]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert_same_step(two["moved"], one["moved"])


@pytest.mark.slow
def test_two_ranks_share_rows_that_are_grouped_by_length(ranks: tuple[dict, dict]) -> None:
    """All rows, none twice, in each epoch, although the ranks draw different numbers for dropout."""
    ((alone,), (first, second)) = (results["grouped by length"] for results in ranks)
    assert all(len(batch) == 2 for batch in alone + first + second)
    assert alone[:8] != alone[8:]
    for epoch in (alone[:8], alone[8:], first[:4] + second[:4], first[4:] + second[4:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(16))


# --- stages


class Watch(TrainerCallback):
    """Notes, while a step is under way, which parts are in training mode, and the rates of the optimiser."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.training: list[set[str]] = []
        self.rates: dict[nn.Parameter, float] = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.training.append({part_of(name) for name, module in self.model.named_modules() if module.training})
        self.rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def part_of(name: str) -> str:
    """The part of LLaVA that a parameter or module is in; "" above the parts."""
    names = name.split(".")
    return next((part for part in ("vision_model", "projector", "language_model") if part in names), "")


def is_trained(name: str, stage: str) -> bool:
    """Whether a stage trains the parameter of this name, as the papers say it."""
    part, is_lora = part_of(name), bool(STAGES[stage].lora)
    if part == "language_model" and is_lora:
        return "lora_" in name
    if part == "projector" and is_lora:
        return "modules_to_save" in name
    # Of the three layers of the tower the last is not read, nor the norm behind it.
    unread = any(word in name for word in ("layers.2.", "post_norm"))
    return part in STAGES[stage].rates and not unread


@pytest.mark.parametrize(
    ("stage", "anyres"),
    [*((stage, "1.6" in stage) for stage in STAGES), ("llava-1.5-lora", True), ("llava-1.5-instruct", True)],
)
def test_a_stage_moves_its_parts_at_their_rates(stage: str, anyres: bool, tmp_path: Path) -> None:
    """Three steps with dropout and weight decay: what has moved, at which rates, and what was in training mode."""
    model = llava_training.staged(stage, anyres=anyres, dropout=0.1)
    before, watch = weights(model), Watch(model)
    options = {"lr_scheduler_type": "constant", "weight_decay": 0.1, "learning_rate": 0.5}
    llava_training.trainer(tmp_path, model, stage, callbacks=[watch], **options).train()
    after = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    expected = {name for name in before if is_trained(name, stage)}
    assert sorted(changed ^ expected) == []
    assert any(name.endswith("newline") for name in changed) == anyres
    assert {part_of(name) for name in changed} == set(STAGES[stage].rates)
    assert len(watch.rates) == len(expected)
    for name in expected:
        assert watch.rates[after[name]] == STAGES[stage].rates[part_of(name)], name
    assert len(watch.training) == 3
    assert all(parts - {""} == set(STAGES[stage].rates) for parts in watch.training)


def test_dropout_of_a_frozen_tower_and_llm_is_off() -> None:
    """In training mode, a stage that trains the projector alone gives the same loss twice; one that trains all does
    not.
    """
    batch = llava_training.collator(True)(llava_training.rows())
    for stage, is_random in (("llava-1.6-align", False), ("llava-1.6-instruct", True)):
        model = llava_training.staged(stage, anyres=True, dropout=0.1).train()
        first, second = (model(**batch).loss.item() for _ in range(2))
        assert (first != second) == is_random


@pytest.mark.parametrize("stage", ["llava-1.5-align", "llava-1.5-lora", "llava-1.6-instruct"])
def test_an_evaluation_leaves_training_as_it_is(stage: str, tmp_path: Path) -> None:
    """Its loss is that of the model in eval mode, without dropout; the next step trains its parts in training mode."""
    model = llava_training.staged(stage, anyres=True, dropout=0.1)
    collator = llava_training.collator(True)
    watch, options = Watch(model), {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = llava_training.trainer(
        tmp_path, model, eval_rows=llava_training.rows(), callbacks=[watch], data_collator=collator, **options
    )
    trainer.train()
    found = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    with torch.no_grad():
        expected = float(model.eval()(**collator(llava_training.rows())).loss)
    assert found == pytest.approx([expected] * 3, rel=1e-5)
    assert all(parts - {""} == set(STAGES[stage].rates) for parts in watch.training)
