"""The filter at work: the maths against definitions, corruptions that are false, outcomes that load and resume."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from cases import tiny
from hf_vlm import VlmBlipForConditionalGeneration, VlmBlipForImageTextRetrieval
from hf_vlm.bootstrap import filter as filtering
from hf_vlm.bootstrap.filter import FilterSettings, PairFilter, filter_sources
from hf_vlm.bootstrap.on_scenes import Corruption, filter_table
from hf_vlm.data import ImageError, corrupt_captions
from hf_vlm.data.builtin.scene_text import conflict
from hf_vlm.evaluation import best_threshold, filter_metrics
from hf_vlm.runs.launch import parse_arguments
from recipes import blip_filter

RNG = np.random.default_rng(0)
NAMES = ["cat", "dog", "tree", "house", "apple", "black cat", "ball", "star"]
KINDS = ["object", "colour", "number", "left_right"]


def scene(number: int) -> dict:
    """A scene of one thing, with a false twin of each kind; every text says which scene it is of."""
    pairs = [{"caption": f"true {number} {k}", "negative": f"false {number} {k}", "kind": k} for k in KINDS]
    return {"objects": [{"name": NAMES[number % len(NAMES)]}], "hard_negatives": pairs}


SCENES = [scene(number) for number in range(200)]


def brute(scores: np.ndarray, bad: np.ndarray, threshold: float) -> dict[str, float]:
    """The metrics by their definitions, pair by pair."""
    flagged = scores < threshold
    found = (flagged & bad).sum()
    precision, recall = found / max(flagged.sum(), 1), found / bad.sum()
    wins = [(b < g) + (b == g) / 2 for b in scores[bad] for g in scores[~bad]]
    precisions = [bad[scores <= score].mean() for score in scores[bad]]
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "average_precision": np.mean(precisions),
        "roc_auc": np.mean(wins),
    }


@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize("threshold", [-1.0, 0.4, 2.0])
def test_metrics_are_their_definitions(decimals, threshold):
    """With ties (one decimal) and without; nothing, some, everything flagged; in all and by corruption."""
    scores = RNG.random(60).round(decimals)
    kinds = np.array(["good", "wrong_number", "another_image"])[RNG.integers(3, size=60)]
    found = filter_metrics(scores, list(kinds), threshold)
    expected = brute(scores, kinds != "good", threshold)
    for kind in ("wrong_number", "another_image"):
        kept = (kinds == "good") | (kinds == kind)
        expected |= {f"{k}_{kind}": v for k, v in brute(scores[kept], kinds[kept] == kind, threshold).items()}
        assert found[f"bad_{kind}"] == (kinds == kind).sum()
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert (found["pairs"], found["bad"]) == (60, (kinds != "good").sum())
    assert found["flagged"] == (scores < threshold).sum()


def test_the_best_threshold_has_the_best_f1():
    for _ in range(20):
        scores, bad = RNG.random(15).round(1), RNG.random(15) < 0.4
        bad[:2] = True, False
        kinds = ["bad" if is_bad else "good" for is_bad in bad]
        best = filter_metrics(scores, kinds, best_threshold(scores, kinds))["f1"]
        assert best == pytest.approx(max(brute(scores, bad, t)["f1"] for t in np.arange(-0.05, 1.2, 0.1)))


@pytest.mark.parametrize(
    ("scores", "kinds", "message"),
    [
        ([0.1, 0.2], ["good"], "1 corruptions"),
        ([0.1, float("nan")], ["good", "bad"], "pair 1 has a NaN"),
        ([0.1, 0.2], ["good", "good"], "0 of 2 pairs are bad"),
        ([0.1, 0.2], ["bad", "bad"], "2 of 2 pairs are bad"),
    ],
)
def test_metrics_refuse_what_they_cannot_measure(scores, kinds, message):
    with pytest.raises(ValueError, match=message):
        filter_metrics(scores, kinds, 0.5)


def test_exact_shares_are_corrupted_and_every_corruption_is_false():
    judged = corrupt_captions(SCENES, another_image=0.25, wrong_attribute=0.15, seed=3)
    corruptions = [caption.corruption for caption in judged]
    assert corruptions.count("another_image") == 50
    assert sum(corruption.startswith("wrong_") for corruption in corruptions) == 30
    assert corruptions.count("good") == 120
    for i, caption in enumerate(judged):
        truth, of_scene, kind = caption.caption.split()
        assert caption.true_caption.startswith(f"true {i} ")
        assert int(of_scene) == caption.scene
        if caption.corruption == "another_image":
            assert truth == "true"
            assert not conflict(NAMES[caption.scene % len(NAMES)], NAMES[i % len(NAMES)])
        else:
            assert caption.scene == i
            assert (truth, caption.is_bad) == (("true", False) if caption.corruption == "good" else ("false", True))
        assert caption.corruption in ("good", "another_image", f"wrong_{kind}")
    assert judged == corrupt_captions(SCENES, 0.25, 0.15, seed=3)
    assert judged != corrupt_captions(SCENES, 0.25, 0.15, seed=4)


def test_impossible_corruptions_are_refused():
    with pytest.raises(ValueError, match="at most 1 together"):
        corrupt_captions(SCENES, 0.6, 0.6)
    with pytest.raises(ValueError, match="every other scene shows one of its objects"):
        corrupt_captions([scene(0), scene(5)], 1.0, 0.0)  # a cat and a black cat


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A filter, a captioner and a CLIP, and a parquet file of seven rows with eight captions."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, head in (("filter", VlmBlipForImageTextRetrieval), ("captioner", VlmBlipForConditionalGeneration)):
        tiny.blip_model(head).save_pretrained(folder / name)
        tiny.blip_processor().save_pretrained(folder / name)
    tiny.clip_model().save_pretrained(folder / "clip")
    tiny.clip_processor().save_pretrained(folder / "clip")
    captions = [[text] for text in (*tiny.CAPTIONS, "a tree")] + [["red", "a blue dog"]]
    rows = {"image": [tiny.image(seed=i) for i in range(7)], "caption": captions}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(str(folder / "pairs.parquet"))
    return folder


def settings(models: Path, **options) -> FilterSettings:
    return FilterSettings(**{"checkpoint": str(models / "filter"), "shard_rows": 3, "action": "flag", **options})


def read(folder: Path) -> datasets.Dataset:
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))


def test_scores_are_the_models_and_pictures_come_back_as_they_were(models, tmp_path):
    sources = [{"path": str(models / "pairs.parquet")}]
    totals = filter_sources(tmp_path / "out", sources, settings(models, itc=True), progress=False)
    rows = read(tmp_path / "out")
    assert rows["row"] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert totals["texts"] == len(rows) == 8
    assert totals["kept"] == sum(rows["keep"])
    model = VlmBlipForImageTextRetrieval.from_pretrained(models / "filter")
    for row in rows:
        inputs = tiny.blip_processor()(images=[row["image"]], text=[row["caption"]])
        with torch.no_grad():
            output = model(**inputs)
        assert row["itm"] == pytest.approx(float(output.itm_logits.softmax(-1)[0, 1]), abs=1e-5)
        assert row["itc"] == pytest.approx(float((output.image_embeds * output.text_embeds).sum()), abs=1e-5)
        assert row["keep"] == (row["itm"] >= 0.5)
        assert np.array_equal(row["image"], tiny.image(seed=row["row"]))
    stored = [datasets.load_dataset("parquet", data_files=str(models / "pairs.parquet"), split="train"), rows]
    before, after = (of.cast_column("image", datasets.Image(decode=False)) for of in stored)
    assert before[0]["image"]["bytes"] == after[0]["image"]["bytes"]


def test_keep_writes_what_reaches_the_threshold(models, tmp_path):
    sources = [{"path": str(models / "pairs.parquet")}]
    filter_sources(tmp_path / "all", sources, settings(models), progress=False)
    flagged = read(tmp_path / "all")
    threshold = float(np.median(flagged["itm"]))
    kept = settings(models, action="keep", threshold=threshold)
    filter_sources(tmp_path / "kept", sources, kept, progress=False)
    expected = [text for text, score in zip(flagged["caption"], flagged["itm"], strict=True) if score >= threshold]
    assert read(tmp_path / "kept")["caption"] == expected
    assert 0 < len(expected) < 8


def test_a_killed_run_goes_on_where_it_was(models, tmp_path, monkeypatch):
    """With synthetic captions, two sources and a broken row: as an uninterrupted run, and no row scored twice."""
    torch.manual_seed(0)
    (tmp_path / "web").mkdir()
    for i in range(3):
        tiny.image(seed=20 + i).save(tmp_path / "web" / f"{i}.png")
    (tmp_path / "web" / "1.png").write_bytes(b"no picture")
    lines = [{"image": f"{i}.png", "caption": "a red cat"} for i in range(3)]
    (tmp_path / "web" / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = [{"path": str(models / "pairs.parquet")}, {"path": str(tmp_path / "web" / "pairs.jsonl")}]
    chosen = settings(models, captioner=str(models / "captioner"), on_error="skip")
    totals = filter_sources(tmp_path / "whole", sources, chosen, progress=False)
    assert (totals["images"], totals["texts"] - totals["synthetic"]) == (9, 10)
    assert 0 < totals["synthetic"] <= 9

    scored = []
    original = PairFilter.columns

    def dying(self, rows, label, seed):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append([row.row for row in rows])
        return original(self, rows, label, seed)

    monkeypatch.setattr(PairFilter, "columns", dying)
    with pytest.raises(KeyboardInterrupt):
        filter_sources(tmp_path / "part", sources, chosen, progress=False)
    monkeypatch.setattr(
        PairFilter, "columns", lambda self, *of: scored.append([r.row for r in of[0]]) or original(self, *of)
    )
    assert filter_sources(tmp_path / "part", sources, chosen, progress=False) == totals
    assert scored == [[0, 1, 2], [3, 4, 5], [6], [0, 2]]
    assert filter_sources(tmp_path / "part", sources, chosen, progress=False) == totals
    assert len(scored) == 4
    whole, part = read(tmp_path / "whole"), read(tmp_path / "part")
    for column in ("caption", "origin", "source", "row", "itm", "keep"):
        assert whole[column] == part[column]
    assert set(whole["origin"]) == {"given", "synthetic"}
    other = settings(models, captioner=str(models / "captioner"), threshold=0.7, on_error="skip")
    with pytest.raises(ValueError, match="another threshold") as caught:
        filter_sources(tmp_path / "part", sources, other, progress=False)
    assert "\n" not in str(caught.value)


def test_errors_are_one_line(models, tmp_path):
    with pytest.raises(ValueError, match="no matching head"):
        filtering.load_filter(str(models / "captioner"))
    with pytest.raises(ValueError, match="writes no captions"):
        filtering.load_captioner(str(models / "filter"))
    with pytest.raises(ValueError, match="no action 'drop'"):
        settings(models, action="drop")
    with pytest.raises(ValueError, match="threshold must be 0 to 1"):
        settings(models, threshold=1.5)
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "bad.png", "caption": "a cat"}))
    with pytest.raises(ImageError, match=r"\(bad.png\).*empty.*on_error='skip'"):
        filter_sources(tmp_path / "out", [{"path": str(tmp_path / "pairs.jsonl")}], settings(models), progress=False)
    with pytest.raises(ValueError, match="no such file"):
        filter_sources(
            tmp_path / "none", [{"path": str(tmp_path / "absent.parquet")}], settings(models), progress=False
        )


def test_the_demonstration(models, tmp_path, monkeypatch, capsys):
    """The recipe on the user's images instead of scenes: JSON, table, and the numbers of each score."""

    def captions(self, split):
        seed = len(split)
        judged = corrupt_captions(SCENES[:40], self.another_image, self.wrong_attribute, seed)
        return [tiny.image(seed=seed + i) for i in range(40)], judged

    monkeypatch.setattr(Corruption, "captions", captions)
    small = Path(blip_filter.__file__).with_suffix("") / "small.yaml"
    options = ["--checkpoint", str(models / "filter"), "--clip", str(models / "clip"), "--output_dir", str(tmp_path)]
    blip_filter.main(*parse_arguments(blip_filter.main, ["--config", str(small), *options]))
    results = json.loads((tmp_path / "results.json").read_text())["caption_filter"]
    assert set(results) == {"unseen_style", "unseen_emoji", "unseen_both"}
    for report in results.values():
        assert (report["pairs"], report["bad"], report["threshold"]) == (40, 16, 0.5)
        assert report["itm"]["roc_auc"] == report["roc_auc"]
        assert {*report} > {"itm", "itc", "clip", "blind", "roc_auc_another_image"}
    assert filter_table(results) in capsys.readouterr().out
    assert "False captions found" in (models / "filter" / "README.md").read_text()
