"""Questions, captions and scenes for BLIP: what is random follows from seed, epoch and row; labels; clear errors."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cases import tiny
from hf_vlm import VlmBlipForQuestionAnswering
from hf_vlm.data import CaptionCollator, PairDataset, QuestionCollator, QuestionDataset, SceneRows, SceneStream
from hf_vlm.data.batches.questions import make_question, weigh_answers
from scripts import blip_training

NUM_ROWS = 24
PROMPT = "the left of "


def chosen(questions: QuestionDataset, epoch: int, rows: list[int] | None = None) -> list[tuple[str, int]]:
    questions.set_epoch(epoch)
    return [(questions[i]["question"], questions[i]["seed"]) for i in (rows or range(len(questions)))]


# Choices


def test_choices_follow_from_seed_epoch_and_row() -> None:
    rows = blip_training.rows(NUM_ROWS)
    questions = QuestionDataset(rows, seed=1)
    first, second = chosen(questions, 0), chosen(questions, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    again = QuestionDataset(rows, seed=1)
    backwards = list(reversed(range(NUM_ROWS)))
    assert chosen(again, 1, backwards) == second[::-1]  # in whatever order, and after whatever epoch
    assert chosen(again, 0) == first
    assert len({seed for _, seed in [*first, *second, *chosen(QuestionDataset(rows, seed=2), 0)]}) == 3 * NUM_ROWS
    texts = [text for text, _ in first]
    assert texts != [text for text, _ in second]
    asked = [[question["question"] for question in row["questions"]] for row in rows]
    assert {one.index(text) for one, text in zip(asked, texts, strict=True)} == {0, 1}


def test_batches_do_not_depend_on_workers_which_are_told_the_epoch() -> None:
    questions = blip_training.dataset(VlmBlipForQuestionAnswering, 10, seed=1)
    collator = blip_training.collator(VlmBlipForQuestionAnswering, augment=True)
    loader = DataLoader(questions, 4, num_workers=2, persistent_workers=True, collate_fn=collator)
    seen = []
    for epoch in (0, 3):
        questions.set_epoch(epoch)
        seen.append(list(loader))
        expected = DataLoader(questions, 4, collate_fn=collator)
        for batch, other in zip(seen[-1], expected, strict=True):
            assert batch.keys() == other.keys()
            assert all(torch.equal(batch[name], other[name]) for name in batch)
    assert not torch.equal(seen[0][0]["pixel_values"], seen[1][0]["pixel_values"])


def test_a_row_may_be_its_only_question() -> None:
    row = {"image": tiny.image(), "question": "a cat", "answer": ["red", "blue", "red", "red"]}
    for epoch in range(3):
        question = make_question(row, 4, 0, epoch)
        assert (question["question"], question["answers"], question["index"]) == ("a cat", ["red", "blue"], 4)
        assert question["weights"] == [0.75, 0.25]


@pytest.mark.parametrize("answers", ["red", ["red"], ["red", "blue"] * 3, ["a", "b", "a", "c", "a", "d", "e"]])
def test_weights_are_shares_of_people(answers: str | list[str]) -> None:
    texts, weights = weigh_answers(answers)
    said = [answers] if isinstance(answers, str) else answers
    assert sum(weights) == pytest.approx(1)
    assert weights == [said.count(text) / len(said) for text in texts]
    assert sorted(texts) == sorted(set(said))


@pytest.mark.parametrize("kind", ["row", "list"])
@pytest.mark.parametrize(
    "bad",
    [
        {"question": ""},
        {"question": "  "},
        {"question": None},
        {"question": 5},
        {"answer": ""},
        {"answer": " "},
        {"answer": []},
        {"answer": None},
        {"answer": ["red", ""]},
        {"answer": ["red", None]},
        {"answer": [{"answer": "red"}]},
    ],
    ids=str,
)
def test_missing_question_or_answer_names_the_row(bad: dict, kind: str) -> None:
    asked = {"question": "a cat", "answer": "red", **bad}
    row = {"image": tiny.image(), **(asked if kind == "row" else {"questions": [asked]})}
    with pytest.raises(ValueError, match=r"^Row 3 lacks a question or an answer: .*\.$"):
        QuestionDataset([*blip_training.rows(3), row])[3]


def test_row_without_questions_names_itself() -> None:
    with pytest.raises(ValueError, match="Row 0 lacks a question or an answer"):
        QuestionDataset([{"image": tiny.image(), "questions": []}])[0]


# Collators


def test_questions_and_weighted_answers_of_a_batch() -> None:
    asked = [
        ("a cat", ["red", "red", "two tree"]),
        ("the dog on the left", "blue"),
        ("tree", ["a", "green", "red", "a"]),
    ]
    rows = [
        {"image": tiny.image(seed=i), "question": question, "answer": answer}
        for i, (question, answer) in enumerate(asked)
    ]
    questions, processor = QuestionDataset(rows), tiny.blip_processor()
    batch = QuestionCollator(processor)([questions[i] for i in range(3)])
    expected = processor(images=[row["image"] for row in rows], text=[question for question, _ in asked])
    for name in ("pixel_values", "input_ids", "attention_mask"):
        assert torch.equal(batch[name], expected[name])
    assert batch["answer_index"].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch["answer_weights"].tolist() == pytest.approx([2 / 3, 1 / 3, 1, 0.5, 0.25, 0.25])
    sums = torch.zeros(3).index_add(0, batch["answer_index"], batch["answer_weights"])
    torch.testing.assert_close(sums, torch.ones(3))
    answers = ["red", "two tree", "blue", "a", "green", "red"]
    assert batch["labels"].shape == (6, 4)
    for labels, answer in zip(batch["labels"].tolist(), answers, strict=True):
        ids = processor(text=[answer])["input_ids"][0].tolist()
        assert labels == ids + [-100] * (4 - len(ids))


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_prompt_and_padding_are_not_learned(prompt: str) -> None:
    processor = tiny.blip_processor()
    pairs = PairDataset([{"image": tiny.image(), "caption": text, "id": i} for i, text in enumerate(tiny.CAPTIONS)])
    batch = CaptionCollator(processor, prompt=prompt)([pairs[i] for i in range(len(pairs))])
    whole = processor(text=[prompt + caption for caption in tiny.CAPTIONS])
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    assert torch.equal(batch["attention_mask"], whole["attention_mask"])
    assert batch["pair_ids"].tolist() == [0, 1, 2, 3, 4]
    for labels, caption in zip(batch["labels"], tiny.CAPTIONS, strict=True):
        learned = labels[1:][labels[1:] != -100].tolist()  # the first is never learned: the loss shifts
        assert learned == processor(text=[caption])["input_ids"][0, 1:].tolist()
        assert learned[-1] == tiny.SEP
        assert (labels[: len(prompt.split()) + 1] == -100).all() == bool(prompt)


def test_ids_may_be_left_out() -> None:
    pairs = PairDataset(blip_training.rows(2))
    batch = CaptionCollator(tiny.blip_processor(), pair_ids=False)([pairs[0], pairs[1]])
    assert batch.keys() == {"pixel_values", "input_ids", "attention_mask", "labels"}


def test_cached_image_features_are_those_of_the_rows() -> None:
    features = torch.arange(24.0).view(4, 3, 2)
    collator = CaptionCollator(tiny.blip_processor(), vision_features=features)
    pairs = PairDataset(blip_training.rows(4))
    batch = collator([pairs[2], pairs[0]])
    assert "pixel_values" not in batch
    assert torch.equal(batch["vision_features"], features[[2, 0]])


def test_bad_image_names_the_row() -> None:
    questions = QuestionDataset([{"image": b"not an image", "question": "a cat", "answer": "red"}])
    with pytest.raises(ValueError, match="row 0"):
        QuestionCollator(tiny.blip_processor())([questions[0]])


# Scenes


@pytest.fixture(scope="module")
def stream() -> SceneStream:
    return SceneStream("train", 7, 48)


def test_scenes_are_rows(stream: SceneStream) -> None:
    rows, scene = SceneRows(stream, 5), stream.scene(3)
    assert len(rows) == 5
    assert rows[3].keys() == {"image", "caption", "questions", "id"}
    assert (rows[3]["caption"], rows[3]["questions"], rows[3]["id"]) == (scene["captions"], scene["questions"], 3)
    assert np.array_equal(np.asarray(rows[3]["image"]), np.asarray(scene["image"]))
    for beyond in (-1, 5):
        with pytest.raises(IndexError, match=f"no scene {beyond}: scenes are numbered 0 to 4"):
            rows[beyond]
    assert PairDataset(rows)[3]["caption"] in scene["captions"]
    assert QuestionDataset(rows)[3]["question"] in [question["question"] for question in scene["questions"]]


@pytest.mark.parametrize("most", [1, 10, 16, 1000])
def test_long_captions_are_left_out(stream: SceneStream, most: int) -> None:
    every, short = SceneRows(stream, 30), SceneRows(stream, 30, max_words=most)
    fell_back = 0
    for i in range(30):
        captions, kept = every[i]["caption"], short[i]["caption"]
        fitting = [caption for caption in captions if len(caption.split()) <= most]
        fell_back += not fitting
        assert kept == (fitting or [min(captions, key=len)])
        assert kept
    assert (fell_back == 30) == (most == 1)
    assert (fell_back == 0) == (most >= 16)
