"""The user's own sources in every recipe: mistakes are refused at once, bad rows skipped, counted and recorded."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cases import tiny, tiny_blip2
from hf_vlm.runs.launch import launch, parse_arguments
from recipes import (
    blip2_stage1,
    blip2_stage2,
    blip_filter,
    blip_finetune,
    blip_pretrain,
    clip_pretrain,
    instructblip_finetune,
    llava_align,
    llava_instruct,
)

RECIPES: dict[ModuleType, list[str]] = {
    clip_pretrain: ["--config", "small"],
    blip_pretrain: ["--config", "small"],
    blip_finetune: ["--config", "caption_small", "--task", "caption"],
    blip_filter: ["--checkpoint", "none", "--output_dir", "none"],
    blip2_stage1: ["--config", "small"],
    blip2_stage2: ["--config", "small"],
    instructblip_finetune: ["--config", "small"],
    llava_align: ["--config", "small"],
    llava_instruct: ["--config", "small"],
}
NO_STREAMS = (instructblip_finetune, llava_align, llava_instruct)
EACH = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__.rpartition(".")[2])


def parse(recipe: ModuleType, *options: str) -> tuple:
    return parse_arguments(recipe.main, [*RECIPES[recipe], *options])


@EACH
def test_a_stream_is_read_or_refused_before_anything_is_loaded(recipe: ModuleType) -> None:
    options = ["--sources", "[{path: 'a-*.parquet', streaming: true}]"]
    if recipe in NO_STREAMS:
        with pytest.raises(ValueError, match=r"a-\*\.parquet has .*streaming"):
            parse(recipe, *options)
    else:
        assert parse(recipe, *options)[1].sources[0]["streaming"]


def test_questions_are_not_streamed(capsys: pytest.CaptureFixture) -> None:
    options = ["--config", "vqa_small", "--model", "none", "--sources", "[{path: a.parquet, streaming: true}]"]
    with pytest.raises(SystemExit):
        launch(blip_finetune.main, options)
    assert "a.parquet has streaming: True, but blip_finetune with task: vqa reads no streams" in capsys.readouterr().err


def test_a_stream_needs_a_number_of_steps(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    options = ["--config", "small", "--sources", "[{path: a.parquet, streaming: true}]", "--max_steps", "-1"]
    with pytest.raises(SystemExit):
        launch(clip_pretrain.main, [*options, "--output_dir", str(tmp_path / "out")])
    assert "a.parquet is a stream, which has no length: set max_steps" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [clip_pretrain, blip_pretrain, blip2_stage1, blip2_stage2])
def test_streams_that_cannot_be_mixed_are_refused_before_anything_is_loaded(recipe: ModuleType) -> None:
    streams = "[{path: a.parquet, streaming: true, weight: 1}, {path: b.parquet, streaming: true}]"
    with pytest.raises(ValueError, match=r"b\.parquet is a stream beside others and has no weight"):
        parse(recipe, "--sources", streams)
    with pytest.raises(ValueError, match=r"b\.parquet is a stream beside sources that are not"):
        parse(recipe, "--sources", "[{path: a.parquet}, {path: b.parquet, streaming: true}]")


@EACH
def test_mistakes_in_sources_are_refused_before_anything_is_loaded(recipe: ModuleType) -> None:
    for options, message in (
        (["--on_error", "ignore"], "on_error='ignore' is unknown; write 'raise' or 'skip'"),
        (["--max_skipped", "2"], r"max_skipped=2\.0 is no share; write a number from 0 to 1"),
        (["--sources", "[{path: a.parquet, colums: {}}]"], "unknown key 'colums'.*Did you mean columns"),
        (["--sources", "[]"], "sources must be a list of mappings, each with a path"),
        (["--sources", "[{split: train}]"], "sources must be a list of mappings, each with a path"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(recipe, *options)
    assert parse(recipe, "--on_error", "skip", "--max_skipped", "0.2")[1].report.max_skipped == 0.2
    assert parse(recipe)[1].report is None


def pairs(folder: Path, question: bool = False) -> Path:
    """Nine good rows, one without an image, one whose image is missing, and one without a text."""
    rows = [{"image": f"{number}.png", "caption": tiny.CAPTIONS[number % 4]} for number in range(12)]
    for number in (*range(9), 11):
        tiny.image(seed=number).save(folder / f"{number}.png")
    (folder / "9.png").write_bytes(b"no image")
    rows[11]["caption"] = None
    if question:
        rows = [{"image": row["image"], "question": "the red cat", "answer": row["caption"]} for row in rows]
    path = folder / ("questions.jsonl" if question else "pairs.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return path


OPTIONS = (
    *("--per_device_train_batch_size", "3", "--max_steps", "5", "--bf16", "false", "--report_to", "none"),
    *("--logging_steps", "1", "--save_strategy", "no", "--on_error", "skip"),
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower and an LLM."""
    path = tmp_path_factory.mktemp("parts")
    tiny.clip_model().save_pretrained(path / "clip")
    torch.manual_seed(0)
    tiny_blip2.llm().save_pretrained(path / "llm")
    tiny_blip2.llm_tokenizer().save_pretrained(path / "llm")
    return path


@pytest.mark.slow
def test_llava_skips_what_cannot_be_read_and_what_does_not_fit(parts: Path, tmp_path: Path) -> None:
    source = pairs(tmp_path)
    text = f"vision: {parts}/clip\nlanguage_model: {parts}/llm\nsources:\n  - {{path: {source}}}\n"
    (tmp_path / "run.yaml").write_text(text)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out"), *OPTIONS]
    llava_align.main(*parse_arguments(llava_align.main, arguments))
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())
    assert record["training"]["skipped"] == {"unreadable image": 2, "unusable text": 2}
    talk = [
        {"image": name, "conversations": [{"from": "human", "value": "<image>\nthe"}, {"from": "gpt", "value": "cat"}]}
        for name in ("0.png", "9.png", "1.png", "2.png", "3.png")
    ]
    talk[3]["conversations"] = 5
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    source = f"{{path: {tmp_path}/talk.json, image_folder: {tmp_path}}}"
    (tmp_path / "talk.yaml").write_text(f"model: {tmp_path}/out\nsources:\n  - {source}\n")
    arguments = ["--config", str(tmp_path / "talk.yaml"), "--output_dir", str(tmp_path / "talk"), *OPTIONS]
    llava_instruct.main(*parse_arguments(llava_instruct.main, arguments))
    record = json.loads((tmp_path / "talk" / "training_record.json").read_text())
    assert record["training"]["skipped"] == {"unreadable image": 1, "no conversation": 1}
    arguments[arguments.index(str(tmp_path / "talk"))] = str(tmp_path / "short")
    with pytest.raises(ValueError, match=r"5 of the first 5 rows read are bad .*too many tokens"):
        llava_instruct.main(*parse_arguments(llava_instruct.main, [*arguments, "--max_tokens", "4"]))
    (tmp_path / "talk.json").write_text(json.dumps([talk[0], talk[2], talk[4]]))
    parsed = parse_arguments(llava_instruct.main, [*arguments, "--max_tokens", "4", "--on_error", "raise"])
    with pytest.raises(ValueError, match=r"Row \d of .*talk\.json: an image of \d+ tokens"):
        llava_instruct.main(*parsed)


@pytest.mark.slow
def test_instructblip_skips_rows_with_their_texts(tmp_path: Path) -> None:
    from hf_vlm.data import InstructionRows

    options = ["--config", "small", "--on_error", "skip", "--train_rows", "40"]
    sources = [{"path": str(pairs(tmp_path))}, {"path": str(pairs(tmp_path, question=True)), "task": "vqa"}]
    (args,) = (group for group in parse(instructblip_finetune, *options[2:]) if hasattr(group, "sources"))
    args.sources, args.feature_cache = sources, None
    rows, _ = instructblip_finetune.build_data(args, 32, seed=0)
    assert isinstance(rows, InstructionRows)
    found = [rows[number] for number in range(len(rows))]
    assert {row["index"] for row in found} <= set(range(9))
    for row in found:
        assert row["image"].tobytes() == tiny.image(seed=row["index"]).convert("RGB").tobytes()
        assert row["response"] == tiny.CAPTIONS[row["index"] % 4]
    assert args.report.reasons == {"unreadable image": 4, "unusable text": 4}


def test_features_of_every_row_need_every_row() -> None:
    options = ["--sources", "[{path: a.parquet}]", "--on_error", "skip", "--feature_cache", "features"]
    with pytest.raises(ValueError, match="feature_cache holds the features of every row"):
        parse(instructblip_finetune, *options)
