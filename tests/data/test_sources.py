"""Data sources: every kind opens to the same rows, bad rows raise or are counted, nothing outside a folder is read."""

import gc
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from hf_vlm.data.batches.pairs import load_pairs
from hf_vlm.data.batches.questions import load_questions
from hf_vlm.data.sources import rows as rows_module
from hf_vlm.data.sources import skipped
from hf_vlm.data.sources.images import ImageError
from hf_vlm.data.sources.load import load_source
from hf_vlm.data.sources.mixing import Mixture, mix, split_stream
from hf_vlm.data.sources.open import DataSource
from hf_vlm.data.sources.rows import CaptionError, SkipReport, SourceError

COUNT = 6


def png(number: int) -> bytes:
    """An image whose colour is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(example: dict) -> int:
    return example["image"].getpixel((0, 0))[0]


def write_images(folder: Path, numbers: Iterable[int] = range(COUNT)) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def jsonl(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(folder: Path, numbers: Sequence[int] = range(COUNT)) -> Path:
    """captions.jsonl next to a folder of images."""
    write_images(folder / "images", numbers)
    rows = [{"image": f"images/{number}.png", "caption": f"number {number}"} for number in numbers]
    return jsonl(folder / "captions.jsonl", rows)


def tar(path: Path, numbers: Iterable[int], name: str = "{}") -> Path:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for extension, data in (("png", png(number)), ("txt", f"number {number}".encode())):
                member = tarfile.TarInfo(f"{name.format(number)}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def rows_with_bytes(numbers: Iterable[int] = range(COUNT)) -> datasets.Dataset:
    rows = [{"image": {"bytes": png(n), "path": None}, "caption": f"number {n}"} for n in numbers]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def shards(folder: Path, count: int, size: int = 3, first: int = 0) -> str:
    """Parquet files of consecutive numbers; returns their pattern."""
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        start = first + shard * size
        rows_with_bytes(range(start, start + size)).to_parquet(folder / f"part-{shard:03}.parquet")
    return str(folder / "part-*.parquet")


def image_folder(folder: Path, kind: str) -> DataSource:
    write_images(folder)
    rows = [{"file_name": f"{n}.png", "caption": f"number {n}"} for n in range(COUNT)]
    if kind == "jsonl":
        jsonl(folder / "metadata.jsonl", rows)
    else:
        lines = ["file_name,caption", *(f"{row['file_name']},{row['caption']}" for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return DataSource(str(folder))


def zipped_folder(folder: Path) -> DataSource:
    image_folder(folder / "images", "csv")
    (folder / "zipped").mkdir()
    with zipfile.ZipFile(folder / "zipped" / "all.zip", "w") as archive:
        for path in (folder / "images").iterdir():
            archive.write(path, path.name)
    return DataSource(str(folder / "zipped"))


def csv(folder: Path) -> DataSource:
    write_images(folder)
    lines = ["photo,text", *(f"{n}.png,number {n}" for n in range(COUNT))]
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    return DataSource(str(folder / "table.csv"), columns={"image": "photo", "caption": "text"})


def plain_parquet(folder: Path) -> DataSource:
    columns = {"png": [png(n) for n in range(COUNT)], "caption": [f"number {n}" for n in range(COUNT)]}
    pq.write_table(pa.table(columns), folder / "plain.parquet")
    return DataSource(str(folder / "plain.parquet"), columns={"image": "png"})


def tars(folder: Path) -> DataSource:
    for shard in range(2):
        tar(folder / f"{shard}.tar", range(3 * shard, 3 * shard + 3))
    return DataSource(str(folder / "*.tar"), columns={"image": "png", "caption": "txt"})


def parquet(folder: Path, **options) -> DataSource:
    shards(folder / "shards", 2)
    return DataSource(str(folder / "shards"), **options)


def saved(folder: Path) -> DataSource:
    datasets.DatasetDict({"test": rows_with_bytes()}).save_to_disk(folder / "saved")
    return DataSource(str(folder / "saved"), split="test")


def arrow(folder: Path) -> DataSource:
    rows_with_bytes().save_to_disk(folder / "saved")
    return DataSource(str(folder / "saved"), data_files="*.arrow")


SOURCES = {
    "image folder with csv": lambda folder: image_folder(folder / "photos", "csv"),
    "image folder with jsonl": lambda folder: image_folder(folder / "photos", "jsonl"),
    "image folder in a zip": zipped_folder,
    "jsonl": lambda folder: DataSource(str(table(folder))),
    "csv": csv,
    "folder of parquet": parquet,
    "pattern of parquet": lambda folder: DataSource(shards(folder, 2)),
    "files of parquet": lambda folder: parquet(folder, data_files=["part-000.parquet", "part-001.parquet"]),
    "parquet without image type": plain_parquet,
    "arrow": arrow,
    "saved to disk": saved,
    "webdataset": tars,
}


def streaming(source: DataSource, on: bool = True) -> DataSource:
    return DataSource(**{**vars(source), "streaming": on})


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_gives_the_same_rows(kind: str, stream: bool, tmp_path: Path) -> None:
    rows = load_source(streaming(SOURCES[kind](tmp_path), stream))
    assert isinstance(rows, datasets.IterableDataset if stream else datasets.Dataset)
    examples = list(rows)
    assert [number_of(example) for example in examples] == list(range(COUNT))
    assert [example["caption"] for example in examples] == [f"number {n}" for n in range(COUNT)]
    assert {name for example in examples for name in example} == {"image", "caption"}
    assert all(example["image"].mode == "RGB" for example in examples)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_several_captions_and_ids(stream: bool, tmp_path: Path) -> None:
    write_images(tmp_path)
    captions = [["a", "b"], ["c"], ["d", "e", "f"]]
    rows = [{"image": f"{n}.png", "texts": texts, "object": f"o{n // 2}"} for n, texts in enumerate(captions)]
    rows[2]["object"] = None
    path = jsonl(tmp_path / "a.jsonl", rows)
    source = DataSource(str(path), columns={"caption": "texts", "id": "object"}, streaming=stream)
    examples = list(load_source(source))
    assert [example["caption"] for example in examples] == [["a", "b"], "c", ["d", "e", "f"]]
    assert [example["id"] for example in examples] == ["o0", "o0", None]


def test_an_image_is_read_when_its_row_is_asked_for(tmp_path: Path) -> None:
    rows = load_source(DataSource(str(table(tmp_path))))
    (tmp_path / "images" / "4.png").write_bytes(b"")
    assert number_of(rows[3]) == 3
    assert [number_of(example) for example in rows.select([5, 1])] == [5, 1]
    assert number_of(pickle.loads(pickle.dumps(rows))[2]) == 2
    with pytest.raises(ImageError, match=r"row 4 \(images/4\.png\)"):
        rows[2:6]


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_a_missing_column_says_what_to_write(stream: bool, tmp_path: Path) -> None:
    source = streaming(DataSource(tars(tmp_path).path), stream)
    with pytest.raises(SourceError, match="no column 'image', 'caption'; it has png, txt") as caught:
        load_source(source)
    assert str(caught.value).endswith("columns: {image: png, caption: txt}")
    with pytest.raises(SourceError, match="no column 'object'"):
        load_source(DataSource(str(table(tmp_path)), columns={"id": "object"}, streaming=stream))


BAD = {
    "truncated": lambda path: path.write_bytes(png(1)[:-30]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("damage", BAD)
def test_a_bad_image_raises_with_its_place(damage: str, stream: bool, tmp_path: Path) -> None:
    path = table(tmp_path)
    BAD[damage](tmp_path / "images" / "3.png")
    rows = load_source(DataSource(str(path), streaming=stream))
    place = r"captions\.jsonl, line 4 \(images/3\.png\)" if stream else r"captions\.jsonl, row 3 \(images/3\.png\)"
    with pytest.raises(ImageError, match=place) as caught:
        list(rows)
    assert "\n" not in str(caught.value)
    assert "on_error='skip'" in str(caught.value)


def test_a_bad_row_without_a_path_is_found_by_its_number(tmp_path: Path) -> None:
    rows = [{"image": png(n) if n != 4 else b"", "caption": "a"} for n in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for stream in (False, True):
        with pytest.raises(ImageError, match=r"a\.parquet, row 4: .*zero bytes"):
            list(load_source(DataSource(str(tmp_path / "a.parquet"), streaming=stream)))


def damaged(folder: Path, bad: Iterable[int], count: int = COUNT) -> Path:
    path = table(folder, range(count))
    for number in bad:
        (folder / "images" / f"{number}.png").write_bytes(png(number)[:-30])
    return path


def test_skip_lets_the_next_good_row_stand_in(tmp_path: Path) -> None:
    report = SkipReport()
    rows = load_source(DataSource(str(damaged(tmp_path, [1, 2, 5]))), on_error="skip", report=report)
    assert len(rows) == COUNT
    for order in (range(COUNT), reversed(range(COUNT))):  # the stand-in does not depend on what was read before
        examples = {index: rows[index] for index in order}
        assert [number_of(examples[index]) for index in range(COUNT)] == [0, 3, 3, 3, 4, 0]
        assert [examples[index]["caption"] for index in (1, 5)] == ["number 3", "number 0"]
    assert [number_of(example) for example in rows.select([5, 1])] == [0, 3]
    assert report.count == 3
    assert [error.split(" (")[0].rsplit(" ", 1)[1] for error in report.errors] == ["1", "2", "5"]


def test_a_stand_in_stays_within_the_slice(tmp_path: Path) -> None:
    path = str(damaged(tmp_path, [2, 5]))
    first = load_source(DataSource(path, split="train[:50%]"), on_error="skip")
    last = load_source(DataSource(path, split="train[50%:]"), on_error="skip")
    assert [number_of(example) for example in first] == [0, 1, 0]
    assert [number_of(example) for example in last] == [3, 4, 3]


def test_skip_leaves_the_row_out_of_a_stream(tmp_path: Path) -> None:
    report = SkipReport()
    source = DataSource(str(damaged(tmp_path, [0, 2, 5])), streaming=True)
    rows = load_source(source, on_error="skip", report=report)
    for _ in range(2):
        assert [number_of(example) for example in rows] == [1, 3, 4]
    assert report.count == 3


def test_the_report_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = load_source(DataSource(str(damaged(tmp_path, range(7), count=9))), "skip", SkipReport(max_skipped=1.0))
    list(rows)
    first, many = [record.getMessage() for record in caplog.records if record.name == skipped.__name__]
    assert "row 0 (images/0.png)" in first
    assert "captions.jsonl: 7 of the first 9 rows read are bad (78%)" in many
    caplog.clear()
    del rows
    gc.collect()  # the last to hold the report
    messages = [record.getMessage() for record in caplog.records if record.name == skipped.__name__]
    (summary,) = [
        message for message in messages if str(tmp_path) in message
    ]  # of other tests' reports there may be more
    assert summary.startswith("Skipped 7 bad rows (unreadable image: 7): ")
    assert summary.endswith(" and 2 more")
    assert summary.count(", row ") == 5


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_workers_count_together(stream: bool, tmp_path: Path) -> None:
    report = SkipReport()
    if stream:
        for part in range(2):
            damaged(tmp_path / f"{part}", [1, 4])
        shutil.copytree(tmp_path / "0" / "images", tmp_path / "images")
        for part in range(2):
            rows = [{"image": f"images/{n}.png", "caption": f"{n}"} for n in range(3 * part, 3 * part + 3)]
            jsonl(tmp_path / f"part-{part}.jsonl", rows)
        source = DataSource(str(tmp_path / "part-*.jsonl"), streaming=True)
    else:
        source = DataSource(str(damaged(tmp_path, [1, 4])))
    rows = load_source(source, on_error="skip", report=report)
    numbers = [number_of(example) for batch in loader(rows, workers=2) for example in batch]
    assert sorted(numbers) == ([0, 2, 3, 5] if stream else [0, 2, 2, 3, 5, 5])
    assert report.count == 2


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("caption", [None, "", "  ", [], ["a", ""], ["a", None], 5])
def test_a_bad_caption(caption: object, stream: bool, tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"image": "0.png", "caption": caption}]
    good = [["fine"]] if isinstance(caption, list) else [7] if caption == 5 else ["fine"]
    path = jsonl(tmp_path / "a.jsonl", [*rows, {"image": "1.png", "caption": good[0]}])
    with pytest.raises(CaptionError, match=r"0\.png\): column 'caption' holds "):
        list(load_source(DataSource(str(path), streaming=stream)))
    if caption != 5:
        kept = list(load_source(DataSource(str(path), streaming=stream), on_error="skip"))
        assert {example["caption"] for example in kept} == {"fine"}


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_a_source_of_bad_rows_only_is_refused(stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path)
    shutil.rmtree(tmp_path / "images")
    monkeypatch.setattr(rows_module, "HOPELESS", 4)
    with pytest.raises(SourceError, match="consecutive rows could not be read"):
        list(load_source(DataSource(str(path), streaming=stream), on_error="skip"))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("escape", ["../secret.png", "absolute", "link.png", "linked/secret.png", "a/../../secret.png"])
def test_a_path_that_leaves_the_folder_is_refused(escape: str, stream: bool, on_error: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    folder = write_images(tmp_path / "data")
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    escape = str(secret) if escape == "absolute" else escape
    path = jsonl(folder / "a.jsonl", [{"image": "0.png", "caption": "a"}, {"image": escape, "caption": "b"}])
    with pytest.raises(SourceError, match=r"leads out of .*data"):
        list(load_source(DataSource(str(path), streaming=stream), on_error=on_error))


def test_paths_within_the_folder_are_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data")
    (folder / "link.png").symlink_to(folder / "1.png")
    rows = [{"image": path, "caption": "a"} for path in ("x/../0.png", str(folder / "2.png"), "link.png")]
    (tmp_path / "alias").symlink_to(folder)
    jsonl(folder / "a.jsonl", rows)
    examples = load_source(DataSource(str(tmp_path / "alias" / "a.jsonl")))
    assert [number_of(example) for example in examples] == [0, 2, 1]


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_an_image_folder_cannot_be_left(stream: bool, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    source = image_folder(tmp_path / "photos", "csv")
    (tmp_path / "photos" / "0.png").unlink()
    (tmp_path / "photos" / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(SourceError, match="leads out of"):
        list(load_source(streaming(source, stream)))


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_bytes_win_over_a_local_file_of_the_same_name(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("0.png").write_bytes(png(99))
    tar(tmp_path / "a.tar", range(COUNT))
    rows = [{"image": {"bytes": png(n), "path": "0.png"}, "caption": f"number {n}"} for n in range(COUNT)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), tmp_path / "a.parquet")
    columns = {"image": "png", "caption": "txt"}
    for source in (DataSource("a.tar", columns=columns), DataSource("a.parquet")):
        examples = load_source(streaming(source, stream))
        assert [number_of(example) for example in examples] == list(range(COUNT))


def test_rows_of_several_folders_must_carry_their_images(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for name in ("a", "b"):
        folder = write_images(tmp_path / name)
        rows = [{"image": {"bytes": None, "path": "0.png"}, "caption": name}]
        pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), folder / "rows.parquet")
    assert number_of(load_source(DataSource(str(tmp_path / "a" / "rows.parquet")))[0]) == 0
    both = DataSource(str(tmp_path), data_files=["a/rows.parquet", "b/rows.parquet"])
    with pytest.raises(SourceError, match="store the image in the row"):
        load_source(both)[0]


def two_kinds(folder: Path) -> DataSource:
    table(folder)
    shards(folder, 1)
    return DataSource(str(folder), data_files=["*.jsonl", "*.parquet"])


def broken_parquet(folder: Path) -> DataSource:
    (folder / "a.parquet").write_bytes(b"PAR1 and no more")
    return DataSource(str(folder / "a.parquet"))


def header_only(folder: Path) -> DataSource:
    (folder / "a.csv").write_text("image,caption\n", encoding="utf-8")
    return DataSource(str(folder / "a.csv"))


UNUSABLE = {
    "no such file": (lambda folder: DataSource(str(folder / "none.parquet")), "no such file or folder"),
    "no match": (lambda folder: DataSource(str(folder / "*.tar")), "no such file"),
    "unknown kind": (lambda folder: DataSource(str(write_images(folder) / "0.png")), "of unknown kind"),
    "two kinds": (two_kinds, "several kinds"),
    "no rows": (header_only, "has no rows|corresponds to no data"),
    "an empty slice": (lambda folder: parquet(folder, split="train[:1%]"), "has no rows in split|is a slice"),
    "broken file": (broken_parquet, r"a\.parquet: is no parquet file, or damaged"),
    "no such split": (lambda folder: parquet(folder, split="test"), "no split 'test'; it has train"),
    "no such split on disk": (lambda folder: DataSource(saved(folder).path, split="train"), "no split 'train'"),
    "no such dataset": (lambda folder: DataSource("nobody/nothing"), "cannot be opened"),
    "a column twice": (
        lambda folder: DataSource(str(table(folder)), columns={"image": "caption"}),
        "one column stands for two",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_source_is_refused_in_one_line(name: str, stream: bool, tmp_path: Path) -> None:
    build, reason = UNUSABLE[name]
    with pytest.raises(SourceError, match=reason) as caught:
        load_source(streaming(build(tmp_path), stream))
    assert "\n" not in str(caught.value)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'images'"):
        DataSource("a", columns={"images": "jpg"})
    with pytest.raises(SourceError, match="positive"):
        DataSource("a", weight=0)
    with pytest.raises(SourceError, match="'ignore' is unknown"):
        load_source(DataSource(str(table(tmp_path))), on_error="ignore")


def two_sources(folder: Path, sizes: tuple[int, int], **options) -> list[DataSource]:
    """Sources of the numbers from 0 and from 100 on, in files of five rows."""
    sources = []
    for part, size in enumerate(sizes):
        source = write_images(folder / f"source{part}", range(100 * part, 100 * part + size))
        for shard in range(size // 5):
            numbers = range(100 * part + 5 * shard, 100 * part + 5 * shard + 5)
            jsonl(source / f"{shard:03}.jsonl", [{"image": f"{n}.png", "caption": str(n)} for n in numbers])
        sources.append(DataSource(str(source / "*.jsonl"), **options))
    return sources


def from_first(examples: Iterable[dict]) -> int:
    return sum(number_of(example) < 100 for example in examples)


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [("size", 80, 5), ("sqrt", 80, 20), ([1, 1], 80, 80), ([3, 1], 80, 27), (None, 80, 5)],
)
def test_shares_of_a_mixture(weights: str | list[float] | None, first: int, second: int, tmp_path: Path) -> None:
    mixture = mix(two_sources(tmp_path, (80, 5)), weights=weights)
    numbers = Counter(number_of(example) for example in mixture)
    assert len(mixture) == first + second
    assert sum(count for number, count in numbers.items() if number < 100) == first
    assert set(numbers) == {*range(80), *range(100, 105)}  # every row is met
    repeats = [numbers[number] for number in range(100, 105)]
    assert max(repeats) - min(repeats) <= 1
    assert 2 < from_first(mixture[i] for i in range(first + second - 40, first + second)) < 40  # and spread out


def test_own_weights_of_the_sources(tmp_path: Path) -> None:
    sources = two_sources(tmp_path, (20, 5))
    weighted = [DataSource(sources[0].path, weight=1.0), DataSource(sources[1].path, weight=0.5)]
    assert from_first(mix(weighted)) == 20
    assert len(mix(weighted)) == 30
    assert len(mix(weighted, weights="size")) == 25
    with pytest.raises(SourceError, match="no weight while"):
        mix([weighted[0], sources[1]])


def test_weights_of_sources_are_used_by_recipes_or_refused(tmp_path: Path) -> None:
    paths = [source.path for source in two_sources(tmp_path, (20, 5))]
    weighted = [{"path": path, "weight": weight} for path, weight in zip(paths, (1.0, 0.5), strict=True)]
    assert from_first(load_pairs(weighted).rows) == 20
    assert len(load_pairs(weighted)) == 30
    assert len(load_pairs([{"path": path} for path in paths], "size")) == 25
    for weights in ("size", "sqrt"):
        with pytest.raises(SourceError, match=f"has a weight, and mix is '{weights}': leave out mix, or the weights"):
            load_pairs(weighted, weights)
        with pytest.raises(SourceError, match=f"has a weight, and mix is '{weights}'"):
            load_questions(weighted, weights)
    streams = load_pairs([{**source, "streaming": True} for source in weighted])
    assert {number_of(pair) for pair in streams} == {*range(20), *range(100, 105)}


def test_a_mixture_follows_from_its_seed(tmp_path: Path) -> None:
    sources = two_sources(tmp_path, (20, 10))
    order = [number_of(example) for example in mix(sources, "sqrt", seed=3)]
    assert order == [number_of(example) for example in mix(sources, "sqrt", seed=3)]
    assert order != [number_of(example) for example in mix(sources, "sqrt", seed=4)]


def test_ids_of_two_sources_are_told_apart() -> None:
    mixture = Mixture([[{"id": 1}, {"id": 1}], [{"id": 1}], [{"caption": "a"}]], shares=[2, 1, 1])
    examples = list(mixture)
    assert Counter(example.get("id") for example in examples) == {"0:1": 2, "1:1": 1, None: 1}


def test_bad_rows_of_a_mixture_are_counted_together(tmp_path: Path) -> None:
    report = SkipReport()
    sources = [DataSource(str(damaged(tmp_path / name, [bad]))) for name, bad in (("a", 1), ("b", 3))]
    assert len(list(mix(sources, on_error="skip", report=report))) == 2 * COUNT
    assert report.count == 2


def test_mixtures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    sources = two_sources(tmp_path, (10, 5))
    for weights in ("even", [1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(SourceError, match="weights="):
            mix(sources, weights=weights)
    with pytest.raises(SourceError, match="streaming must be"):
        mix([sources[0], streaming(sources[1])])
    with pytest.raises(SourceError, match="at least one"):
        mix([])
    with pytest.raises(SourceError, match="do not know their sizes"):
        mix([streaming(source) for source in sources], weights="sqrt")


def test_shares_of_mixed_streams(tmp_path: Path) -> None:
    sources = two_sources(tmp_path, (80, 40), streaming=True)
    examples = list(mix(sources, weights=[0.8, 0.2], seed=1))
    assert {number_of(example) for example in examples} == {*range(80), *range(100, 140)}
    share = from_first(examples) / len(examples)
    assert abs(share - 0.8) < 3 * (0.8 * 0.2 / len(examples)) ** 0.5
    again = [number_of(example) for example in mix(sources, weights=[0.8, 0.2], seed=1)]
    assert [number_of(example) for example in examples] == again
    assert again != [number_of(example) for example in mix(sources, weights=[0.8, 0.2], seed=2)]


def test_epochs_shuffle_the_shards_of_a_stream(tmp_path: Path) -> None:
    rows = load_source(DataSource(shards(tmp_path, 6), streaming=True))
    orders = []
    for epoch in (0, 1, 2, 1):
        rows.set_epoch(epoch)
        orders.append([number_of(example) for example in rows])
    assert orders[0] == list(range(18))
    assert orders[1] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == orders[0] for order in orders)
    shuffled = [number_of(example) for example in mix([DataSource(shards(tmp_path, 6), streaming=True)], seed=1)]
    assert sorted(shuffled) == orders[0] != shuffled


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 8, 13])
@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixed"])
def test_a_stream_resumes_where_it_stopped(mixed: bool, stop: int, tmp_path: Path) -> None:
    columns = {"image": "png", "caption": "txt"}
    sources = []
    for part in range(2):
        for shard in range(3):
            path = tar(tmp_path / f"{part}-{shard}.tar", range(100 * part + 5 * shard, 100 * part + 5 * shard + 5))
            if shard == 1:  # the middle shard begins with a bad row
                path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDXX", 1))
        sources.append(DataSource(str(tmp_path / f"{part}-*.tar"), columns=columns, streaming=True))

    def opened() -> datasets.IterableDataset:
        return mix(sources if mixed else sources[:1], weights=[0.6, 0.4] if mixed else None, on_error="skip")

    whole = [number_of(example) for example in opened()]
    rows = opened()
    iterator = iter(rows)
    seen = [number_of(next(iterator)) for _ in range(stop)]
    state = rows.state_dict()
    resumed = opened()
    resumed.load_state_dict(state)
    assert seen + [number_of(example) for example in resumed] == whole
    assert not {5, 105} & set(whole)


def loader(rows: object, workers: int) -> DataLoader:
    return DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=list)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_two_ranks_with_two_workers_read_every_row_once(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = DataSource(shards(tmp_path, count, size=5), streaming=True)
    numbers = []
    for rank in range(2):
        part = split_stream(load_source(source), rank, world_size=2, workers=2)
        own = [number_of(example) for batch in loader(part, workers=2) for example in batch]
        assert own  # no rank is left without rows
        numbers += own
    assert sorted(numbers) == list(range(5 * count))
    warnings = [record for record in caplog.records if record.name == "hf_vlm.data.sources.mixing"]
    assert len(warnings) == (count < 4)


def test_mixed_streams_of_unequal_shards_lose_no_row(tmp_path: Path) -> None:
    sources = two_sources(tmp_path, (20, 5), streaming=True)
    seen = set()
    for rank in range(2):
        part = split_stream(mix(sources, weights=[1, 1]), rank, world_size=2, workers=2)
        seen |= {number_of(example) for batch in loader(part, workers=2) for example in batch}
    assert seen == {*range(20), *range(100, 105)}
