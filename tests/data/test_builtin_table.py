"""The table of built-in datasets: each row opens, and a throw-away row serves every command that takes a dataset."""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pytest
import torch

from cases import tiny
from hf_vlm.data.builtin.table import BUILTIN, BuiltinData, BuiltinOptions
from hf_vlm.evaluation.task import EvaluationSettings, TestSet
from hf_vlm.evaluation.test_sets import evaluate_checkpoint
from hf_vlm.runs.provenance import builtin_data
from hf_vlm.search.open import open_source
from hf_vlm.training.cache_tower import cache_tower

NEEDS = {"easy_vqa": "easy_vqa"}


@pytest.mark.parametrize("name", BUILTIN)
def test_a_row_opens_what_it_offers(name: str) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    builtin, options = BUILTIN[name], BuiltinOptions(limit=2, size=48)
    assert builtin.pairs or builtin.questions
    if builtin.pairs:
        assert {"image", "caption", "id"} <= builtin.pairs(options)[1].keys()
    if builtin.questions:
        row = builtin.questions(options)[1]
        assert "image" in row
        assert {"question", "answer"} <= (row["questions"][0] if "questions" in row else row).keys()
    if builtin.conversations:
        assert builtin.conversations(options)[1].keys() == {"messages", "images"}
    if builtin.table:
        table = builtin.table(options)
        assert set(builtin.columns.values()) <= set(table.column_names)
        assert isinstance(table.features["image"], datasets.Image)
    if builtin.test_sets:
        _, fields = next(builtin.test_sets(options, None))
        assert fields.keys() <= TestSet.__dataclass_fields__.keys()
        assert set(builtin.test_fields) <= fields.keys()
        assert {len(column) for column in fields.values()} == {len(fields["images"])}
    assert all({"name", "licence", "credit", "source", "rows"} <= record.keys() for record in builtin.provenance())
    assert builtin.key(options)
    assert builtin.fit(1) >= 1
    assert builtin.fit(10**6) == 1024


def test_sizes_of_scenes() -> None:
    assert [BUILTIN["scenes"].fit(size) for size in (16, 64, 4096)] == [48, 64, 1024]


# A throw-away dataset: what its one module would define.

ROWS = [{"image": tiny.image(seed=i), "caption": caption, "id": i} for i, caption in enumerate(tiny.CAPTIONS)]


def doodle_table(options: BuiltinOptions) -> datasets.Dataset:
    rows = {"image": [row["image"] for row in ROWS], "caption": [row["caption"] for row in ROWS]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def doodle_tests(options: BuiltinOptions, names: Sequence[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = ROWS[: options.limit or None]
    captions = [row["caption"] for row in rows]
    yield "test", {"images": [row["image"] for row in rows], "captions": captions, "ids": list(range(len(rows)))}


DOODLES = BuiltinData(
    about="throw-away doodles",
    pairs=lambda options: ROWS,
    table=doodle_table,
    key=lambda options: {"path": "doodles"},
    test_sets=doodle_tests,
    test_fields=("captions",),
    provenance=lambda: [{"name": "doodles", "licence": "CC0-1.0", "credit": "nobody", "source": "", "rows": {}}],
)


def test_a_throw_away_dataset_needs_its_row_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN, "doodles", DOODLES)
    torch.manual_seed(0)
    folder = str(tmp_path / "clip")
    tiny.clip_model().save_pretrained(folder)
    tiny.clip_processor().save_pretrained(folder)
    reports = evaluate_checkpoint(folder, "doodles", "test", "", 4, settings=EvaluationSettings(progress=False))
    assert list(reports) == ["test"]
    assert list(reports["test"]) == ["retrieval"]
    items = list(open_source("doodles", ("image", "text"), "train", None))
    assert [item.text for item in items if item.kind == "image"] == tiny.CAPTIONS
    features = cache_tower(folder, tmp_path / "features", "doodles")
    assert (len(features), features.key["data"]["path"]) == (len(ROWS), "doodles")
    assert [record["name"] for record in builtin_data()] == [record["name"] for record in BUILTIN["emoji"].provenance()]


def test_a_dataset_without_test_sets_or_images_says_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN, "empty", BuiltinData(about="nothing"))
    with pytest.raises(ValueError, match="has no images to read by row"):
        BUILTIN["empty"].images(BuiltinOptions())
    with pytest.raises(ValueError, match="empty cannot be indexed"):
        open_source("empty", ("image",), "train", None)
