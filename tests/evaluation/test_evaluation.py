"""Metrics against brute force (ranks by sorting, ties by every order that sorting allows), closed forms, simulation."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

from hf_vlm.evaluation import (
    PROMPTS,
    chance,
    class_prompts,
    hard_negative_metrics,
    retrieval_metrics,
    similarity_metrics,
    zero_shot_classifier,
    zero_shot_metrics,
)
from hf_vlm.metrics.retrieval import first_matches


def brute_force_ranks(scores: np.ndarray, query_ids: list[int], candidate_ids: list[int]) -> np.ndarray:
    """Rank of the first match of each query, `(queries,)`, by sorting; for scores without ties."""
    ranks = []
    for row, query_id in zip(scores, query_ids, strict=True):
        ordered = [candidate_ids[column] for column in sorted(range(len(row)), key=lambda column: -row[column])]
        ranks.append(ordered.index(query_id) + 1)
    return np.array(ranks)


def brute_force_expectation(row: np.ndarray, is_match: list[bool], ks: list[int]) -> tuple[list[float], float]:
    """Hit rates and mean reciprocal rank of one query over every order that sorting by score allows."""
    ranks = []
    for order in permutations(range(len(row))):
        if all(row[a] >= row[b] for a, b in pairwise(order)):
            ranks.append(1 + next(place for place, column in enumerate(order) if is_match[column]))
    return [float(np.mean(np.array(ranks) <= k)) for k in ks], float(np.mean(1 / np.array(ranks)))


def random_case(seed: int, images: int = 23, captions: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text_to_image = torch.cat(
        [torch.arange(images), torch.randint(images, (images * (captions - 1),), generator=generator)]
    )
    image_embeds = torch.randn(images, 8, generator=generator)
    noise = torch.randn(len(text_to_image), 8, generator=generator)
    return image_embeds, image_embeds[text_to_image] + 1.5 * noise, text_to_image


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("image_ids", [None, [row % 20 for row in range(23)]])
def test_retrieval_equals_brute_force(seed: int, image_ids: list[int] | None) -> None:
    image_embeds, text_embeds, text_to_image = random_case(seed)
    if image_ids is not None:
        text_to_image = text_to_image % 20
    metrics = retrieval_metrics(image_embeds, text_embeds, text_to_image, image_ids, chunk=7)

    units = [
        embeds.numpy() / np.linalg.norm(embeds.numpy(), axis=1, keepdims=True) for embeds in (image_embeds, text_embeds)
    ]
    scores = units[0] @ units[1].T
    ids, text_ids = image_ids or list(range(23)), text_to_image.tolist()
    recalls = []
    directions = {"image_to_text": (scores, ids, text_ids), "text_to_image": (scores.T, text_ids, ids)}
    for direction, (rows, queries, candidates) in directions.items():
        ranks = brute_force_ranks(rows, queries, candidates)
        for k in (1, 5, 10):
            assert metrics[f"{direction}_r{k}"] == pytest.approx(np.mean(ranks <= k))
            recalls.append(np.mean(ranks <= k))
        assert metrics[f"{direction}_median_rank"] == np.percentile(ranks, 50, method="inverted_cdf")
        assert metrics[f"{direction}_mrr"] == pytest.approx(np.mean(1 / ranks))
    assert metrics["mean_recall"] == pytest.approx(np.mean(recalls))
    assert 0.1 < metrics["mean_recall"] < 0.95
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("seed", range(5))
def test_ties_are_the_exact_mean_over_all_orders(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, size=(4, 7)).astype(np.float32)
    text_to_image = np.array([0, 1, 2, 3, 0, 0, 1])
    metrics = similarity_metrics(scores, text_to_image, ks=(1, 2, 4))
    for direction, rows, match in (
        ("image_to_text", scores, np.arange(4)[:, None] == text_to_image),
        ("text_to_image", scores.T, text_to_image[:, None] == np.arange(4)),
    ):
        expected = [
            brute_force_expectation(row, list(is_match), [1, 2, 4]) for row, is_match in zip(rows, match, strict=True)
        ]
        for place, k in enumerate((1, 2, 4)):
            assert metrics[f"{direction}_r{k}"] == pytest.approx(
                np.mean([hits[place] for hits, _ in expected]), abs=1e-9
            )
        assert metrics[f"{direction}_mrr"] == pytest.approx(np.mean([mrr for _, mrr in expected]), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_embeddings_score_chance(value: float) -> None:
    text_to_image = torch.arange(40).repeat_interleave(5)
    metrics = retrieval_metrics(torch.full((40, 385), value), torch.full((200, 385), value), text_to_image, chunk=33)
    assert metrics == pytest.approx(chance(text_to_image), abs=1e-9)
    # Closed forms: one match of 40; any of 5 matches of 200.
    assert metrics["text_to_image_r10"] == pytest.approx(10 / 40)
    assert metrics["image_to_text_r1"] == pytest.approx(5 / 200)
    assert metrics["image_to_text_r5"] == pytest.approx(1 - np.prod([(195 - i) / (200 - i) for i in range(5)]))
    assert metrics["text_to_image_median_rank"] == 20
    assert metrics["text_to_image_mrr"] == pytest.approx(np.mean(1 / np.arange(1, 41)))


def test_rounding_noise_does_not_break_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, 64, generator=generator)
    images = vector + 1e-6 * torch.randn(30, 64, generator=generator)
    assert len(torch.unique(images @ vector.T)) > 1
    metrics = retrieval_metrics(images, vector.expand(30, -1), torch.arange(30))
    assert metrics == pytest.approx(chance(torch.arange(30)), abs=1e-9)


def test_chance_equals_simulation() -> None:
    image_ids = torch.tensor([0, 1, 2, 3, 3, 4, 4, 4, 5, 6])
    text_to_image = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 6, 0, 4])
    generator = torch.Generator().manual_seed(0)
    runs = [
        similarity_metrics(torch.rand(10, 13, generator=generator), text_to_image, image_ids, ks=(1, 5))
        for _ in range(1500)
    ]
    expected = chance(text_to_image, image_ids, ks=(1, 5))
    assert expected.keys() == runs[0].keys()
    for key, value in expected.items():
        if "median" not in key:
            samples = np.array([run[key] for run in runs])
            assert abs(samples.mean() - value) < 4.5 * samples.std() / len(runs) ** 0.5, key


def test_chance_median_rank_of_several_captions() -> None:
    # The smallest k at which half the images have one of their 5 captions among the first k of 200: not the mean rank.
    misses = {k: np.prod([(200 - k - i) / (200 - i) for i in range(5)]) for k in range(1, 100)}
    expected = min(k for k, miss in misses.items() if miss <= 0.5)
    assert chance(torch.arange(40).repeat_interleave(5))["image_to_text_median_rank"] == expected == 26


def test_any_caption_hits_and_one_image_is_certain() -> None:
    # Image 0: its second caption comes first. Image 1: its captions come third and fourth.
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.9, 0.8, 0.7, 0.6]])
    metrics = similarity_metrics(scores, [0, 0, 1, 1], ks=(1, 2, 3))
    assert [metrics[f"image_to_text_r{k}"] for k in (1, 2, 3)] == [0.5, 0.5, 1.0]
    assert [metrics[f"text_to_image_r{k}"] for k in (1, 2, 3)] == [0.75, 1.0, 1.0]
    assert metrics["image_to_text_mrr"] == pytest.approx((1 + 1 / 3) / 2)
    single = retrieval_metrics(torch.ones(1, 4), torch.randn(3, 4), [0, 0, 0])
    assert all(value == 1.0 for value in single.values())


def test_reranked_scores_of_each_direction() -> None:
    # Only two pairs a row are scored; the unscored ones tie behind them.
    inf = torch.inf
    by_image = torch.tensor([[2.0, 1.0, -inf, -inf], [-inf, 5.0, 4.0, -inf]])
    by_text = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    metrics = similarity_metrics(by_image, [0, 0, 1, 1], text_similarity=by_text, ks=(1, 2))
    assert metrics["image_to_text_r1"] == 0.5
    assert metrics["image_to_text_r2"] == 1.0
    assert metrics["text_to_image_r1"] == 0.25
    # Matches of image 1 are both unscored: behind one scored text, two of the three that tie match.
    metrics = similarity_metrics(
        torch.tensor([[2.0, 1.0, -inf, -inf], [-inf, 5.0, -inf, -inf]]), [0, 0, 1, 1], ks=(1, 2)
    )
    assert metrics["image_to_text_r2"] == pytest.approx((1 + 2 / 3) / 2)


def test_dtypes_and_chunks_agree() -> None:
    image_embeds, text_embeds, text_to_image = random_case(0)
    image_embeds, text_embeds = image_embeds.bfloat16(), text_embeds.bfloat16()
    expected = retrieval_metrics(image_embeds.float().numpy(), text_embeds.double().numpy(), text_to_image.numpy())
    for chunk in (1, 10, 1000):
        assert retrieval_metrics(image_embeds, text_embeds, text_to_image.tolist(), chunk=chunk) == expected
    # Scaling a row changes nothing.
    assert retrieval_metrics(image_embeds * 4, text_embeds, text_to_image) == expected


def test_scores_are_asked_for_in_chunks() -> None:
    scores, asked = torch.rand(10, 6), []

    def rows_of_scores(rows: slice) -> torch.Tensor:
        asked.append(len(scores[rows]))
        return scores[rows]

    ids = torch.arange(10) % 6
    chunked = first_matches(rows_of_scores, ids, torch.arange(6), 4, 0.0)
    assert asked == [4, 4, 2]
    assert torch.equal(chunked, first_matches(lambda rows: scores[rows], ids, torch.arange(6), 10, 0.0))


def test_retrieval_refuses_bad_input() -> None:
    images, texts, ids = torch.randn(3, 4), torch.randn(4, 4), [0, 1, 2, 2]
    broken = texts.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"text_embeds: NaN or infinity in 1 of 4 rows, first row 2"):
        retrieval_metrics(images, broken, ids)
    with pytest.raises(ValueError, match=r"image_embeds: NaN or infinity in 3 of 3 rows, first row 0"):
        retrieval_metrics(images * torch.inf, texts, ids)
    with pytest.raises(ValueError, match=r"similarity: NaN in 1 of 3 rows, first row 1"):
        similarity_metrics(torch.tensor([[0.0] * 4, [0.0, torch.nan, 0.0, 0.0], [0.0] * 4]), ids)
    with pytest.raises(ValueError, match=r"1 texts have no image with the same id, first text 3 \(id 7\)"):
        retrieval_metrics(images, texts, [0, 1, 2, 7])
    with pytest.raises(ValueError, match=r"1 images have no text with the same id, first image 1 \(id 1\)"):
        retrieval_metrics(images, texts, [0, 0, 2, 2])
    with pytest.raises(ValueError, match=r"3 images and 4 texts, but 3 image ids and 3 text ids"):
        retrieval_metrics(images, texts, [0, 1, 2])
    with pytest.raises(ValueError, match=r"size 4, text_embeds 3"):
        retrieval_metrics(images, texts[:, :3], ids)
    with pytest.raises(ValueError, match=r"text_to_image must be a non-empty list of integers, got torch.float32"):
        retrieval_metrics(images, texts, torch.tensor([0.0, 1.0, 2.0, 2.0]))
    with pytest.raises(ValueError, match=r"k >= 1, got 0"):
        retrieval_metrics(images, texts, ids, ks=(0,))
    with pytest.raises(ValueError, match=r"text_similarity has shape \(3, 4\), expected \(4, 3\)"):
        similarity_metrics(torch.zeros(3, 4), ids, text_similarity=torch.zeros(3, 4))


def test_zero_shot_classifier_is_the_mean_of_units() -> None:
    embeds = np.random.default_rng(0).normal(size=(5, 3, 6)) * np.array([1.0, 10.0, 100.0])[:, None]
    expected = np.stack([sum(row / np.linalg.norm(row) for row in prompts) for prompts in embeds])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(zero_shot_classifier(embeds).numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(classes, templates, size\), got \(5, 6\)"):
        zero_shot_classifier(embeds[:, 0])


def test_zero_shot_metrics_equal_loops() -> None:
    generator = np.random.default_rng(0)
    classes, labels = (
        generator.normal(size=(9, 6)),
        generator.choice(7, size=50, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05]),
    )
    images = classes[labels] + 1.5 * generator.normal(size=(50, 6))
    cosines = images @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
    ranked = np.argsort(-cosines, axis=1)
    top1 = ranked[:, 0] == labels
    metrics = zero_shot_metrics(torch.tensor(images), classes, labels, chunk=16)
    assert metrics["top1"] == pytest.approx(top1.mean())
    assert metrics["top5"] == pytest.approx(
        np.mean([label in row[:5] for label, row in zip(labels, ranked, strict=True)])
    )
    per_class = [top1[labels == label].mean() for label in np.unique(labels)]
    assert metrics["mean_per_class_accuracy"] == pytest.approx(np.mean(per_class))
    assert 0.2 < metrics["top1"] < metrics["top5"] < 1


def test_zero_shot_ties_and_bad_labels() -> None:
    metrics = zero_shot_metrics(torch.randn(10, 4), torch.ones(8, 4), [3] * 10)
    assert metrics == pytest.approx({"top1": 1 / 8, "top5": 5 / 8, "mean_per_class_accuracy": 1 / 8})
    with pytest.raises(ValueError, match=r"label 8 of image 1 is not one of the 8 classes"):
        zero_shot_metrics(torch.randn(2, 4), torch.ones(8, 4), [0, 8])
    with pytest.raises(ValueError, match=r"labels must be 2 integers, got torch.int64 of shape \(3,\)"):
        zero_shot_metrics(torch.randn(2, 4), torch.ones(8, 4), [0, 1, 2])


def test_class_prompts() -> None:
    assert class_prompts(["rice", "a {brace}"], ("{}", "see {}")) == ["rice", "see rice", "a {brace}", "see a {brace}"]
    assert len(set(class_prompts(["an apple", "rice"]))) == 2 * len(PROMPTS)
    with pytest.raises(ValueError, match=r"'a picture' has no \{\}"):
        class_prompts(["rice"], ["a picture"])


def test_hard_negatives_by_hand() -> None:
    metrics = hard_negative_metrics(
        [0.9, 0.1, 0.5, 0.7], np.array([0.2, 0.3, 0.5, 0.6]), ["left", "left", "left", "colour"]
    )
    assert metrics == pytest.approx(
        {
            "accuracy": 2.5 / 4,
            "macro_accuracy": (1.5 / 3 + 1) / 2,
            "pairs": 4,
            "accuracy_left": 0.5,
            "accuracy_colour": 1,
            "pairs_left": 3,
            "pairs_colour": 1,
        }
    )
    assert hard_negative_metrics([1.0], [1.0 - 1e-9], ["left"])["accuracy"] == 1
    assert hard_negative_metrics([1.0], [1.0 - 1e-9], ["left"], tie_tolerance=1e-6)["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"1 of 2 pairs have a NaN score, first pair 1"):
        hard_negative_metrics([1.0, 1.0], [0.0, float("nan")], ["left", "left"])
    with pytest.raises(ValueError, match=r"got shapes \(2,\), \(1,\) and 2 kinds"):
        hard_negative_metrics([1.0, 1.0], [0.0], ["left", "left"])
