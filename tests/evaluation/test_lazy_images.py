"""Evaluation decodes images when a task reads them and keeps none: memory does not grow with the number of rows."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cases import tiny
from hf_vlm import VlmBlipForConditionalGeneration, VlmBlipForPreTraining, VlmBlipForQuestionAnswering
from hf_vlm.data.builtin.table import BUILTIN, BuiltinOptions
from hf_vlm.data.sources import images as images_module
from hf_vlm.data.sources import questions as questions_module
from hf_vlm.data.sources import rows as rows_module
from hf_vlm.data.sources.images import ImageError, LazyImages
from hf_vlm.data.sources.rows import CaptionError
from hf_vlm.evaluation.blocks import DECODED
from hf_vlm.evaluation.task import EvaluationSettings
from hf_vlm.evaluation.test_sets import evaluate_checkpoint, own_captions

ROWS = 100
QUIET = EvaluationSettings(progress=False, rerank=4, beams=1, caption_tokens=2, answer_tokens=2)


class Decoded:
    """Counts decoded images: all, and the most that were alive at once."""

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}
        self.most = self.count = 0

    def load(self, *args: Any, **options: Any) -> Image.Image:
        image = images_module.load_image(*args, **options)
        self.count += 1
        self.alive[self.count] = weakref.finalize(image, self.alive.pop, self.count)
        self.most = max(self.most, len(self.alive))
        return image


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    counter = Decoded()
    for module in (rows_module, questions_module):
        monkeypatch.setattr(module, "load_image", counter.load)
    return counter


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny.image().save(folder / "a.png")
    row = {"image": "a.png", "question": "what?", "answer": "a cat", "label": "cat"}
    rows = [{**row, "caption": f"a cat {i}"} for i in range(ROWS)]
    (folder / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder / "a.jsonl"


def checkpoint(folder: Path, head: Any) -> str:
    model = tiny.clip_model() if head is None else tiny.blip_model(head)
    model.save_pretrained(folder)
    (tiny.clip_processor() if head is None else tiny.blip_processor()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("head", "task", "columns", "passes"),
    [
        (None, "retrieval", "", 1),
        (VlmBlipForPreTraining, "retrieval", "", 2),  # the second for re-ranking
        (None, "zero_shot", "class=label", 1),
        (VlmBlipForConditionalGeneration, "caption", "", 1),
        (VlmBlipForQuestionAnswering, "vqa", "question=question,answer=answer", 1),
    ],
)
def test_few_images_are_decoded_at_a_time(
    head: Any, task: str, columns: str, passes: int, data: Path, decoded: Decoded, tmp_path: Path
) -> None:
    evaluate_checkpoint(checkpoint(tmp_path, head), str(data), "train", columns, 0, task, None, QUIET)
    assert decoded.count == passes * ROWS
    assert decoded.most <= 2 * DECODED


def test_training_questions_need_no_images(data: Path, decoded: Decoded, tmp_path: Path) -> None:
    folder, columns = checkpoint(tmp_path, VlmBlipForQuestionAnswering), "question=question,answer=answer"
    evaluate_checkpoint(folder, str(data), "train", columns, 3, "vqa", "train", QUIET)
    assert decoded.count == 3


def test_texts_are_read_without_images_and_bad_ones_name_theirs(data: Path, decoded: Decoded, tmp_path: Path) -> None:
    test = own_captions(str(data), "train", {}, 7)
    assert (len(test.images), test.captions, decoded.count) == (7, [f"a cat {i}" for i in range(7)], 0)
    assert [image.size for image in test.images[2:4]] == [tiny.image().size] * 2
    assert test.images[-1].size == tiny.image().size
    rows = [{"image": "a.png", "caption": "a"}, {"image": "b.png", "caption": ""}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    tiny.image().save(tmp_path / "a.png")
    with pytest.raises(CaptionError, match=r"row 1 \(b\.png\)"):
        own_captions(str(tmp_path / "b.jsonl"), "train", {}, 0)
    assert own_captions(str(tmp_path / "b.jsonl"), "train", {}, 1).captions == ["a"]


def test_a_bad_image_names_its_row(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "a"}, {"image": "b.png", "caption": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    tiny.image().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    images = own_captions(str(tmp_path / "a.jsonl"), "train", {}, 0).images
    assert images[0].size == tiny.image().size
    with pytest.raises(ImageError, match=r"row 1 \(b\.png\)"):
        images[1]


@pytest.mark.parametrize("name", ["emoji", "easy_vqa"])
def test_built_in_test_sets_decode_on_access(name: str) -> None:
    pytest.importorskip("resvg_py")
    pytest.importorskip("easy_vqa")
    (_, fields), *_ = BUILTIN[name].test_sets(BuiltinOptions(limit=2), None)
    images = fields["images"]
    assert not isinstance(images, list)
    assert images[0] is not images[0]
    assert len(images) >= 1


def test_lazy_images_are_a_sequence() -> None:
    rows = [{"image": tiny.image(seed=seed)} for seed in range(3)]
    images = LazyImages(rows, 2)
    assert len(images) == 2
    assert [image.tobytes() for image in images] == [tiny.image(seed=seed).tobytes() for seed in range(2)]
    with pytest.raises(IndexError):
        images[2]


MEASURE = """
import resource, sys
from hf_vlm.evaluation.task import EvaluationSettings
from hf_vlm.evaluation.test_sets import evaluate_checkpoint
settings = EvaluationSettings(progress=False, rerank=4)
evaluate_checkpoint(sys.argv[1], sys.argv[2], "train", "", int(sys.argv[3]), "retrieval", None, settings)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """60 and 600 images of 3 megapixels: kept, they would take 0.5 GB and 5.4 GB."""
    Image.new("RGB", (2000, 1500), "red").save(tmp_path / "a.jpg")
    rows = [{"image": "a.jpg", "caption": f"a cat {i}"} for i in range(600)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    folder = checkpoint(tmp_path / "model", None)
    peaks = []
    for count in ("60", "600"):
        command = [sys.executable, "-c", MEASURE, folder, str(tmp_path / "a.jsonl"), count]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    print(f"peak memory: {peaks[0]:.0f} MB at 60 images, {peaks[1]:.0f} MB at 600")
    assert peaks[1] < peaks[0] + 100


def test_a_file_is_its_own_test_set(data: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, None)
    assert list(evaluate_checkpoint(folder, str(data), "test", "", 4, "retrieval", None, QUIET)) == ["test"]
    with pytest.raises(ValueError, match="no split 'validation'; files hold one split"):
        evaluate_checkpoint(folder, str(data), "validation", "", 4, "retrieval", None, QUIET)
    rows = [{"image": "a.png", "label": label} for label in ("cat", ["cat", "dog"])]
    data.with_name("several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"several\.jsonl, row 1: has several classes"):
        evaluate_checkpoint(folder, str(data.with_name("several.jsonl")), "test", "", 0, "zero_shot", None, QUIET)
