"""Sources of an index: it opens every format that training opens, and no file outside a source's folder."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from cases import tiny
from hf_vlm.search.open import open_source

COUNT = 3


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    tiny.image(seed=number).save(buffer, "PNG")
    return buffer.getvalue()


def images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def dataset() -> datasets.Dataset:
    rows = {"image": [tiny.image(seed=number) for number in range(COUNT)], "caption": tiny.CAPTIONS[:COUNT]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def table(folder: Path, name: str, key: str = "image") -> Path:
    rows = [{key: f"{number}.png", "caption": tiny.CAPTIONS[number]} for number in range(COUNT)]
    path = images(folder) / name
    if name.endswith(".csv"):
        path.write_text("\n".join([f"{key},caption", *(",".join(row.values()) for row in rows)]))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path) -> Path:
    for number in range(COUNT):
        dataset().select([number]).to_parquet(folder / "shards" / f"train-{number}.parquet")
    return folder / "shards"


def saved(folder: Path) -> Path:
    datasets.DatasetDict({"train": dataset()}).save_to_disk(folder / "saved")
    return folder / "saved"


def arrow(folder: Path) -> Path:
    dataset().save_to_disk(folder / "saved")
    return next((folder / "saved").glob("*.arrow"))


def tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(COUNT):
            for extension, data in (("png", png(number)), ("txt", tiny.CAPTIONS[number].encode())):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "a.tar"


FORMATS: dict[str, Callable[[Path], Path]] = {
    "image folder with jsonl": lambda folder: table(folder / "photos", "metadata.jsonl", "file_name").parent,
    "image folder with csv": lambda folder: table(folder / "photos", "metadata.csv", "file_name").parent,
    "jsonl": lambda folder: table(folder, "a.jsonl"),
    "json": lambda folder: table(folder, "a.json"),
    "csv": lambda folder: table(folder, "a.csv"),
    "folder of parquet": parquet,
    "pattern of parquet": lambda folder: parquet(folder) / "*.parquet",
    "saved to disk": saved,
    "arrow": arrow,
    "webdataset": tar,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_items(kind: str, tmp_path: Path) -> None:
    columns = {"image": "png", "caption": "txt"} if kind == "webdataset" else None
    items = list(open_source(str(FORMATS[kind](tmp_path)), ("image", "text"), "train", columns))
    pictures = [item for item in items if item.kind == "image"]
    assert [item.load().tobytes() for item in pictures] == [tiny.image(seed=n).tobytes() for n in range(COUNT)]
    assert (
        [item.text for item in pictures]
        == [item.text for item in items if item.kind == "text"]
        == tiny.CAPTIONS[:COUNT]
    )
    assert len({item.id for item in items}) == 2 * COUNT


def test_images_and_descriptions_alone(tmp_path: Path) -> None:
    items = open_source(str(images(tmp_path / "photos")), ("image",), "train", None)
    assert [item.text for item in items] == [f"{number}.png" for number in range(COUNT)]
    (tmp_path / "a.jsonl").write_text('{"caption": "a cat", "year": 2020}\n')
    (item,) = open_source(str(tmp_path / "a.jsonl"), ("image",), "train", None)
    assert (item.kind, item.text, item.metadata) == ("text", "a cat", {"year": 2020})


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"image": "../secret.png", "caption": "a"}\n')
    with pytest.raises(ValueError, match="leads out of"):
        list(open_source(str(tmp_path / "data" / "a.jsonl"), ("image",), "train", None))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_ids_of_text_are_as_written_and_columns_keep_their_types(name: str, tmp_path: Path) -> None:
    images(tmp_path)
    ids = ["001", "1", "9007199254740993", "9007199254740992", "1e3", "1000", "", ""]
    rows = [
        {"image": f"{n % 3}.png", "caption": f"{n}", "id": row_id, "year": 2000 + n} for n, row_id in enumerate(ids)
    ]
    if name == "a.csv":
        lines = ["image,caption,id,year", *(",".join(map(str, row.values())) for row in rows)]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        text = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
    items = list(open_source(str(tmp_path / name), ("image",), "train", None))
    assert [item.id for item in items[:6]] == ids[:6]
    assert len({item.id for item in items}) == len(ids)
    assert [item.text for item in items] == [row["caption"] for row in rows]
    assert [item.metadata for item in items] == [{"year": row["year"]} for row in rows]


def test_class_names_of_an_index(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [tiny.image(seed=number) for number in range(2)], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    items = list(open_source(str(tmp_path / "saved"), ("image",), "train", {"caption": "label"}))
    assert [item.text for item in items] == ["dog", "cat"]
