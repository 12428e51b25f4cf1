"""Pairs and collators: what is random follows from seed, epoch and row; ids; cached features; clear errors."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from cases import tiny
from hf_vlm.data.batches.collators import ContrastiveCollator, pair_id
from hf_vlm.data.batches.pairs import PairDataset, PairStream
from scripts import tiny_training

NUM_ROWS = 24


def chosen(pairs: PairDataset, epoch: int, rows: list[int] | None = None) -> list[tuple[str, int]]:
    pairs.set_epoch(epoch)
    return [(pairs[i]["caption"], pairs[i]["seed"]) for i in (rows or range(len(pairs)))]


# Pairs


def test_choices_follow_from_seed_epoch_and_row() -> None:
    rows = tiny_training.rows(NUM_ROWS)
    pairs = PairDataset(rows, seed=1)
    first, second = chosen(pairs, 0), chosen(pairs, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    again = PairDataset(rows, seed=1)
    backwards = list(reversed(range(NUM_ROWS)))
    assert chosen(again, 1, backwards) == second[::-1]  # in whatever order, and after whatever epoch
    assert chosen(again, 0) == first
    assert len({seed for _, seed in [*first, *second, *chosen(PairDataset(rows, seed=2), 0)]}) == 3 * NUM_ROWS
    captions = [caption for caption, _ in first]
    assert captions != [caption for caption, _ in second]
    taken = {row["caption"].index(caption) for row, caption in zip(rows, captions, strict=True)}
    assert taken == {0, 1}


def test_captions_are_not_shuffled_for_evaluation() -> None:
    rows = tiny_training.rows(NUM_ROWS)
    pairs = PairDataset(rows, shuffle_captions=False)
    for epoch in (0, 1):
        assert [caption for caption, _ in chosen(pairs, epoch)] == [row["caption"][0] for row in rows]


def test_one_caption_may_be_a_string() -> None:
    pairs = PairDataset([{"image": tiny.image(), "caption": "a cat"}])
    assert pairs[0]["caption"] == "a cat"


def test_the_global_random_state_is_left_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    pairs = PairDataset(tiny_training.rows(4))
    tiny_training.collator(augment=True)([pairs[i] for i in range(4)])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def batches(workers: int, epoch: int, augment: bool = True) -> list[dict[str, torch.Tensor]]:
    pairs = PairDataset(tiny_training.rows(10), seed=1)
    pairs.set_epoch(epoch)
    return list(DataLoader(pairs, 4, num_workers=workers, collate_fn=tiny_training.collator(augment)))


def assert_equal_batches(some: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_do_not_depend_on_the_workers() -> None:
    here = batches(0, epoch=1)
    assert_equal_batches(batches(2, epoch=1), here)
    other_epoch = batches(0, epoch=0)
    assert not torch.equal(other_epoch[0]["pixel_values"], here[0]["pixel_values"])


def test_workers_that_persist_are_told_the_epoch() -> None:
    pairs = PairDataset(tiny_training.rows(10), seed=1)
    options = {"num_workers": 2, "persistent_workers": True}
    loader = DataLoader(pairs, 4, collate_fn=tiny_training.collator(augment=True), **options)
    for epoch in (0, 1, 5):
        pairs.set_epoch(epoch)
        assert_equal_batches(list(loader), batches(0, epoch))


# Streams


def indices(stream: PairStream, count: int, workers: int = 0) -> list[list[int]]:
    """The ids of the next `count` examples of a part of a stream in batches of one."""
    loader = DataLoader(stream, 1, num_workers=workers, collate_fn=lambda pairs: pairs[0])
    return [pair["id"] for pair in itertools.islice(loader, count)]


def numbered(count: int, shards: int) -> PairStream:
    rows = [{"image": tiny.image(seed=i), "caption": ["a cat", "a dog"], "id": i} for i in range(count)]
    return PairStream(Dataset.from_list(rows).to_iterable_dataset(shards), seed=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_each_pass_of_a_stream(workers: int) -> None:
    parts = [numbered(16, 8).split(rank, 2, workers) for rank in range(2)]
    passes = [[indices(part, 24, workers)[start : start + 8] for part in parts] for start in (0, 8, 16)]
    for one, other in passes:
        assert not set(one) & set(other)
    if workers == 0:  # workers go on to their next pass at different times
        assert all(sorted(one + other) == list(range(16)) for one, other in passes)
        assert passes[0] != passes[1]


def test_a_stream_that_is_not_split_ends() -> None:
    stream = numbered(5, 1)
    for _ in range(2):
        assert [pair["id"] for pair in stream] == list(range(5))


def test_more_workers_than_shards_do_not_hang() -> None:
    with_idle_worker = indices(numbered(4, 1).split(0, 1, 2), 6, workers=2)
    assert with_idle_worker == [0, 1, 2, 3, 0, 1]


def test_streams_choose_anew_in_each_pass_and_on_each_rank() -> None:
    def seeds(rank: int) -> list[int]:
        return [pair["seed"] for pair in itertools.islice(numbered(8, 2).split(rank, 2, 0), 12)]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 24


# Ids


def test_pair_ids_do_not_depend_on_the_process() -> None:
    """Numbers stand for themselves; what stands for anything else is the same in every run and on every rank."""
    assert [pair_id(value) for value in (7, -1, np.int64(7))] == [7, -1, 7]
    assert pair_id("a") == 7756545803482942747
    assert pair_id("é") == 505767047613546004
    assert pair_id(("x", 1)) == 160721440523104914
    assert pair_id(2**70) == 6226359451302992007  # too large for a tensor


def test_equal_captions_are_positives_where_there_are_no_ids() -> None:
    rows = [{"image": tiny.image(seed=i), "caption": text} for i, text in enumerate(["a cat", "a dog", "a cat"])]
    for each in (rows, [{**row, "id": None} for row in rows]):  # a column of ids may have holes
        pairs = PairDataset(each)
        first, second, third = tiny_training.collator()([pairs[i] for i in range(3)])["pair_ids"].tolist()
        assert first == third != second


# Cached features


def pairs_of(captions: list[str]) -> list[dict]:
    pairs = PairDataset([{"image": tiny.image(seed=i), "caption": text} for i, text in enumerate(captions)])
    return [pairs[i] for i in range(len(captions))]


def test_cached_texts_are_used_only_if_all_are_there() -> None:
    features = {"a cat": torch.ones(3), "a dog": torch.zeros(3)}
    collator = tiny_training.collator(text_features=features)
    batch = collator(pairs_of(["a dog", "a cat"]))
    assert batch.keys() == {"pixel_values", "text_features", "pair_ids"}
    assert batch["text_features"].tolist() == [[0, 0, 0], [1, 1, 1]]
    batch = collator(pairs_of(["a dog", "a tree"]))
    assert batch.keys() == {"pixel_values", "input_ids", "attention_mask", "pair_ids"}


def test_cached_images_are_those_of_the_rows() -> None:
    features = torch.arange(8.0).view(4, 2)
    collator = tiny_training.collator(vision_features=features)
    pairs = PairDataset(tiny_training.rows(4))
    batch = collator([pairs[2], pairs[0]])
    assert batch.keys() == {"vision_features", "input_ids", "attention_mask", "pair_ids"}
    assert batch["vision_features"].tolist() == [[4, 5], [0, 1]]


def test_cached_images_are_not_augmented() -> None:
    with pytest.raises(ValueError, match="cannot be augmented"):
        tiny_training.collator(augment=True, vision_features=torch.zeros(4, 2))


# Images and captions


def test_captions_are_padded_to_the_longest_of_the_batch() -> None:
    batch = tiny_training.collator()(pairs_of(["a cat", "the red dog and the tree"]))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 8]


def test_without_augmentation_pictures_are_the_processors() -> None:
    pairs = pairs_of(["a cat", "a dog"])
    expected = tiny.clip_processor()(images=[pair["image"] for pair in pairs])["pixel_values"]
    assert torch.equal(ContrastiveCollator(tiny.clip_processor())(pairs)["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "LA", "1", "I;16"])
def test_augmented_pictures_of_any_mode_have_the_processors_scale(mode: str) -> None:
    picture = tiny.image().convert("L" if mode == "I;16" else "RGB").convert(mode)
    pairs = PairDataset([{"image": picture, "caption": "a cat"}])
    pixels = tiny_training.collator(augment=True)([pairs[0]])["pixel_values"]
    processor = tiny.clip_processor().image_processor
    mean, std = torch.tensor(processor.image_mean).view(3, 1, 1), torch.tensor(processor.image_std).view(3, 1, 1)
    assert pixels.shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    restored = pixels[0] * std + mean
    assert restored.min() >= -1e-5
    assert restored.max() <= 1 + 1e-5


@pytest.mark.parametrize("caption", ["", "  ", [], ["a cat", " "], None, ["a cat", None]])
def test_empty_caption_names_the_row(caption: str | list | None) -> None:
    rows = [*tiny_training.rows(3), {"image": tiny.image(), "caption": caption}]
    with pytest.raises(ValueError, match="Row 3 has an empty caption"):
        PairDataset(rows)[3]


def test_bad_image_names_the_row() -> None:
    pairs = PairDataset([*tiny_training.rows(2), {"image": b"not an image", "caption": "a cat"}])
    with pytest.raises(ValueError, match="row 2"):
        tiny_training.collator()([pairs[2]])
