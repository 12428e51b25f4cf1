"""Skip reports: each bad row counts once and under its reason, and a source of too many bad rows is refused."""

import copy
import json
import logging
import pickle
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from cases import tiny
from hf_vlm.data.sources import skipped
from hf_vlm.data.sources.conversations import open_conversations
from hf_vlm.data.sources.errors import CaptionError, ConversationError, RowError, SourceError
from hf_vlm.data.sources.images import ImageError
from hf_vlm.data.sources.load import load_source
from hf_vlm.data.sources.open import DataSource
from hf_vlm.data.sources.questions import question_source
from hf_vlm.data.sources.skipped import SkipReport, reason_of

STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])


def table(folder: Path, bad: Iterable[int], count: int) -> Path:
    """Rows of one image; the caption of a bad row is empty."""
    tiny.image().save(folder / "a.png")
    bad = set(bad)
    rows = [{"image": "a.png", "caption": " " if number in bad else f"number {number}"} for number in range(count)]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == skipped.__name__]


@STREAMS
def test_more_than_half_is_an_error_unless_allowed(stream: bool, tmp_path: Path) -> None:
    source = DataSource(str(table(tmp_path, range(1, 300, 2), 300)), streaming=stream)
    assert list(load_source(source, "skip"))  # exactly half
    source = DataSource(str(table(tmp_path, [*range(1, 300, 2), 0, 2], 300)), streaming=stream)
    with pytest.raises(SourceError, match=r"a\.jsonl: 1\d\d of the first 2\d\d rows read are bad \(5\d%\)") as caught:
        list(load_source(source, "skip"))
    assert "unusable text" in str(caught.value)
    assert "raise max_skipped" in str(caught.value)
    assert list(load_source(source, "skip", max_skipped=0.6))
    assert list(load_source(source, "skip", SkipReport(max_skipped=0.6)))
    with pytest.raises(SourceError, match=r"more than max_skipped=0\.01"):
        list(load_source(source, "skip", max_skipped=0.01))


def test_a_small_source_is_judged_when_all_of_it_was_read(tmp_path: Path) -> None:
    rows = load_source(DataSource(str(table(tmp_path, [0, 1, 2], 5))), "skip")
    assert rows[0]["caption"] == "number 3"
    with pytest.raises(SourceError, match="3 of the first 5 rows read are bad"):
        rows[4]


@STREAMS
def test_a_tenth_is_a_warning(stream: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger=skipped.__name__)
    few = load_source(DataSource(str(table(tmp_path, range(0, 300, 15), 300)), streaming=stream), "skip")
    list(few)
    assert [text for text in messages(caplog) if "rows read are bad" in text] == []
    many = load_source(DataSource(str(table(tmp_path, range(0, 300, 5), 300)), streaming=stream), "skip")
    for _ in range(2):
        list(many)
    (warning,) = [text for text in messages(caplog) if "rows read are bad" in text]
    assert "unusable text" in warning


def test_rows_count_once_however_often_they_are_read(tmp_path: Path) -> None:
    report = SkipReport()
    rows = load_source(DataSource(str(table(tmp_path, [3, 4], 10))), "skip", report)
    tally = rows.format["format_kwargs"]["transform"].tally
    for _ in range(3):
        list(rows)
    assert tally.counts() == (10, 2)
    assert report.count == 2
    assert report.reasons == {"unusable text": 2}


@STREAMS
def test_workers_and_copies_count_together(stream: bool, tmp_path: Path) -> None:
    source = DataSource(str(table(tmp_path, range(1, 300, 3), 300)), streaming=stream)
    report = SkipReport()
    rows = load_source(source, "skip", report)
    list(DataLoader(rows, batch_size=7, num_workers=2, collate_fn=list))
    assert report.count == 100
    if not stream:
        assert rows.format["format_kwargs"]["transform"].tally.counts() == (300, 100)
        list(pickle.loads(pickle.dumps(rows)))
        list(copy.deepcopy(rows))
        assert report.count == 100


def test_reasons_are_short_and_stable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "tree"}]}
    tiny.image().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    bad = [
        {**asked, "image": "b.png"},
        {**asked, "image": "none.png"},
        {"conversations": 5, "image": "a.png"},
        {"conversations": [5], "image": "a.png"},
        {"conversations": [], "image": "a.png"},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*[{**asked, "image": "a.png"}] * 6, *bad]))
    report = SkipReport()
    fields = {"path": str(path), "image_folder": str(tmp_path)}
    assert len(list(open_conversations(fields, on_error="skip", report=report))) == 11
    assert report.reasons == {"no conversation": 3, "unreadable image": 2}
    report.log()
    assert "Skipped 5 bad rows (no conversation: 3, unreadable image: 2): " in messages(caplog)[-1]
    for number in range(8, 11):
        with pytest.raises(ConversationError, match=rf"Row {number} of .*on_error='skip'"):
            open_conversations(fields)[number]


def test_questions_are_counted(tmp_path: Path) -> None:
    tiny.image().save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "what?", "answer": answer} for answer in ("a", None, "b", " ", "c")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = SkipReport()
    assert len(list(load_source(question_source({"path": str(tmp_path / "a.jsonl")}), "skip", report))) == 5
    assert report.reasons == {"unusable text": 2}


def test_line_breaks_and_control_characters_in_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.image().save(tmp_path / "a.png")
    name = "two\nlines\u2028 and \x1b[31mred.png"
    rows = [{"image": image, "caption": "a"} for image in ("a.png", name, "a.png")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stream in (False, True):
        report = SkipReport()
        list(load_source(DataSource(str(tmp_path / "a.jsonl"), streaming=stream), "skip", report))
        assert report.count == 1
        report.log()
    assert all(text.isprintable() for text in [*messages(caplog), *report.errors])


def bomb() -> bytes:
    """A PNG of 1 x 89,000,000 pixels, fewer than Pillow's limit: to resize it takes gigabytes."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 1, 89_000_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(999)))]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@STREAMS
def test_an_image_that_cannot_be_resized_is_one_bad_row(stream: bool, tmp_path: Path) -> None:
    source = DataSource(str(table(tmp_path, [], 4)), streaming=stream)
    (tmp_path / "bomb.png").write_bytes(bomb())
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace('"a.png"', '"bomb.png"', 1))
    report = SkipReport()
    found = [row["caption"] for row in load_source(source, "skip", report)]
    assert found == (["number 1", "number 2", "number 3"] if stream else ["number 1", *found[1:]])
    assert report.reasons == {"unreadable image": 1}
    with pytest.raises(ImageError, match=r"a\.jsonl, .* \(bomb\.png\): 1 x 89000000 pixels"):
        list(load_source(source))


@pytest.mark.parametrize("share", [-0.1, 1.5, "half", True, None, float("nan")])
def test_max_skipped_is_a_share(share: object) -> None:
    with pytest.raises(SourceError, match="is no share; write a number from 0 to 1"):
        SkipReport(max_skipped=share)


def test_every_error_of_a_row_has_a_reason() -> None:
    kinds = [RowError, *RowError.__subclasses__()]
    reasons = {kind: reason_of(kind("a row")) for kind in kinds}
    assert len(set(reasons.values())) == len(kinds)
    assert reason_of(ImageError("a row")) == "unreadable image"
    assert reason_of(ValueError("a row")) == reasons[RowError]
    assert reasons[CaptionError] == "unusable text"


def test_the_sum_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    for log_before in (False, True):
        caplog.clear()
        report = SkipReport()
        report.source("a", 3).bad(CaptionError("a, row 0"), 0)
        if log_before:
            report.log()
        del report
        assert len([text for text in messages(caplog) if text.startswith("Skipped 1 bad rows")]) == 1


def test_the_folder_of_a_report_is_deleted_with_it() -> None:
    report = SkipReport()
    folder = report.folder
    report.source("a", 3).bad(CaptionError("a, row 0"), 0)
    assert (folder / "errors").is_file()
    del report
    assert not folder.exists()
