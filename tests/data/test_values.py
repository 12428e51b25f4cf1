"""Cells arrive as they are written, or are refused: whatever text a file holds, in every format, streamed or not."""

import csv
import datetime
import decimal
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_vlm.data import DataSource, PairDataset, load_pairs, load_source, question_source
from hf_vlm.data.batches.collators import pair_id
from hf_vlm.data.sources.cells import Number, read_answers, read_captions, read_id
from hf_vlm.data.sources.errors import SourceError
from hf_vlm.data.sources.open import open_rows
from hf_vlm.data.sources.stored import stored_blocks
from hf_vlm.data.sources.tables import read_table

STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "001",
        "1",
        "1e3",
        "1000",
        "0e1",
        "NaN",
        "null",
        "None",
        "NA",
        "true",
        "2024-01-01",
        "12:30",
        " a ",
        '"',
        "a,b",
        "\\",
    ]
)
# Halves of surrogate pairs too, which JSON can say and UTF-8 cannot.
ESCAPED = TEXTS | st.text(st.characters(), max_size=6)
ROWS = settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
Cells = list[tuple[Any, Any]]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0.png").write_bytes(PNG)
    return tmp_path


def write_csv(path: Path, cells: Cells) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "id"])
        writer.writerows(["0.png", caption, row_id] for caption, row_id in cells)


def objects(cells: Cells) -> list[dict[str, Any]]:
    return [{"image": "0.png", "caption": caption, "id": row_id} for caption, row_id in cells]


def write_jsonl(path: Path, cells: Cells) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in objects(cells)))


def write_json(path: Path, cells: Cells) -> None:
    path.write_text(json.dumps(objects(cells), ensure_ascii=not all(map(is_text, sum(cells, ()))), indent=1), "utf-8")


def write_parquet(path: Path, cells: Cells) -> None:
    captions, ids = zip(*cells, strict=True)
    pq.write_table(pa.table({"image": [PNG] * len(cells), "caption": list(captions), "id": list(ids)}), path)


def write_tar(path: Path, cells: Cells) -> None:
    with tarfile.open(path, "w") as archive:
        for number, (caption, row_id) in enumerate(cells):
            for name, data in (("image", PNG), ("caption", caption.encode()), ("id", row_id.encode())):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check(write: Callable[[Path, Cells], None], path: Path, cells: Cells, stream: bool) -> None:
    """The rows of a file are those that were written, less those that have no caption."""
    write(path, cells)
    good = [(caption, row_id if row_id.strip() else None) for caption, row_id in cells if kept(caption, row_id)]
    rows = load_source(DataSource(str(path), streaming=stream), on_error="skip", max_skipped=1.0)
    found = [(row["caption"], row["id"]) for row in rows] if good else []
    if not stream and good:
        # A bad row of a map-style source is replaced by the next good one.
        found = [row for row, (caption, row_id) in zip(found, cells, strict=True) if kept(caption, row_id)]
    assert found == good


def kept(caption: str, row_id: str) -> bool:
    return bool(caption.strip()) and is_text(caption) and (not row_id.strip() or is_text(row_id))


# Properties


CSV_TEXTS = TEXTS.filter(lambda text: "\0" not in text)  # a zero byte in CSV is refused, as damage


@pytest.mark.slow
@ROWS
@given(st.lists(st.tuples(CSV_TEXTS, CSV_TEXTS), min_size=1, max_size=4), st.booleans())
def test_csv_texts(folder: Path, cells: Cells, stream: bool) -> None:
    check(write_csv, folder / "rows.csv", cells, stream)


@pytest.mark.slow
@ROWS
@given(st.lists(st.tuples(ESCAPED, ESCAPED), min_size=1, max_size=4), st.booleans())
def test_jsonl_texts(folder: Path, cells: Cells, stream: bool) -> None:
    check(write_jsonl, folder / "rows.jsonl", cells, stream)


@pytest.mark.slow
@ROWS
@given(st.lists(st.tuples(ESCAPED, ESCAPED), min_size=1, max_size=4), st.booleans())
def test_json_texts(folder: Path, cells: Cells, stream: bool) -> None:
    check(write_json, folder / "rows.json", cells, stream)


@pytest.mark.slow
@ROWS
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_parquet_texts(folder: Path, cells: Cells) -> None:
    check(write_parquet, folder / "rows.parquet", cells, stream=True)


@pytest.mark.slow
@ROWS
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_tar_texts(folder: Path, cells: Cells) -> None:
    check(write_tar, folder / "rows.tar", cells, stream=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ESCAPED,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ESCAPED, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@ROWS
@given(st.lists(JSON, min_size=1, max_size=4))
def test_any_json_is_a_value_or_is_refused(folder: Path, cells: list[Any]) -> None:
    """Every reader of a role returns texts that were written, or raises a ValueError."""
    path = folder / "cells.jsonl"
    path.write_text("".join(json.dumps({"cell": cell}) + "\n" for cell in cells))
    rows = [row.cells for row in read_table(str(path))]
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        written = json.dumps(cell)
        for reader in (read_captions, read_answers, read_id):
            try:
                value = reader(row["cell"])
            except ValueError:
                continue
            texts = [value] if isinstance(value, str) else value or []
            assert all(json.dumps(text) in written or text in written for text in texts)


@pytest.mark.slow
@ROWS
@given(st.integers() | st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,9})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_numbers_of_json_keep_their_digits(folder: Path, number: Any) -> None:
    path = folder / "numbers.jsonl"
    path.write_text(f'{{"cell": {number}}}\n')
    (row,) = read_table(str(path))
    assert row.cells == {"cell": Number(str(number))}
    if str(number).lstrip("-").isdigit():
        assert read_id(row.cells["cell"]) == str(number)
    else:
        with pytest.raises(ValueError, match="can be written in several ways"):
            read_id(row.cells["cell"])


# Ids

DIFFERENT = [
    "9007199254740993",
    "9007199254740992",
    "001",
    "1",
    "1e3",
    "1000",
    "0e1",
    "0e2",
    "2024-01-01",
    "NaN",
    "nan",
    "null",
]
WRITERS: dict[str, Callable[[Path, Cells], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "json": write_json,
    "parquet": write_parquet,
    "tar": write_tar,
}


@STREAMS
@pytest.mark.parametrize("kind", WRITERS)
def test_different_ids_stay_different(kind: str, stream: bool, folder: Path) -> None:
    path = folder / f"rows.{kind}"
    WRITERS[kind](path, [(f"caption {number}", row_id) for number, row_id in enumerate([*DIFFERENT, "", "  "])])
    assert [row["id"] for row in load_source(DataSource(str(path), streaming=stream))] == [*DIFFERENT, None, None]
    pairs = load_pairs([{"path": str(path), "streaming": stream}], shuffle_captions=False)
    found = [pairs[number] for number in range(len(pairs))] if isinstance(pairs, PairDataset) else list(pairs)
    ids = {pair_id(pair["id"]) for pair in found}
    assert len(ids) == len(DIFFERENT) + 2


@STREAMS
def test_ids_of_an_image_folder(stream: bool, folder: Path) -> None:
    write_csv(folder / "rows.csv", [("a", "001"), ("b", "1")])
    (folder / "metadata.csv").write_text((folder / "rows.csv").read_text().replace("image", "file_name", 1))
    (folder / "rows.csv").unlink()
    assert [row["id"] for row in load_source(DataSource(str(folder), streaming=stream))] == ["001", "1"]


@STREAMS
def test_a_folder_of_csv_is_read_as_written(stream: bool, tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("a", "001"), ("b", "1")])
    write_csv(tmp_path / "test.csv", [("c", "1e3")])
    for split, ids in (("train", ["001", "1"]), ("test", ["1e3"]), ("train+test", ["001", "1", "1e3"])):
        opened = open_rows(DataSource(str(tmp_path), split=split, streaming=stream))
        assert [row["id"] for row in opened.rows] == ids


@STREAMS
def test_a_missing_id_equals_no_id(stream: bool, folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", [("a cat", "a dog"), ("a dog", ""), ("a dog", None), ("b", "caption")])
    pairs = load_pairs([{"path": str(folder / "rows.jsonl"), "streaming": stream}])
    found = [pairs[number] for number in range(4)] if isinstance(pairs, PairDataset) else list(pairs)
    ids = {(pair["caption"], pair_id(pair["id"])) for pair in found}
    assert (
        len(ids) == len({number for _, number in ids}) == 3
    )  # without ids, equal captions are positives of each other


TYPED = {
    "integers": (
        [9007199254740993, 9007199254740992, None],
        pa.int64(),
        ["9007199254740993", "9007199254740992", None],
    ),
    "unsigned": ([2**64 - 1], pa.uint64(), ["18446744073709551615"]),
    "nanoseconds": ([1, 2], pa.timestamp("ns"), ["1970-01-01 00:00:00.000000001", "1970-01-01 00:00:00.000000002"]),
    "dates": ([datetime.date(2024, 1, 1)], pa.date32(), ["2024-01-01"]),
    "decimals": ([decimal.Decimal("1.10")], pa.decimal128(5, 2), ["1.10"]),
    "categories": (["001", "1"], pa.dictionary(pa.int32(), pa.string()), ["001", "1"]),
    "bytes": ([b"001"], pa.binary(), ["001"]),
}


@STREAMS
@pytest.mark.parametrize("kind", TYPED)
def test_typed_ids_are_exact(kind: str, stream: bool, tmp_path: Path) -> None:
    cells, dtype, expected = TYPED[kind]
    captions = [f"{number}" for number in range(len(cells))]
    table = pa.table({"image": [PNG] * len(cells), "caption": captions, "id": pa.array(cells, dtype)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = load_source(DataSource(str(tmp_path / "a.parquet"), streaming=stream))
    assert [row["id"] for row in rows] == expected


@STREAMS
@pytest.mark.parametrize("cells", [[1.0, None], [True], [[1]], [{"a": 1}]], ids=str)
def test_ids_of_other_types_are_refused(cells: list[Any], stream: bool, tmp_path: Path) -> None:
    table = pa.table({"image": [PNG] * len(cells), "caption": ["a"] * len(cells), "id": cells})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"column 'id' holds .*; ids are texts or integers"):
        load_source(DataSource(str(tmp_path / "a.parquet"), streaming=stream))


# Classes


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three images of two classes, of which one has none, as a saved dataset."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "labels": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
        }
    )
    image = {"bytes": PNG, "path": None}
    rows = [{"image": image, "question": "what?", "label": n, "labels": [n, 0]} for n in (0, 1)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@STREAMS
def test_class_numbers_become_names(classes: Path, stream: bool) -> None:
    rows = load_source(DataSource(str(classes), columns={"caption": "label"}, streaming=stream))
    assert [row["caption"] for row in rows] == ["cat", "dog"]
    rows = load_source(DataSource(str(classes), columns={"caption": "labels"}, streaming=stream))
    assert [row["caption"] for row in rows] == [["cat", "cat"], ["dog", "cat"]]


def test_class_numbers_of_questions_and_stored_rows(classes: Path) -> None:
    questions = load_source(question_source({"path": str(classes), "columns": {"answer": "label"}}))
    assert [row["answer"] for row in questions] == [["cat"], ["dog"]]
    (block,) = stored_blocks(DataSource(str(classes), columns={"caption": "label"}), 2)
    assert [row.captions for row in block] == [["cat"], ["dog"]]
