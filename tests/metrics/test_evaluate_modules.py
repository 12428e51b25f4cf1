"""The modules for `evaluate.load`: loaded from a folder alone, without a network, equal to the functions."""

import shutil
import socket
from pathlib import Path

import evaluate
import pytest
import torch

import hf_vlm.metrics
from hf_vlm.evaluation import caption_metrics, hard_negative_metrics, retrieval_metrics, vqa_metrics, zero_shot_metrics

METRICS = Path(next(iter(hf_vlm.metrics.__path__)))


def no_network(*_: object) -> None:
    raise AssertionError("evaluate.load of a folder must not open a connection")


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads a copy of one metric's folder, alone and without a network."""
    monkeypatch.setattr(socket.socket, "connect", no_network)

    def load_copy(name: str) -> evaluate.EvaluationModule:
        folder = shutil.copytree(METRICS / name, tmp_path / name)
        return evaluate.load(str(folder), cache_dir=str(tmp_path / "cache"))

    return load_copy


def test_retrieval_module(load) -> None:
    module = load("image_text_retrieval")
    generator = torch.Generator().manual_seed(0)
    text_to_image = torch.arange(23).repeat(3)
    image_embeds = torch.randn(23, 8, generator=generator)
    text_embeds = image_embeds[text_to_image] + 1.5 * torch.randn(69, 8, generator=generator)
    expected = retrieval_metrics(image_embeds, text_embeds, text_to_image)
    result = module.compute(image_embeds=image_embeds, text_embeds=text_embeds, text_to_image=text_to_image)
    assert result == expected
    for start in range(0, len(text_embeds), 10):
        rows = slice(start, start + 10)
        module.add_batch(text_embeds=text_embeds[rows].bfloat16(), text_to_image=text_to_image[rows].tolist())
    result = module.compute(image_embeds=image_embeds, image_ids=torch.arange(23), ks=(1, 3))
    assert result == retrieval_metrics(image_embeds, text_embeds.bfloat16(), text_to_image, ks=(1, 3)) != expected


def test_zero_shot_module(load) -> None:
    generator = torch.Generator().manual_seed(0)
    image_embeds, class_embeds = torch.randn(20, 4, generator=generator), torch.randn(6, 4, generator=generator)
    labels = torch.arange(20) % 6
    result = load("zero_shot_accuracy").compute(
        image_embeds=image_embeds, class_embeds=class_embeds, labels=labels, ks=(1, 2)
    )
    assert result == zero_shot_metrics(image_embeds, class_embeds, labels, ks=(1, 2))
    assert result["top1"] < result["top2"]


def test_hard_negative_module(load) -> None:
    generator = torch.Generator().manual_seed(1)
    positive, negative = torch.rand(20, generator=generator), torch.rand(20, generator=generator)
    kinds = ["colour", "number"] * 10
    result = load("hard_negative_accuracy").compute(positive_scores=positive, negative_scores=negative, kinds=kinds)
    assert result == hard_negative_metrics(positive, negative, kinds)
    assert result["accuracy_colour"] != result["accuracy_number"]


def test_caption_module(load) -> None:
    module = load("caption_scores")
    predictions = ["a red cat on a mat", "two dogs run", "a tree"]
    references = [["a cat on a red mat", "Cat."], ["two dogs are running"], ["a big tree", "one tree", "a tree's leaf"]]
    expected = caption_metrics(predictions, references)
    assert module.compute(predictions=predictions, references=references) == expected
    for prediction, texts in zip(predictions, references, strict=True):
        module.add(predictions=prediction, references=texts)
    assert module.compute() == expected
    assert 0 < expected["bleu_4"] < expected["rouge_l"] < 1 < expected["cider"] < 10


def test_vqa_module(load) -> None:
    module = load("vqa_accuracy")
    predictions, answers = ["Yes", "two"], [["yes"] * 3 + ["no"] * 7, ["2"] * 10]
    result = module.compute(predictions=predictions, references=answers)
    assert result == vqa_metrics(predictions, answers)
    assert result["vqa_accuracy"] == pytest.approx(0.95)
    result = module.compute(predictions=predictions, references=answers, question_types=["is", "how many"])
    assert result == vqa_metrics(predictions, answers, ["is", "how many"])
    assert result["vqa_accuracy_question_is"] == pytest.approx(0.9)
