"""Nothing of another's data leads a reader out of the folder of that data, and no URL in it is fetched."""

import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vlm.data.sources.conversations import open_conversations
from hf_vlm.data.sources.images import ImageError, load_image
from hf_vlm.data.sources.load import load_source
from hf_vlm.data.sources.open import DataSource, _check_built, open_rows, undecoded
from hf_vlm.data.sources.questions import QuestionSource
from hf_vlm.data.sources.rows import Origin, SourceError, image_of
from hf_vlm.paths import is_inside, leads_out
from hf_vlm.search.items import folder_items

TALK = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 200, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "secret.csv").write_text("image,caption\nsecret.png,a secret\n")
    return tmp_path / "secret.png"


@pytest.fixture
def folder(tmp_path: Path, secret: Path) -> Path:
    """A folder with a good image, and links to a file and to the folder outside."""
    made = tmp_path / "data"
    made.mkdir()
    (made / "good.png").write_bytes(png())
    (made / "link.png").symlink_to(secret)
    (made / "linked").symlink_to(tmp_path)
    return made


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"A connection was asked for: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# The rule


def test_links_are_resolved_on_both_sides(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    (folder / "again.png").symlink_to("good.png")
    for inside in ("good.png", "again.png", "x/../good.png", "linked/data/good.png", "absent.png", "."):
        assert is_inside(folder / inside, folder), inside
        assert is_inside(tmp_path / "alias" / inside, folder), inside
        assert is_inside(folder / inside, tmp_path / "alias"), inside
    for outside in ("link.png", "linked/secret.png", "../secret.png", "..", "../data2/a.png"):
        assert not is_inside(folder / outside, folder), outside


def test_the_hubs_cache_is_one_folder(tmp_path: Path, secret: Path) -> None:
    """A commit in the Hub's cache consists of links to blobs."""
    repository = tmp_path / "hub" / "datasets--org--name"
    commit = repository / "snapshots" / "abc" / "train"
    commit.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1234").write_bytes(png())
    (commit / "a.png").symlink_to(Path("../../../blobs/1234"))
    (commit / "b.png").symlink_to(secret)
    for root in (commit, commit.parent):
        assert is_inside(commit / "a.png", root)
        assert not is_inside(commit / "b.png", root)
    (repository / "blobs" / "1234").unlink()
    (repository / "blobs").rmdir()
    (repository / "blobs").symlink_to(tmp_path)  # what an archive could hold that only looks like a cache
    assert not is_inside(commit / "b.png", commit)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/a.csv",
        "../a.csv",
        "a/../../b",
        "a/..",
        "http://host/a",
        "file:/etc/a",
        "~/a",
        "zip://a::b",
        "C:\\a",
        "\\a",
    ],
)
def test_names_that_lead_out(name: str) -> None:
    assert leads_out(name)


@pytest.mark.parametrize("name", ["a.csv", "data/*.parquet", "a..b/c", "...", "**/train-[0-9]*.tar", "a b", "~a"[1:]])
def test_names_that_stay(name: str) -> None:
    assert not leads_out(name)


# Cells


@pytest.mark.parametrize(
    ("cell", "error", "wrong"),
    [
        ("../secret.png", SourceError, "leads out of"),
        ({"bytes": None, "path": "link.png"}, SourceError, "leads out of"),
        ("linked/secret.png", SourceError, "leads out of"),
        ("http://host/a.png", ImageError, "a URL, which is not downloaded"),
        ("zip://a.png::good.zip", ImageError, "a URL, which is not downloaded"),
        ({"bytes": "good.png", "path": None}, ImageError, "the bytes of the image are 'good.png'"),
        ({"path": 5}, ImageError, "the path of the image is 5"),
        ("half \ud83d.png", ImageError, "no file can have this name"),
        ("a\0b.png", ImageError, "no file can have this name"),
    ],
)
@pytest.mark.parametrize("built", [False, True], ids=["table", "image folder"])
def test_cells_that_are_refused(cell: Any, error: type[Exception], wrong: str, built: bool, folder: Path) -> None:
    with pytest.raises(error, match=f"row 3: .*{wrong}"):
        image_of(cell, Origin("a", folder, built), "row 3")


def test_files_of_an_image_folder_on_the_hub_come_from_its_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin("org/name", None, built=True)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    (tmp_path / "downloads").mkdir()
    assert image_of(str(tmp_path / "downloads" / "a"), origin, "row 3") == tmp_path / "downloads" / "a"
    for path in ("/etc/a.png", "../a.png", str(tmp_path / "b")):
        with pytest.raises(SourceError, match="leads out of"):
            image_of(path, origin, "row 3")
    for url in ("hf://datasets/org/other@main/a.png", "hf://datasets/org/name2@main/a.png", "http://host/a.png"):
        with pytest.raises(ImageError, match="a URL"):
            image_of(url, origin, "row 3")
        with pytest.raises(ImageError, match="a URL"):
            image_of(f"zip://a.png::{url}", origin, "row 3")


# Readers


def nested(path: str) -> datasets.Dataset:
    """Conversations whose images are within the messages, of the type that `datasets` opens."""
    image = {"bytes": None, "path": path}
    part = {"type": datasets.Value("string"), "image": datasets.Image()}
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string"), "parts": [part]}
    features = datasets.Features({"messages": [turn], "images": datasets.List(datasets.Image())})
    turns = [{**each, "parts": [{"type": "image", "image": image}]} for each in TALK]
    table = pa.Table.from_pylist([{"messages": turns, "images": [image]}], schema=features.arrow_schema)
    return datasets.Dataset(table)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["http://127.0.0.1:1/a.png", "secret"])
def test_nested_images_are_not_opened(path: str, streaming: bool, folder: Path, secret: Path) -> None:
    path = str(secret) if path == "secret" else path
    pq.write_table(nested(path).data.table, folder / "a.parquet")
    rows = undecoded(open_rows(DataSource(str(folder / "a.parquet"), streaming=streaming)).rows)
    (row,) = rows
    image = {"bytes": None, "path": path}
    assert row["messages"][0]["parts"] == [{"type": "image", "image": image}]
    assert row["images"] == [image]
    if not streaming:
        assert rows.select_columns(["messages"])[0]["messages"] == row["messages"]
        with pytest.raises(ValueError, match=r"give image_folder"):
            open_conversations({"path": str(folder / "a.parquet")})[0]
        with pytest.raises(ValueError, match=r"leads out of|a URL, which is not downloaded"):
            open_conversations({"path": str(folder / "a.parquet"), "image_folder": str(folder)})[0]


def test_conversations_follow_no_link_out_of_their_folder(folder: Path) -> None:
    for path in ("link.png", "linked/secret.png"):
        (folder / "a.jsonl").write_text(json.dumps({"messages": TALK, "image": path}) + "\n")
        rows = open_conversations({"path": str(folder / "a.jsonl"), "image_folder": str(folder)})
        with pytest.raises(SourceError, match=r"Row 0 of .*leads out of"):
            rows[0]


def test_bytes_in_json_are_no_path(folder: Path, secret: Path) -> None:
    """JSON has no bytes: what stands in their place is a text, which must not be opened."""
    row = {"image": {"bytes": str(secret)}, "question": "what?", "answer": "a"}
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ImageError, match="the bytes of the image are"):
        load_source(QuestionSource(str(folder / "a.jsonl")))[0]


def test_an_index_of_a_folder_follows_no_link_out_of_it(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"link\.png: .*leads out of"):
        folder_items(folder)
    (folder / "link.png").unlink()
    assert [item.text for item in folder_items(folder)] == ["good.png"]


def test_a_pipe_is_no_image(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png: a pipe or device"):
        load_image(folder / "pipe.png")


# Folders that name their files


def card(folder: Path, configs: str, name: str = "README.md") -> None:
    fence = "---\n" if name == "README.md" else ""
    (folder / name).write_text(f"{fence}configs:\n{configs}{fence}")


CARDS: dict[str, Callable[[Path], str]] = {
    "absolute": lambda secret: f"- config_name: default\n  data_files: {secret.with_suffix('.csv')}\n",
    "parent": lambda secret: "- config_name: default\n  data_files: ../secret.csv\n",
    "url": lambda secret: "- config_name: default\n  data_files: http://127.0.0.1:1/secret.csv\n",
    "split": lambda secret: (
        "- config_name: default\n  data_files:\n  - split: train\n    path: [good.csv, ../secret.csv]\n"
    ),
    "second config": lambda secret: (
        "- config_name: default\n  data_files: good.csv\n- config_name: b\n  data_files: ../secret.csv\n"
    ),
    "data_dir": lambda secret: f"- config_name: default\n  data_dir: {secret.parent}\n",
    "hub": lambda secret: "- config_name: default\n  data_files: hf://datasets/org/private/a.parquet\n",
}


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("kind", CARDS)
def test_a_card_names_no_files_elsewhere(kind: str, name: str, folder: Path, secret: Path) -> None:
    (folder / "good.csv").write_text("image,caption\ngood.png,a cat\n")
    card(folder, CARDS[kind](secret), name)
    with pytest.raises(SourceError, match=r"its dataset card, under data_(files|dir), names"):
        load_source(DataSource(str(folder)))


def test_a_card_that_names_its_own_files_is_read(folder: Path) -> None:
    (folder / "linked").unlink()
    (folder / "good.csv").write_text("image,caption\ngood.png,a cat\n")
    (folder / "bad.csv").write_text("image,caption\ngood.png,a dog\n")
    card(folder, "- config_name: default\n  data_files:\n  - split: train\n    path: good.csv\n")
    assert [row["caption"] for row in load_source(DataSource(str(folder)))] == ["a cat"]


@pytest.mark.parametrize("text", ["---\nconfigs: 5\n---\n", "---\nconfigs: [5]\n---\n", "---\n{\n---\n", "no header"])
def test_a_broken_card_is_one_line_or_ignored(text: str, folder: Path) -> None:
    (folder / "linked").unlink()
    (folder / "README.md").write_text(text)
    (folder / "good.csv").write_text("image,caption\ngood.png,a cat\n")
    try:
        assert len(load_source(DataSource(str(folder)))) == 1
    except SourceError as error:
        assert str(folder) in str(error)  # noqa: PT017


@pytest.mark.parametrize("streaming", [False, True])
def test_a_linked_file_of_a_folder_is_refused(streaming: bool, folder: Path, secret: Path) -> None:
    (folder / "linked").unlink()
    (folder / "train.csv").symlink_to(secret.with_suffix(".csv"))
    for data_files in (None, "train.csv", "*.csv"):
        with pytest.raises(SourceError, match=r"train\.csv: leads out of"):
            load_source(DataSource(str(folder), data_files=data_files, streaming=streaming))
    with pytest.raises(SourceError, match=r"train\.csv: leads out of"):
        load_source(DataSource(str(folder / "*.csv"), streaming=streaming))


def test_linked_metadata_is_refused(folder: Path, secret: Path) -> None:
    for link in ("link.png", "linked"):
        (folder / link).unlink()
    (folder / "metadata.csv").symlink_to(secret.with_suffix(".csv"))
    with pytest.raises(SourceError, match=r"metadata\.csv: leads out of"):
        open_rows(QuestionSource(str(folder)))


@pytest.mark.parametrize(
    "name", ["../secret.csv", "/etc/*.csv", "http://127.0.0.1:1/a.csv", ["good.csv", "../secret.csv"]]
)
@pytest.mark.parametrize("path", ["folder", "org/name"])
def test_data_files_lie_within_the_source(name: Any, path: str, folder: Path) -> None:
    (folder / "good.csv").write_text("image,caption\ngood.png,a cat\n")
    with pytest.raises(SourceError, match="data_files names"):
        load_source(DataSource(str(folder) if path == "folder" else path, data_files=name))


@pytest.mark.parametrize("listed", ["../../other/data.arrow", "absolute", "link.arrow"])
def test_a_saved_dataset_lists_no_other_files(listed: str, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        datasets.Dataset.from_dict({"image": ["a.png"], "caption": [name]}).save_to_disk(tmp_path / name)
    other = next((tmp_path / "other").glob("*.arrow"))
    (tmp_path / "mine" / "link.arrow").symlink_to(other)
    state = json.loads((tmp_path / "mine" / "state.json").read_text())
    state["_data_files"] = [{"filename": str(other) if listed == "absolute" else listed}]
    (tmp_path / "mine" / "state.json").write_text(json.dumps(state))
    with pytest.raises(SourceError, match=r"state\.json names|leads out of"):
        load_source(DataSource(str(tmp_path / "mine")))


@pytest.mark.parametrize("split", ["../other", "linked"])
def test_saved_splits_lie_within_their_folder(split: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["a"]})
    rows.save_to_disk(tmp_path / "other")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "mine")
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "mine" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", split]}))
    with pytest.raises(SourceError, match=r"dataset_dict\.json names|leads out of"):
        load_source(DataSource(str(tmp_path / "mine")))


@pytest.mark.parametrize("content", ["{}", "[]", '{"_data_files": [5]}', "{"])
def test_a_broken_list_of_saved_files_is_one_line(content: str, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["a"]}).save_to_disk(tmp_path / "mine")
    (tmp_path / "mine" / "state.json").write_text(content)
    with pytest.raises(SourceError, match=r"state\.json: is not as save_to_disk writes it"):
        load_source(DataSource(str(tmp_path / "mine")))


@pytest.mark.parametrize(
    ("kind", "file", "wrong"),
    [
        ("parquet", "hf://datasets/org/other@abc/a.parquet", "its dataset card names"),
        ("csv", "/etc/secret.csv", "its dataset card names"),
        ("csv", "http://host/a.csv", "its dataset card names"),
        ("hdf5", "hf://datasets/org/name@abc/a.h5", "holds hdf5 data"),
    ],
)
def test_a_dataset_on_the_hub_is_made_of_its_own_files(kind: str, file: str, wrong: str) -> None:
    config = SimpleNamespace(data_files={"train": ["hf://datasets/org/name@abc/good.parquet", file]})
    with pytest.raises(SourceError, match=wrong):
        _check_built(DataSource("org/name"), None, SimpleNamespace(name=kind, config=config))
    config.data_files["train"].pop()
    _check_built(DataSource("org/name"), None, SimpleNamespace(name="parquet", config=config))
