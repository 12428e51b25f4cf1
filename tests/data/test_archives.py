"""Tar archives and other files that may be cut: read right or refused with a line that names them; streamed and not."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.distributed import split_dataset_by_node
from PIL import Image

from hf_vlm.data.sources.archives import open_archives
from hf_vlm.data.sources.conversations import open_conversations
from hf_vlm.data.sources.load import load_source
from hf_vlm.data.sources.open import DataSource
from hf_vlm.data.sources.questions import question_source
from hf_vlm.data.sources.rows import SkipReport, SourceError

COUNT = 9
COLUMNS = {"image": "png", "caption": "txt"}
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
SKIPS = pytest.mark.parametrize("on_error", ["raise", "skip"])
Members = list[tuple[str, bytes]]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int = COUNT) -> Members:
    return [pair for n in range(count) for pair in ((f"{n}.png", png(n)), (f"{n}.txt", f"number {n}".encode()))]


def write(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def source(path: Path | str, stream: bool, **fields) -> DataSource:
    return DataSource(str(path), **{"columns": COLUMNS, "streaming": stream, **fields})


def captions(path: Path | str, stream: bool, on_error: str = "raise", report: SkipReport | None = None) -> list[str]:
    return [row["caption"] for row in load_source(source(path, stream), on_error, report)]


def size_of(path: Path) -> int:
    """Bytes of an archive without the blocks that mark its end."""
    with tarfile.open(path) as archive:
        archive.getmembers()
        return archive.offset


CUTS: dict[str, Callable[[int], int]] = {
    "at the first header": lambda size: 512 * 2,
    "at a header": lambda size: 512 * 2 * 5,
    "within a header": lambda size: 512 * 2 * 5 + 100,
    "within a body": lambda size: 512 * 2 * 5 + 512 + 40,
    "after a body": lambda size: 512 * 2 * 5 + 512 + len("number 2"),
    "within the last body": lambda size: size - 510,
    "before the end blocks": lambda size: size,
    "within the end block": lambda size: size + 100,
    "everything": lambda size: 0,
}


@SKIPS
@STREAMS
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_archive_is_refused(cut: str, stream: bool, on_error: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples())
    path.write_bytes(path.read_bytes()[: CUTS[cut](size_of(path))])
    with pytest.raises(SourceError, match=r"a\.tar: .*(cut|not a tar archive|damaged)") as caught:
        captions(path, stream, on_error)
    assert "\n" not in str(caught.value)


def test_whole_archives_of_every_padding_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples())
    whole = path.read_bytes()
    for blocks in (1, 2, 7):  # one block of zeros marks the end; POSIX writes two
        path.write_bytes(whole[: size_of(path)] + bytes(512 * blocks))
        assert captions(path, stream=False) == captions(path, stream=True) == [f"number {n}" for n in range(COUNT)]


@STREAMS
def test_damaged_headers_are_refused(stream: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples())
    whole = path.read_bytes()
    for at in (0, 512 * 2, 512 * 2 * 9, size_of(path) - 1024):
        path.write_bytes(whole[: at + 3] + b"?" + whole[at + 4 :])
        with pytest.raises(SourceError, match=r"a\.tar: .*(header at byte|not a tar archive)"):
            captions(path, stream)
    path.write_bytes(whole + whole)
    with pytest.raises(SourceError, match=r"a\.tar: there is data after the end"):
        captions(path, stream)
    path.write_bytes(b"\x1f\x8b" + whole[2:])
    with pytest.raises(SourceError, match=r"a\.tar: is not a tar archive.*unpack"):
        captions(path, stream)


@STREAMS
def test_a_damaged_archive_among_others_is_named(stream: bool, tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.tar", samples())
    path = tmp_path / "b.tar"
    path.write_bytes(path.read_bytes()[: 512 * 2 * 5])
    with pytest.raises(SourceError, match=r"b\.tar: the archive was cut"):  # at opening, also a stream
        load_source(source(tmp_path / "*.tar", stream), "skip")
    with pytest.raises(SourceError, match=r"b\.tar: the archive was cut"):
        load_source(source(tmp_path, stream), "skip")


def linked(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("3.jpg")
    member.type, member.linkname = kind, "0.png"
    return member


def negative() -> tarfile.TarInfo:
    member = tarfile.TarInfo("3.txt")
    member.size = -1024
    return member


STRANGE: dict[str, tuple[Callable[[], tarfile.TarInfo], str]] = {
    "symbolic link": (lambda: linked(tarfile.SYMTYPE), "a link"),
    "hard link": (lambda: linked(tarfile.LNKTYPE), "a link"),
    "device": (lambda: linked(tarfile.CHRTYPE), "no plain file"),
    "block device": (lambda: linked(tarfile.BLKTYPE), "no plain file"),
    "pipe": (lambda: linked(tarfile.FIFOTYPE), "no plain file"),
    "absolute": (lambda: tarfile.TarInfo("/etc/3.png"), "leads out"),
    "upwards": (lambda: tarfile.TarInfo("a/../../3.png"), "leads out"),
    "negative size": (negative, "is negative"),
}


@SKIPS
@STREAMS
@pytest.mark.parametrize("kind", STRANGE)
def test_links_devices_and_names_that_lead_out(kind: str, stream: bool, on_error: str, tmp_path: Path) -> None:
    make, reason = STRANGE[kind]
    path = write(tmp_path / "a.tar", samples(3))
    with tarfile.open(path, "a") as archive:
        archive.addfile(make())
    with pytest.raises(SourceError, match=rf"a\.tar: .*{reason}"):
        captions(path, stream, on_error)


@STREAMS
def test_long_names_folders_and_hidden_files(stream: bool, tmp_path: Path) -> None:
    long = "x" * 150
    members = [
        (f"{long}/0.png", png(0)),
        (f"{long}/0.txt", b"number 0"),
        ("._1.png", b"of macOS"),
        ("__MACOSX", b""),
        ("LICENSE", b"CC0"),
        ("a.b/1.png", png(1)),
        ("a.b/1.txt", b"number 1"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        assert captions(tmp_path / "a.tar", stream) == ["number 0", "number 1"]


BAD: dict[str, Members] = {
    "not UTF-8": [("4.png", png(4)), ("4.txt", "Café".encode("latin-1"))],
    "a member twice": [("4.png", png(4)), ("4.txt", b"one"), ("4.txt", b"two")],
    "an image twice": [("4.png", png(4)), ("4.png", png(5)), ("4.txt", b"one")],
    "no text": [("4.png", png(4))],
    "no image": [("4.txt", b"one")],
    "an empty text": [("4.png", png(4)), ("4.txt", b" ")],
    "a surrogate": [("4.png", png(4)), ("4.txt", "\ud800".encode("utf-8", "surrogatepass"))],
    "a cut image": [("4.png", png(4)[:-30]), ("4.txt", b"one")],
}


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@STREAMS
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_sample_is_one_bad_row(bad: str, stream: bool, first: bool, tmp_path: Path) -> None:
    members = BAD[bad] + samples(4) if first else samples(8) + [(f"x{name}", data) for name, data in BAD[bad]]
    path = write(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"a\.tar.* Or load the source with on_error='skip'"):
        captions(path, stream)
    report = SkipReport()
    found = captions(path, stream, "skip", report)
    good = [f"number {n}" for n in range(4 if first else 8)]
    replaced = [] if stream else [good[0]]
    assert found == (replaced + good if first else good + replaced)
    assert report.count == 1


@STREAMS
def test_a_member_that_no_role_names_is_not_read(stream: bool, tmp_path: Path) -> None:
    members = [m for n in range(3) for m in (*samples()[2 * n : 2 * n + 2], (f"{n}.json", b"{"), (f"{n}.npy", b"?"))]
    path = write(tmp_path / "a.tar", [*members, ("3.png", png(3)), ("3.txt", b"number 3"), ("3.txt.gz", b"\x1f\x8b")])
    assert captions(path, stream) == [f"number {n}" for n in range(4)]


@STREAMS
def test_texts_arrive_as_written(stream: bool, tmp_path: Path) -> None:
    texts = ["007", "1e3", " a \n", "2024-01-01", "null", "日本\u2028語", '"x"', "0"]
    members = [m for n, text in enumerate(texts) for m in ((f"{n}.png", png(n)), (f"{n}.cls", text.encode()))]
    rows = load_source(source(write(tmp_path / "a.tar", members), stream, columns={"image": "png", "caption": "cls"}))
    assert [row["caption"] for row in rows] == texts


@STREAMS
def test_captions_in_json(stream: bool, tmp_path: Path) -> None:
    members = [
        *[("0.png", png(0)), ("0.json", b'"one"'), ("1.png", png(1)), ("1.json", b'["two", "three"]')],
        *[("2.png", png(2)), ("2.json", b'{"caption": 1}'), ("3.png", png(3)), ("3.json", b"{")],
    ]
    path = write(tmp_path / "a.tar", members)
    report = SkipReport(max_skipped=1.0)
    opened = source(path, stream, columns={"image": "png", "caption": "json"})
    found = [row["caption"] for row in load_source(opened, "skip", report)]
    assert found[:2] == ["one", ["two", "three"]]
    assert report.count == 2
    with pytest.raises(ValueError, match=r"a\.tar"):
        list(load_source(opened))


@STREAMS
def test_names_that_are_not_utf8(stream: bool, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name, data in [("café.png", png(0)), ("café.txt", b"coffee"), ("thé.png", png(1)), ("thé.txt", b"tea")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert captions(tmp_path / "a.tar", stream) == ["coffee", "tea"]
    named = source(tmp_path / "a.tar", stream, columns={**COLUMNS, "id": "__key__"})
    assert [row["id"] for row in load_source(named)] == ["caf\\xe9", "th\\xe9"]


@STREAMS
def test_columns_beyond_the_first_samples(stream: bool, tmp_path: Path) -> None:
    bare = [(f"a{n}.png", png(n)) for n in range(40)]
    path = write(tmp_path / "a.tar", bare + samples(50))
    assert len(captions(path, True, "skip", SkipReport(max_skipped=1.0))) == 50
    with pytest.raises(SourceError, match="no column 'text'; it has png"):
        load_source(source(path, stream, columns={**COLUMNS, "caption": "text"}))


def test_an_empty_archive_among_others(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [])
    with pytest.raises(SourceError, match=r"a\.tar: has no rows"):
        load_source(source(tmp_path / "a.tar", stream=True))
    write(tmp_path / "b.tar", samples(2))
    for stream in (False, True):
        assert captions(tmp_path / "*.tar", stream) == ["number 0", "number 1"]


def test_a_changed_archive_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples(2))
    assert len(captions(path, stream=False)) == 2
    write(path, samples(3))
    assert len(captions(path, stream=False)) == 3


def test_streams_resume_shuffle_and_split(tmp_path: Path) -> None:
    for shard in range(4):
        write(tmp_path / f"{shard}.tar", [(f"{shard}{name}", data) for name, data in samples(3)])
    files = [str(tmp_path / f"{shard}.tar") for shard in range(4)]
    rows = open_archives(files, streaming=True)
    assert rows.num_shards == 4
    keys = [row["__key__"] for row in rows]
    assert len(keys) == len(set(keys)) == 12
    for stop in (0, 2, 3, 7):
        rows = open_archives(files, streaming=True)
        iterator = iter(rows)
        seen = [next(iterator)["__key__"] for _ in range(stop)]
        resumed = open_archives(files, streaming=True)
        resumed.load_state_dict(rows.state_dict())
        assert seen + [row["__key__"] for row in resumed] == keys
    shuffled = rows.shuffle(seed=1, buffer_size=1)
    assert sorted(row["__key__"] for row in shuffled) == keys != [row["__key__"] for row in shuffled]
    halves = [split_dataset_by_node(rows, rank, 2) for rank in range(2)]
    assert sorted(row["__key__"] for half in halves for row in half) == keys


def test_questions_and_conversations_in_archives(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    members = []
    for n in range(3):
        members += [(f"{n}.png", png(n)), (f"{n}.q.txt", b"what?"), (f"{n}.a.cls", b"007")]
        members += [(f"{n}.json", b"{" if n == 2 else json.dumps(talk).encode())]
    path = write(tmp_path / "a.tar", members)
    columns = {"image": "png", "question": "q.txt", "answer": "a.cls"}
    rows = load_source(question_source({"path": str(path), "columns": columns}))
    assert [(row["question"], row["answer"]) for row in rows] == [("what?", ["007"])] * 3
    fields = {"path": str(path), "columns": {"messages": "json", "image": "png"}}
    report = SkipReport()
    found = open_conversations(fields, on_error="skip", report=report)
    assert [row["messages"][1]["content"] for row in found] == ["A cat."] * 3
    assert report.count == 1
    with pytest.raises(ValueError, match=r"Row 2 .*a\.tar.*not valid JSON"):
        open_conversations(fields)[2]


def test_slices_of_archives(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples())
    rows = load_source(source(path, stream=False, split="train[:4]"))
    assert [row["caption"] for row in rows] == [f"number {n}" for n in range(4)]


def test_errors_show_no_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [*samples(1), ("/\x1b[31m.png", png(1))])
    with pytest.raises(SourceError) as caught:
        captions(path, stream=True)
    assert re.search(r"\\x1b", str(caught.value))
    assert str(caught.value).isprintable()


@SKIPS
@STREAMS
def test_a_cut_arrow_file_is_refused(stream: bool, on_error: str, tmp_path: Path) -> None:
    """Also between two batches, where arrow itself reads it as a shorter file; in a folder of `save_to_disk` too."""
    table = pa.table({"image": [png(n) for n in range(9)], "caption": [f"number {n}" for n in range(9)]})
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        ends = []
        for start in range(0, 9, 3):
            writer.write_table(table.slice(start, 3))
            ends.append(file.tell())
    whole = path.read_bytes()
    assert len(list(load_source(DataSource(str(path), streaming=stream), on_error))) == 9
    blank = whole[: ends[0]] + bytes(8) + whole[ends[0] + 8 :]
    for data in (whole[: ends[0]], whole[: ends[1]], whole[: ends[2]], whole[:-3], whole[: ends[0] + 50], b"", blank):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"a\.arrow: (the arrow file was cut|is no arrow file)"):
            load_source(DataSource(str(path), streaming=stream), on_error)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.arrow")
    saved.write_bytes(whole[: ends[0]])
    with pytest.raises(SourceError, match=r"\.arrow: the arrow file was cut"):
        load_source(DataSource(str(tmp_path / "saved"), streaming=stream), on_error)


@SKIPS
@STREAMS
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", '[{"image": "0.png", "caption": "a"}, {"image": "0.png", "cap', "rest of the file cannot be read"),
        ("a.json", '[{"image": "0.png", "caption": "a"} {"image": "0.png"}]', "a comma or ] is missing"),
        ("a.csv", 'image,caption\n0.png,a\n0.png,"b\n0.png,c\n', "is not valid CSV .*rest of the file"),
    ],
)
def test_a_text_of_which_the_rest_is_lost_is_refused(
    name: str, text: str, reason: str, stream: bool, on_error: str, tmp_path: Path
) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=reason):
        list(load_source(DataSource(str(tmp_path / name), streaming=stream), on_error))


@STREAMS
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_row_of_zero_bytes_is_a_bad_row(kind: str, stream: bool, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    lines = {"csv": "0.png,number {}\n", "jsonl": '{{"image": "0.png", "caption": "number {}"}}\n'}
    text = ("image,caption\n" if kind == "csv" else "") + "".join(lines[kind].format(n) for n in range(5))
    (tmp_path / f"a.{kind}").write_text(text.replace("number 3", "num\0\0\0 3"), encoding="utf-8")
    report = SkipReport()
    source = DataSource(str(tmp_path / f"a.{kind}"), streaming=stream)
    assert len(list(load_source(source, "skip", report))) == (4 if stream else 5)
    assert report.count == 1
    with pytest.raises(ValueError, match=r"zero bytes|not valid JSON"):
        list(load_source(source))


@STREAMS
def test_a_parquet_file_with_a_damaged_text_is_refused(stream: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"image": [png(0)] * 3, "caption": ["number 0", "Café au lait", "number 2"]}
    pq.write_table(pa.table(columns), path, use_dictionary=False, compression="none", write_statistics=False)
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9\xe9"))
    with pytest.raises(SourceError, match=r"a\.parquet: is no parquet file, or damaged \(.*UTF8"):
        list(load_source(DataSource(str(path), streaming=stream)))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    for name, mode in (("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")):
        with tarfile.open(tmp_path / name, mode):
            pass
        with pytest.raises(SourceError, match=rf"{re.escape(name)}: of unknown kind; name files that end in .*\.tar"):
            load_source(source(tmp_path / name, stream=True))
