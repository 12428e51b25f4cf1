"""Split expressions give the same rows for every kind of source, as `datasets` does, or are refused in one line."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_vlm.data import DataSource, load_source, open_conversations, question_source
from hf_vlm.data.sources.errors import SourceError

COUNT = {"train": 110, "test": 7}
EXPRESSIONS = [
    "train",
    "test",
    "train[:50%]",
    "train[10:20]",
    "train[-5:]",
    "train[:-100]",
    "train+test",
    "test[2:4]+train[:1]",
    "train[:33%](pct1_dropremainder)",
    "train[60%:61%]",
    "train[:1]+train[:1]",
    "all",
]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def rows(split: str) -> list[dict]:
    return [{"image": "0.png", "caption": f"{split} {number}"} for number in range(COUNT[split])]


def dataset(split: str) -> datasets.Dataset:
    found = [{**row, "image": {"bytes": PNG, "path": None}} for row in rows(split)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_list(found, features=features)


def saved(folder: Path) -> str:
    datasets.DatasetDict({split: dataset(split) for split in COUNT}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def parquets(folder: Path) -> str:
    for split in COUNT:
        dataset(split).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def jsonls(folder: Path) -> str:
    for split in COUNT:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(split)))
    return str(folder)


def csvs(folder: Path) -> str:
    for split in COUNT:
        write_csv(folder / f"{split}.csv", split, "image")
    return str(folder)


def write_csv(path: Path, split: str, image: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[image, "caption"], *(row.values() for row in rows(split))])


def image_folder(folder: Path) -> str:
    for split in COUNT:
        (folder / split).mkdir()
        (folder / split / "0.png").write_bytes(PNG)
        write_csv(folder / split / "metadata.csv", split, "file_name")
    return str(folder)


def tars(folder: Path) -> str:
    for split in COUNT:
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            for number, row in enumerate(rows(split)):
                for name, data in (("image", PNG), ("caption", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{number}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(folder)


FOLDERS: dict[str, Callable[[Path], str]] = {
    "save_to_disk": saved,
    "parquet": parquets,
    "jsonl": jsonls,
    "csv": csvs,
    "image folder": image_folder,
    "tar": tars,
}
FILES = {name: FOLDERS[name] for name in ("parquet", "jsonl", "csv", "tar")}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[str]]:
    """The captions of each expression according to `datasets` itself."""
    found = {}
    for expression in EXPRESSIONS:
        spec = "train+test" if expression == "all" else expression
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(COUNT)
        found[expression] = [f"{part.splitname} {n}" for part in parts for n in range(part.from_, part.to)]
    return found


@pytest.mark.parametrize("kind", FOLDERS)
def test_expressions_of_a_source_with_splits(kind: str, expected: dict[str, list[str]], tmp_path: Path) -> None:
    path = FOLDERS[kind](tmp_path)
    if kind in ("jsonl", "csv"):
        (tmp_path / "0.png").write_bytes(PNG)
    for expression in EXPRESSIONS:
        found = load_source(DataSource(path, split=expression))
        assert list(captions(found)) == expected[expression], expression
        assert len(found) == len(expected[expression])
        stream = DataSource(path, split=expression, streaming=True)
        if "[" in expression:
            with pytest.raises(SourceError, match=r"is a slice.*leave out streaming"):
                load_source(stream)
        else:
            assert [row["caption"] for row in load_source(stream)] == expected[expression], expression
    for stream in (False, True):
        for wrong in ("validation", "train+validation"):
            with pytest.raises(SourceError, match=r"no split 'validation'; it has (train, test|test, train)"):
                load_source(DataSource(path, split=wrong, streaming=stream))
    for wrong, why in (
        ("train[5:5]", "has no rows in split"),
        ("test[:1%]", "has no rows in split .*test has 7 rows"),
        ("train[::2]", "cannot be read"),
        ("train[:50%", "cannot be read"),
        ("train[:101%]", "cannot be read"),
        ("test[:50%](pct1_dropremainder)", "cannot be read"),
    ):
        with pytest.raises(SourceError, match=why) as caught:
            load_source(DataSource(path, split=wrong))
        assert "\n" not in str(caught.value)


def captions(found: datasets.Dataset) -> list[str]:
    cells = found.with_format(None)["caption"][:]
    return [cell[0] if isinstance(cell, list) else cell for cell in cells]


@pytest.mark.parametrize("kind", FILES)
def test_files_hold_one_split(kind: str, expected: dict[str, list[str]], tmp_path: Path) -> None:
    FILES[kind](tmp_path)
    (tmp_path / "0.png").write_bytes(PNG)
    train, test = str(tmp_path / f"train.{kind}"), str(tmp_path / f"te*.{kind}")
    for expression in ("train", "train[:50%]", "train[-5:]", "train[:33%](pct1_dropremainder)"):
        assert captions(load_source(DataSource(train, split=expression))) == expected[expression]
    for split in ("train", "test", "all"):
        assert captions(load_source(DataSource(test, split=split))) == expected["test"]
    for path, split in ((train, "test"), (train, "train+test"), (test, "validation"), (train, "test[:3]")):
        for stream in (False, True):
            with pytest.raises(SourceError, match=r"no split '(test|validation)'; files hold one split"):
                load_source(DataSource(path, split=split, streaming=stream))
    with pytest.raises(SourceError, match="is a slice"):
        load_source(DataSource(train, split="train[:3]", streaming=True))


def test_questions_and_conversations_take_the_same_splits(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    cells = [{"question": f"{number}", "answer": "red", "messages": said} for number in range(10)]
    datasets.Dataset.from_list(cells).add_column("image", [PNG] * 10).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**cell, "image": "0.png"}) + "\n" for cell in cells))
    for name in ("saved", "rows.jsonl"):
        path = str(tmp_path / name)
        asked = load_source(question_source({"path": path, "split": "train[40%:60%]"}))
        assert [asked.texts(number)["question"] for number in range(len(asked))] == ["4", "5"]
        assert len(open_conversations({"path": path, "split": "train[:30%]", "image_folder": str(tmp_path)})) == 3
        for opened in (
            lambda split, path=path: load_source(question_source({"path": path, "split": split})),
            lambda split, path=path: open_conversations({"path": path, "split": split}),
        ):
            with pytest.raises(SourceError, match="no split 'test'"):
                opened("test[:30%]")


def test_a_saved_split_keeps_its_name(tmp_path: Path) -> None:
    table = datasets.Dataset(dataset("test").data, split=datasets.Split.TEST)
    table.save_to_disk(tmp_path / "saved")
    for split, count in (("test", 7), ("train", 7), ("test[:3]", 3), ("train[:3]", 3)):
        assert len(load_source(DataSource(str(tmp_path / "saved"), split=split))) == count
    with pytest.raises(SourceError, match="no split 'validation'"):
        load_source(DataSource(str(tmp_path / "saved"), split="validation"))
