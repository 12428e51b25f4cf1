"""Damaged tables: a row that cannot be read is a bad row, a file that cannot be read is refused; streamed or not."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vlm.data import DataSource, load_questions, load_source, open_conversations
from hf_vlm.data.sources import tables as tables_module
from hf_vlm.data.sources.cells import UNREADABLE
from hf_vlm.data.sources.errors import CaptionError, SourceError
from hf_vlm.data.sources.open import open_rows
from hf_vlm.data.sources.parquet import ParquetFiles, parquet_builder
from hf_vlm.data.sources.skipped import SkipReport
from hf_vlm.data.sources.tables import WrittenRows, read_table

STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0.png").write_bytes(PNG)
    return tmp_path


def line(caption: Any) -> bytes:
    return json.dumps({"image": "0.png", "caption": caption}).encode()


# The second of three rows; what is wrong with it.
BAD_ROWS: dict[str, tuple[str, bytes, str]] = {
    "Latin-1 in jsonl": ("rows.jsonl", '{"image": "0.png", "caption": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
    "Latin-1 in json": ("rows.json", '{"image": "0.png", "caption": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
    "Latin-1 in csv": ("rows.csv", "0.png,caf\xe9".encode("latin-1"), "not UTF-8"),
    "half a row": ("rows.jsonl", b'{"image": "0.png", "capt', "not valid JSON .* at character 20"),
    "two rows": ("rows.jsonl", line("b") + line("c"), "not valid JSON .Extra data"),
    "a column twice": (
        "rows.jsonl",
        b'{"image": "0.png", "caption": "a", "caption": "b"}',
        "'caption' is written twice",
    ),
    "a column twice in json": ("rows.json", b'{"image": "0.png", "image": "1.png"}', "'image' is written twice"),
    "no object": ("rows.jsonl", b"[1, 2]", "is the list"),
    "null": ("rows.jsonl", b"null", "is no value"),
    "deep": ("rows.jsonl", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "half of a surrogate pair": ("rows.jsonl", line("\ud83d"), "half of a surrogate pair"),
    "a cell more": ("rows.csv", b"0.png,b,c", r"more or fewer cells than the header .3, not 2"),
    "a cell less": ("rows.csv", b"0.png", r"more or fewer cells than the header .1, not 2"),
    "a number": ("rows.jsonl", line(5), "column 'caption' holds the number 5"),
    "half of a path": ("rows.jsonl", b'{"image": "\\ud83d.png", "caption": "b"}', "half of a surrogate pair"),
    "no path in a dict": ("rows.jsonl", b'{"image": {"path": 5}, "caption": "b"}', "column 'image' holds the dict"),
    "no path": ("rows.jsonl", b'{"image": 5, "caption": "b"}', "column 'image' holds the number 5"),
    "an id in two ways": (
        "rows.jsonl",
        b'{"image": "0.png", "caption": "b", "id": 1.50}',
        "'id' holds the number 1.50",
    ),
    "an id of truth": (
        "rows.jsonl",
        b'{"image": "0.png", "caption": "b", "id": true}',
        "column 'id' holds the bool True",
    ),
}


def write_rows(path: Path, middle: bytes) -> None:
    if path.suffix == ".csv":
        path.write_bytes(b"\n".join([b"image,caption", b"0.png,a", middle, b"0.png,c"]))
    elif path.suffix == ".json":
        path.write_bytes(b"[" + b",\n".join([line("a"), middle, line("c")]) + b"]")
    else:
        path.write_bytes(b"\n".join([line("a"), middle, line("c"), b""]))


@STREAMS
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_raises_or_is_skipped(case: str, stream: bool, folder: Path) -> None:
    name, middle, wrong = BAD_ROWS[case]
    write_rows(folder / name, middle)
    source = DataSource(str(folder / name), streaming=stream)
    place = rf"{name}(, line 3|, line 2|, item 2|, row 1)( .*)?: .*{wrong}"
    with pytest.raises((SourceError, CaptionError), match=place) as caught:
        list(load_source(source))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    report = SkipReport()
    rows = list(load_source(source, on_error="skip", report=report))
    assert [row["caption"] for row in rows] == (["a", "c"] if stream else ["a", "c", "c"])
    assert report.count == 1


LOST_ENDS: dict[str, tuple[str, bytes, str]] = {
    "cut list": ("rows.json", b"[" + line("a") + b", ", "not valid JSON .Expecting value"),
    "list without end": ("rows.json", b"[" + line("a"), "the list has no end"),
    "no comma": ("rows.json", b"[" + line("a") + line("b") + b"]", "a comma or ] is missing"),
    "text after the list": ("rows.json", b"[" + line("a") + b"] and more", "text after the list"),
    "cut quotes": ("rows.csv", b'image,caption\n0.png,a\n0.png,"b\n0.png,c\n', "not valid CSV .unexpected end of data"),
    "text after quotes": ("rows.csv", b'image,caption\n0.png,a\n0.png,"b"c\n', "not valid CSV"),
}


@STREAMS
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("case", LOST_ENDS)
def test_a_file_without_its_end_is_refused(case: str, on_error: str, stream: bool, folder: Path) -> None:
    name, content, wrong = LOST_ENDS[case]
    (folder / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{wrong}.*the rest of the file cannot be read") as caught:
        list(load_source(DataSource(str(folder / name), streaming=stream), on_error))
    assert "\n" not in str(caught.value)


@STREAMS
def test_headers_are_checked(stream: bool, folder: Path) -> None:
    for header, wrong in (
        ("image,caption,caption", "two columns are called 'caption'"),
        ("image,caf\xe9", "not UTF-8"),
    ):
        (folder / "rows.csv").write_bytes(header.encode("latin-1") + b"\n0.png,a\n")
        for on_error in ("raise", "skip"):
            with pytest.raises(SourceError, match=wrong):
                load_source(DataSource(str(folder / "rows.csv"), streaming=stream), on_error)


WHOLE: dict[str, tuple[str, bytes]] = {
    "byte order mark": ("rows.csv", b"\xef\xbb\xbfimage,caption\n0.png,a\n0.png,b\n"),
    "byte order mark, jsonl": ("rows.jsonl", b"\xef\xbb\xbf" + line("a") + b"\n" + line("b")),
    "byte order mark, json": ("rows.json", b"\xef\xbb\xbf [" + line("a") + b" , " + line("b") + b" ]\n"),
    "carriage returns": ("rows.csv", b"image,caption\r\n0.png,a\r\n0.png,b\r\n"),
    "old line ends": ("rows.csv", b"image,caption\r0.png,a\r0.png,b\r"),
    "carriage returns, jsonl": ("rows.jsonl", line("a") + b"\r\n\r\n" + line("b") + b"\r\n"),
    "blank lines": ("rows.csv", b"\nimage,caption\n\n0.png,a\n\n0.png,b"),
    "lines in .json": ("rows.json", line("a") + b"\n" + line("b")),
    "other columns": ("rows.jsonl", line("a") + b'\n{"x": NaN, "y": 1e999, "image": "0.png", "caption": "b"}'),
}


@STREAMS
@pytest.mark.parametrize("case", WHOLE)
def test_whole_files_in_their_variants(case: str, stream: bool, folder: Path) -> None:
    name, content = WHOLE[case]
    (folder / name).write_bytes(content)
    rows = load_source(DataSource(str(folder / name), streaming=stream))
    assert [row["caption"] for row in rows] == ["a", "b"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
def test_odd_line_ends_within_a_cell_stay(name: str, folder: Path) -> None:
    caption = "a\u2028b\u0085c\x0bd\r\ne\rf\ng\x1fh\t"
    quoted = caption.encode() if name == "rows.csv" else json.dumps(caption, ensure_ascii=False).encode()
    if name == "rows.csv":
        (folder / name).write_bytes(b'image,caption\n0.png,"' + quoted + b'"\n')
    else:
        row = b'{"image": "0.png", "caption": ' + quoted + b"}"
        (folder / name).write_bytes(row if name == "rows.jsonl" else b"[" + row + b"]")
    (row_read,) = load_source(DataSource(str(folder / name)))
    assert row_read["caption"] == caption


def test_a_long_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"caption": "é" * number, "n": [number, {"deep": [1.50, "]"]}]} for number in range(60)]
    for indent in (None, 2):
        (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
        expected = [row.text for row in read_table(str(tmp_path / "rows.json"))]
        assert [json.loads(text or "") for text in expected] == rows
        for chunk in (1, 2, 7, 64):
            monkeypatch.setattr(tables_module, "_CHUNK", chunk)
            assert [row.text for row in read_table(str(tmp_path / "rows.json"))] == expected
        monkeypatch.undo()
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(tables_module, "_CHUNK", chunk)
        assert [row.place for row in read_table(str(tmp_path / "rows.jsonl"))] == [f"line {n}" for n in range(1, 61)]


def test_written_rows_take_little_more_memory_than_their_file(tmp_path: Path) -> None:
    row = json.dumps({"image": "0.png", "caption": "a caption of some words " * 4})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{row}\n" * 50_000)
    before = pa.total_allocated_bytes()
    rows = WrittenRows.read([str(path)])
    assert len(rows) == 50_000
    assert pa.total_allocated_bytes() - before < 1.5 * path.stat().st_size


@STREAMS
def test_compressed_tables_of_a_folder(stream: bool, tmp_path: Path) -> None:
    whole = gzip.compress(b"image,caption,id\n" + b"0.png,a,001\n" * 9)
    (tmp_path / "train.csv.gz").write_bytes(whole)
    (first, *_) = open_rows(DataSource(str(tmp_path), streaming=stream)).rows
    assert {name: first[name] for name in ("image", "caption", "id")} == {"image": "0.png", "caption": "a", "id": "001"}
    (tmp_path / "train.csv.gz").write_bytes(whole[:-12])
    with pytest.raises(SourceError, match=r"train\.csv\.gz: cannot be read"):
        list(open_rows(DataSource(str(tmp_path), streaming=stream)).rows)


@STREAMS
def test_a_later_file_without_a_usable_header(stream: bool, folder: Path) -> None:
    (folder / "0.csv").write_text("image,caption\n0.png,a\n")
    (folder / "1.csv").write_text("image,image\n0.png,a\n")
    with pytest.raises(SourceError, match=r"1\.csv, line 1: two columns are called 'image'"):
        list(load_source(DataSource(str(folder / "*.csv"), streaming=stream)))


def test_questions_and_conversations_skip_bad_lines(folder: Path) -> None:
    asked = {"image": "0.png", "question": "what?", "answer": "red"}
    path = folder / "asked.jsonl"
    path.write_bytes(b'{"cut\n' + json.dumps(asked).encode() + b"\n")
    with pytest.raises(SourceError, match=r"asked\.jsonl, line 1: is not valid JSON"):
        load_questions([{"path": str(path)}])
    assert load_questions([{"path": str(path)}], on_error="skip", report=SkipReport(max_skipped=1.0))[0]["answers"] == [
        "red"
    ]
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_bytes(b'{"cut\n' + json.dumps(said).encode() + b"\n")
    with pytest.raises(SourceError, match=r"asked\.jsonl, line 1: is not valid JSON"):
        open_conversations({"path": str(path)})
    rows = open_conversations({"path": str(path)}, on_error="skip", report=SkipReport(max_skipped=1.0))
    assert rows[0]["messages"] == said["messages"]


def test_a_changed_file_is_read_again(folder: Path) -> None:
    path = folder / "rows.jsonl"
    for caption in ("a", "b"):
        path.write_bytes(line(caption))
        assert load_source(DataSource(str(path)))[0]["caption"] == caption
        assert next(iter(load_source(DataSource(str(path), streaming=True))))["caption"] == caption
        parquet(folder / "rows.parquet", [caption])
        assert load_source(DataSource(str(folder / "rows.parquet")))[0]["caption"] == caption


# Parquet


def parquet(path: Path, captions: Any, **columns: Any) -> None:
    pq.write_table(pa.table({"image": [PNG] * len(captions), "caption": captions, **columns}), path)


EMPTY = pa.array([], pa.null())
DIFFERING: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "a column more": (lambda path: parquet(path, ["a"]), lambda path: parquet(path, ["b"], x=[1])),
    "a column less": (lambda path: parquet(path, ["a"], x=[1]), lambda path: parquet(path, ["b"])),
    "another type": (lambda path: parquet(path, ["a"], x=[1]), lambda path: parquet(path, ["b"], x=["one"])),
    "another order": (
        lambda path: parquet(path, ["a"]),
        lambda path: pq.write_table(pa.table({"caption": ["b"], "image": [PNG]}), path),
    ),
    "no values first": (lambda path: parquet(path, ["a"], id=[None]), lambda path: parquet(path, ["b"], id=["1"])),
}


@STREAMS
@pytest.mark.parametrize("case", DIFFERING)
def test_parquet_files_may_differ(case: str, stream: bool, tmp_path: Path) -> None:
    for number, write in enumerate(DIFFERING[case]):
        write(tmp_path / f"{number}.parquet")
    for name in ("2", "3"):
        parquet(tmp_path / f"{name}.parquet", EMPTY)
    rows = load_source(DataSource(str(tmp_path / "*.parquet"), streaming=stream))
    assert [row["caption"] for row in rows] == ["a", "b"]
    if case == "no values first":
        assert [row["id"] for row in rows] == [None, "1"]


@STREAMS
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_unusable_parquet_is_refused_when_it_is_opened(on_error: str, stream: bool, tmp_path: Path) -> None:
    def refused(wrong: str) -> None:
        with pytest.raises(SourceError, match=wrong) as caught:
            list(load_source(DataSource(str(tmp_path / "*.parquet"), streaming=stream), on_error))
        assert "\n" not in str(caught.value)

    parquet(tmp_path / "0.parquet", EMPTY)
    refused(r"0\.parquet: has no rows")
    parquet(tmp_path / "0.parquet", ["a"], id=[1])
    parquet(tmp_path / "1.parquet", ["a"], id=["1"])
    refused(r"1\.parquet: the column 'id' holds string, but int64 in .*0\.parquet; write all files with one type")
    parquet(tmp_path / "1.parquet", [["a"]])
    refused(r"1\.parquet: the column 'caption' holds List, but string in .*0\.parquet")
    parquet(tmp_path / "1.parquet", [f"a caption {number}" for number in range(100)])
    whole = (tmp_path / "1.parquet").read_bytes()
    for damaged in (whole[:-20], whole[:100], b"", whole[:30] + bytes(40) + whole[70:]):
        (tmp_path / "1.parquet").write_bytes(damaged)
        refused(r"1\.parquet: is no parquet file, or damaged")


def test_methods_of_the_parquet_builder_that_are_replaced(tmp_path: Path) -> None:
    """`_generate_tables` and `_cast_table` of `datasets` are the ones that its streams and its preparation call."""
    parquet(tmp_path / "0.parquet", ["a", "b"])
    builder = parquet_builder({"train": [str(tmp_path / "0.parquet")]}, {"caption"})
    assert isinstance(builder, ParquetFiles)
    ((_, table),) = builder._generate_tables([str(tmp_path / "0.parquet")], [None])
    assert table["caption"].to_pylist() == ["a", "b"]
    without = builder._cast_table(pa.table({"caption": ["a"]}))
    assert without.schema.names == ["image", "caption"]


def test_names_with_brackets_are_no_patterns(tmp_path: Path) -> None:
    for name in ("a[1]", "[ab]", "{c}"):
        (tmp_path / name).mkdir()
        parquet(tmp_path / name / f"{name}.parquet", ["a"])
        for stream in (False, True):
            (row,) = load_source(DataSource(str(tmp_path / name / f"{name}.parquet"), streaming=stream))
            assert row["caption"] == "a"


def test_an_unreadable_row_cannot_be_forged_into_a_value(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({UNREADABLE: "a\nb", "image": "0.png", "caption": "a"}))
    with pytest.raises(SourceError) as caught:
        load_source(DataSource(str(folder / "rows.jsonl")))[0]
    assert "\n" not in str(caught.value)
