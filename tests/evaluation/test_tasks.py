"""Tasks: each is described and can be done by a head; a new one needs no edit elsewhere; zero-shot classification."""

import json

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from cases import tiny, tiny_blip2
from hf_vlm import families
from hf_vlm.cli.main import app
from hf_vlm.data.builtin.table import BUILTIN, find_builtin
from hf_vlm.evaluation import class_prompts, embed_images, embed_texts, zero_shot_metrics, zero_shot_report
from hf_vlm.evaluation import tasks as evaluation_tasks
from hf_vlm.evaluation.tables import format_reports
from hf_vlm.evaluation.task import EvaluationSettings, Evaluator, Task, TestSet
from hf_vlm.evaluation.tasks import TASKS, run_tasks
from hf_vlm.evaluation.test_sets import emoji_reports, evaluate_checkpoint
from hf_vlm.metrics.descriptions import DESCRIPTIONS, Description
from hf_vlm.training.cache_tower import open_rows

IMAGES = [tiny.image(seed=seed) for seed in range(6)]
NAMES = ["cat", "dog", "red house"]
LABELS = [NAMES[i % 3] for i in range(6)]
QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A checkpoint of CLIP."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip_model().save_pretrained(folder)
    tiny.clip_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own_data(tmp_path):
    """A folder of images, a folder per class in it."""
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        folder = tmp_path / "own" / "test" / label.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    return str(tmp_path / "own")


def test_every_task_is_described_and_can_be_done():
    assert [task.name for task in TASKS] == list(DESCRIPTIONS)
    can_be_done = {name for head in families.heads().values() for name in head.tasks}
    assert can_be_done == set(DESCRIPTIONS)
    fields = set(TestSet.__dataclass_fields__)
    for task in TASKS:
        assert set(task.needs) <= fields
        assert task.description.own_rows == tuple(row for row in task.description.rows if row in ("reranked", "itm"))


def words_of_captions(evaluator: Evaluator, test: TestSet) -> dict[str, float]:
    """The throw-away task: how long the captions of a test set are."""
    lengths = [len(caption.split()) for caption in test.captions or []]
    return {"images": len(test.images), "words": sum(lengths) / len(lengths), "longest": max(lengths)}


WORDS = Task(
    Description(
        name="words",
        title="Words of captions",
        summary="the number of words in the captions of the test set",
        hub_task=("image-to-text", "Image captioning"),
        primary="words",
        metrics={"words": "mean words", "longest": "longest"},
        sizes={"images": "images"},
    ),
    needs=("captions",),
    run=words_of_captions,
)


@pytest.fixture
def with_words(monkeypatch):
    """The throw-away task in the list of tasks and in CLIP's head: the only two places that name a new task."""
    monkeypatch.setattr(evaluation_tasks, "TASKS", (*TASKS, WORDS))
    known = families.heads()
    known["VlmClipModel"] = families.Head("VlmClipModel", tasks=(*known["VlmClipModel"].tasks, "words"))
    monkeypatch.setattr(evaluation_tasks, "heads", lambda: known)


def test_a_new_task_runs_on_every_kind_of_data(with_words, clip_folder, tmp_path):
    found = evaluate_checkpoint(clip_folder, "scenes", "test", "", 4, "words")
    assert list(found) == ["unseen_style", "unseen_emoji", "unseen_both"]
    title, head, *rows = format_reports(found).splitlines()
    assert title == "words"
    assert head.split() == ["test", "set", "images", "mean", "words", "longest"]
    assert rows[0].split()[:2] == ["unseen_style", "4"]
    for i, caption in enumerate(tiny.CAPTIONS):
        IMAGES[i].save(tmp_path / f"{i}.png")
        with (tmp_path / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{i}.png", "caption": caption}) + "\n")
    args = ["evaluate", clip_folder, "--data", str(tmp_path), "--split", "train", "--limit", "0"]
    report = json.loads(CliRunner().invoke(app, [*args, "--task", "words", "--json"]).stdout)
    lengths = [len(caption.split()) for caption in tiny.CAPTIONS]
    words = {"images": len(lengths), "words": sum(lengths) / len(lengths), "longest": max(lengths)}
    assert report == {"train": {"words": words}}
    assert list(json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)["train"]) == ["retrieval", "words"]


def test_without_its_entry_the_task_is_unknown(clip_folder):
    with pytest.raises(ValueError, match="cannot do 'words'; it can do retrieval, hard_negatives, zero_shot"):
        evaluate_checkpoint(clip_folder, "emoji", "test", "", 4, "words")
    table = format_reports({"test": {"words": {"words": 2.0, "blind": {"words": 1.0}}}})
    assert [line.split() for line in table.splitlines()] == [["words"], ["test", "set", "words"], ["test", "2.000"]]


def test_zero_shot_equals_a_loop_over_images_and_classes():
    model, processor = tiny_blip2.blip2_model(), tiny_blip2.stage1_processor()
    templates = ["{}", "a {}"]
    report = zero_shot_report(model, processor, IMAGES, LABELS, NAMES, templates=templates, ks=(1, 2), **QUIET)
    images = embed_images(model, processor, IMAGES, **QUIET)
    assert images.ndim == 3
    texts = embed_texts(model, processor, class_prompts(NAMES, templates), **QUIET)
    classes = F.normalize(torch.stack([texts[2 * i : 2 * i + 2].mean(0) for i in range(3)]), dim=1)
    scores = torch.tensor([[max(float(query @ of) for query in image) for of in classes] for image in images])
    ranked = scores.argsort(dim=1, descending=True)
    labels = torch.tensor([NAMES.index(label) for label in LABELS])[:, None]
    assert report["top1"] == pytest.approx(float((ranked[:, :1] == labels).any(1).float().mean()))
    assert report["top2"] == pytest.approx(float((ranked[:, :2] == labels).any(1).float().mean()))
    assert (report["images"], report["classes"]) == (6, 3)
    assert report["chance"] == pytest.approx({"top1": 1 / 3, "top2": 2 / 3, "mean_per_class_accuracy": 1 / 3})
    with pytest.raises(ValueError, match="'cow' is the label of an image and not one of the 3 class names"):
        zero_shot_report(model, processor, IMAGES[:1], ["cow"], NAMES)
    with pytest.raises(ValueError, match="6 images and 5 labels"):
        zero_shot_report(model, processor, IMAGES, LABELS[:5])


def test_zero_shot_by_names_on_the_command_line(clip_folder, own_data):
    args = ["evaluate", clip_folder, "--data", own_data, "--task", "zero_shot", "--limit", "5", "--json"]
    result = CliRunner().invoke(app, args)
    found = json.loads(result.stdout)["test"]
    assert list(found) == ["zero_shot"]
    assert (found["zero_shot"]["images"], found["zero_shot"]["classes"]) == (5, 3)
    # A folder per class: the images of one class are side by side, an underscore is a space.
    order = sorted(range(6), key=lambda i: LABELS[i])[:5]
    evaluator = Evaluator(tiny.clip_model(), tiny.clip_processor(), EvaluationSettings(**QUIET))
    evaluator.model.load_state_dict(type(evaluator.model).from_pretrained(clip_folder).state_dict())
    test = TestSet([IMAGES[i] for i in order], labels=[LABELS[i] for i in order], class_names=sorted(NAMES))
    assert run_tasks(evaluator, ["zero_shot"], test)["zero_shot"] == found["zero_shot"]
    for columns, message in (
        ("image=image,class=kind", "no column 'kind'"),
        ("class=label,id=x", "name image and class"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_checkpoint(clip_folder, own_data, "test", columns, 0, "zero_shot")


def test_zero_shot_on_the_built_in_emoji(clip_folder):
    model, processor = tiny.clip_model(), tiny.clip_processor()
    reports = emoji_reports(Evaluator(model, processor, EvaluationSettings(**QUIET)), "zero_shot")
    assert list(reports) == ["unseen_style", "unseen_emoji", "unseen_both"]
    for report in reports.values():
        scores = report["zero_shot"]
        assert scores["chance"]["top1"] == 1 / scores["classes"]
        assert 0 <= scores["top1"] <= scores["top5"] <= 1
    assert "unseen_both, chance" in format_reports(reports)
    with pytest.raises(ValueError, match="size"):
        zero_shot_metrics(torch.randn(2, 3, 5), torch.randn(4, 6), [0, 1])


def test_a_built_in_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch, caplog):
    """Everywhere alike: in evaluate, cache-features and index."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "easy_vqa").mkdir()
    assert find_builtin("easy_vqa") is BUILTIN["easy_vqa"]
    assert "easy_vqa is the built-in dataset" in caplog.text
    assert "write ./easy_vqa" in caplog.text
    assert find_builtin("./easy_vqa") is None
    with pytest.raises(ValueError, match="cannot be opened"):
        open_rows("./easy_vqa", "train", 0, 0, "", 64)
    assert open_rows("easy_vqa", "train", 0, 5, "", 64)[1]["path"] == "easy_vqa"
