"""Two ranks with half of the batch each do what one process does with all of it.

A torchrun of two gloo ranks does all cases at once, and this process, without process group, does them alone.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from processes import relative_errors, torchrun
from scripts import distributed_steps

Results = dict[tuple[str, ...], dict]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = distributed_steps.main(tmp_path_factory.mktemp("one"))
    assert not dist.is_initialized()
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("two")
    torchrun("distributed_steps", folder)
    return torch.load(folder / "results-2.pt", weights_only=False)


@pytest.mark.parametrize("case", distributed_steps.CASES, ids=", ".join)
def test_gradients_of_every_parameter(case: tuple[str, ...], one_rank: Results, two_ranks: Results) -> None:
    errors = relative_errors(two_ranks[case], one_rank[case])
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    assert ("similarity.logit_bias" in errors) == (case[0] == "sigmoid")


@pytest.mark.parametrize("case", distributed_steps.BLIP_CASES, ids=", ".join)
def test_blip_losses_gradients_and_queue(case: tuple[str, ...], one_rank: Results, two_ranks: Results) -> None:
    """Hard negatives come from the other rank too (with one pair a rank, only from there); texts are of unequal length
    on the two ranks, and padded to the longest of each.
    """
    one, two = one_rank[case], two_ranks[case]
    assert two.pop("longest text") < one.pop("longest text")
    errors = relative_errors(two, one)
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    count = int(case[3].split()[0])
    assert one["queue"].shape == (min(12, 2 * count), 32)
    assert one["loss_itm"] > 0
    assert ("loss_lm" in one) == (case[1] == "pretraining")


@pytest.mark.parametrize("ids", ["ids", "no ids"])
def test_hard_negatives_do_not_depend_on_the_ranks(ids: str, one_rank: Results, two_ranks: Results) -> None:
    one, two = one_rank["negatives", ids]["rows"], two_ranks["negatives", ids]["rows"]
    assert torch.equal(one, two)
    assert one.shape == (8, 50)
    assert one.unique().numel() == 8


@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ids", ["ids", "no ids"])
def test_cached_and_blocked_gradients_are_the_plain_ones(loss_type: str, ids: str, one_rank: Results) -> None:
    plain = one_rank[loss_type, ids, "plain"]
    for way in ("cached", "blocks"):
        errors = relative_errors(one_rank[loss_type, ids, way], plain)
        assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_ids_matter(loss_type: str, one_rank: Results) -> None:
    losses = [one_rank[loss_type, ids, "plain"]["loss"] for ids in ("ids", "no ids")]
    assert abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize("way", ["plain", "cached"])
@pytest.mark.parametrize("loss_type", ["softmax", "sigmoid"])
def test_trainer_ends_with_the_same_weights(loss_type: str, way: str, one_rank: Results, two_ranks: Results) -> None:
    """Five steps over an epoch's end, with other captions in the second epoch."""
    one, two = one_rank[loss_type, way], two_ranks[loss_type, way]
    errors = relative_errors(two["weights"], one["weights"])
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert len(one["loss"]) == 5


def test_ranks_see_disjoint_rows_in_the_order_of_one_rank(one_rank: Results, two_ranks: Results) -> None:
    (alone,) = one_rank["softmax", "plain"]["rows"]
    first, second = two_ranks["softmax", "plain"]["rows"]
    assert [[*a, *b] for a, b in zip(first, second, strict=True)] == alone
    assert sorted(row for batch in alone[:3] for row in batch) == list(range(24))
    assert alone[:2] != alone[3:5]


def test_two_ranks_resume_in_the_second_epoch(two_ranks: Results) -> None:
    """From a checkpoint of the fourth of five steps, with dropout: the same rows and the same weights, bit by bit."""
    whole, resumed = two_ranks["whole",], two_ranks["resumed",]
    for rank in range(2):
        assert resumed["rows"][rank][0] == whole["rows"][rank][4]
    assert resumed["loss"] == whole["loss"]
    assert all(torch.equal(value, whole["weights"][name]) for name, value in resumed["weights"].items())


@pytest.mark.slow
def test_gradients_of_sharded_parameters(one_rank: Results, tmp_path: Path) -> None:
    """FSDP2, plain and by GradCache."""
    torchrun("sharded_steps", tmp_path)
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=False)
    assert len(sharded) == 4
    for (loss_type, _), actual in sharded.items():
        errors = relative_errors(actual, one_rank[loss_type, "ids", "plain"])
        assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
