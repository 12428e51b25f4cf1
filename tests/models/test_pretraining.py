"""The objectives that BLIP and BLIP-2 share, by hand: their sums and counts, their total, the texts of matching."""

import pytest
import torch

from hf_vlm.models.pretraining import check_pairs, matching_part, matching_texts, mean_of, total_loss, with_count


def test_total_is_the_weighted_sum_of_the_losses_that_were_computed() -> None:
    losses = {"itc": torch.tensor(2.0, requires_grad=True), "itm": None, "lm": torch.tensor(3.0)}
    total = total_loss(losses, {"itc": 0.25, "itm": 7.0, "lm": 2.0})
    total.backward()
    assert total.item() == 6.5
    assert losses["itc"].grad.item() == 0.25


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of all losses are 0 \(itc, itm\): give one of them a positive weight"):
        total_loss({"itc": None, "itm": None}, {"itc": 0.0, "itm": 0.0})


def test_mean_of_sum_and_count() -> None:
    assert mean_of(with_count(torch.tensor(1.5), 4)).item() == 1.5
    assert mean_of(torch.tensor([0.0, 0.0])).item() == 0.0


def test_matching_leaves_rows_without_a_negative_out() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [9.0, 9.0]])
    part = matching_part(logits, torch.tensor([True, True, False]))
    pair, negative = torch.tensor([-1.0, 1.0]).exp().log1p()  # log(1 + exp(-1)) for the match, log(1 + e) for the other
    torch.testing.assert_close(part, torch.stack([pair + negative, torch.tensor(2.0)]))


def test_texts_of_matching_come_as_pairs_then_twice_for_the_negatives() -> None:
    ids, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [1, 0]])
    texts, masks = matching_texts(ids, mask, torch.tensor([1, 0]), pad_token_id=0)
    assert texts.tolist() == [[1, 2], [3, 0], [1, 2], [3, 0], [3, 0], [1, 2]]
    assert torch.equal(masks, (texts != 0).long())


def test_a_loss_needs_pairs() -> None:
    with pytest.raises(ValueError, match="needs pairs, not 2 images and 3 texts"):
        check_pairs(2, 3)
