"""Opens data of any format as rows: the one place that knows files, folders, the Hub and image folders.

- Formats: parquet, arrow, json, jsonl, csv, webdataset tar (a file, a pattern, or files within a folder); a folder of
  such files; an image folder; a folder written by `save_to_disk`; a dataset on the Hub. All of them can be streamed.
- Rows come back undecoded. Image cells hold bytes or a path, and an `Origin` says which files a path may name.
- `load_source`, `question_source`, `open_conversations` and the search index all read through `open_rows`.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetsError

from .archives import open_archives
from .rows import Origin, SourceError

_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tar": "webdataset",
}
_WRITTEN = ("json", "csv")
# Metadata files of an image folder, and the column in which they name the image.
_METADATA = ("metadata.jsonl", "metadata.csv")
_FILE_NAME = "file_name"


@dataclass(frozen=True)
class DataSource:
    """One source of image-caption rows.

    Args:
        path: A file (parquet, arrow, json, jsonl, csv, webdataset tar), a pattern of files ("shards/*.tar"), a folder
            (of images with a metadata.csv or metadata.jsonl, of such files, or written by `save_to_disk`), or the name
            of a dataset on the Hub. Image paths in json and csv start from the folder of the file and stay in it.
        name: The configuration of a Hub dataset that has several.
        split: The split, or where rows are not streamed a slice of it ("train[:95%]"). Slice here, not afterwards, if
            bad rows are skipped: a replacement row never comes from beyond the slice.
        columns: Role to column: `{"image": "jpg", "caption": "txt"}`, and optionally "id" (rows with equal ids are
            positives of each other). Default: the columns of that name.
        weight: The source's share in a mixture.
        streaming: Read row after row instead of preparing the whole source first. Files are shuffled, the rows within
            a file are not: shuffle them when you write shards.
        data_files: Files within `path`, as a name, a pattern, or a list of them.
        revision: The branch, tag or commit of a Hub dataset.
    """

    path: str
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] | None = None
    weight: float | None = None
    streaming: bool = False
    data_files: str | list[str] | None = None
    revision: str | None = None

    # Role -> the usual names of its column, proposed by the error about a missing column.
    ROLES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("image", "img", "jpg", "jpeg", "png", "webp", "file_name", "path", "image_path"),
        "caption": ("caption", "captions", "text", "txt", "title", "description", "sentences"),
        "id": (),
    }
    OPTIONAL: ClassVar[tuple[str, ...]] = ("id",)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.columns or {}) - set(self.ROLES)):
            *others, last = self.ROLES
            raise SourceError(f"{self.path}: columns: {unknown} is unknown; name {', '.join(others)} and {last}.")
        if self.weight is not None and not self.weight > 0:
            raise SourceError(f"{self.path}: weight is {self.weight}; give a positive number or leave it out.")


@dataclass(frozen=True)
class OpenedRows:
    """An opened source.

    Args:
        rows: The undecoded rows: a `Dataset`, an `IterableDataset` if streaming, or [`WrittenRows`].
        origin: Where the rows come from and which files they may name.
        names: The names of the columns.
        features: The types of the columns, if they are known.
    """

    rows: Any
    origin: Origin
    names: list[str]
    features: datasets.Features | None


class WrittenRows:
    """Unchanged rows of JSON and CSV files, by row number.

    `datasets` gives each column one type: "007" may become a number, a date a timestamp. Here every cell of JSON keeps
    its own type and every cell of CSV is a text. Rows are kept as JSON texts in one Arrow array, which is compact.

    Args:
        texts: Rows as JSON.
        names: The names of the columns.
    """

    def __init__(self, texts: Iterable[str], names: Iterable[str]):
        self._texts = pa.array(texts, pa.large_string())
        self.column_names = list(names)

    @classmethod
    def read(cls, files: Iterable[Path], renamed: Mapping[str, str] | None = None) -> "WrittenRows":
        """Reads files that end in .json, .jsonl or .csv.

        Args:
            files: Their paths.
            renamed: Column in the files -> its name here.

        Raises:
            SourceError: if a file is not of its format; with the line.
        """
        texts: list[str] = []
        names: dict[str, None] = {}
        for file in files:
            for row in (_csv_rows if file.suffix == ".csv" else _json_rows)(file):
                if renamed and isinstance(row, dict):
                    row = {renamed.get(name, name): cell for name, cell in row.items()}
                texts.append(json.dumps(row))
                names.update(dict.fromkeys(row if isinstance(row, dict) else ()))
        return cls(texts, names)

    def slice(self, split: str) -> "WrittenRows":
        """The rows of a split or of a slice such as "train[:95%]"."""
        name = re.split(r"\W", split)[0]
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(self)})
        taken = [self._texts.slice(part.from_, part.to - part.from_) for part in parts]
        return WrittenRows(pa.concat_arrays(taken), self.column_names)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._texts[index].as_py())


def open_rows(source: DataSource, seed: int | None = None, as_written: bool = False) -> OpenedRows:
    """Opens a source of any format. No image is read.

    Args:
        source: What to open.
        seed: Shuffles the files of a streaming source; None keeps their order.
        as_written: Read named JSON and CSV files, and an image folder's metadata, as [`WrittenRows`].

    Raises:
        SourceError: if the source cannot be opened, or the split has no rows.
    """
    try:
        rows, origin = _open(source, seed, as_written)
        names = rows.column_names or list(next(iter(rows), {}))
    except SourceError:
        raise
    except (OSError, ValueError, DatasetsError, csv.Error) as error:
        while error.__cause__ is not None:
            error = error.__cause__
        raise SourceError(f"{source.path}: cannot be opened: {' '.join(str(error).split())}") from error
    if not names:
        raise SourceError(f"{source.path}: has no rows in split {source.split!r}.")
    return OpenedRows(rows, origin, names, getattr(rows, "features", None))


def find_columns(source: DataSource, opened: OpenedRows) -> dict[str, str]:
    """Role -> column, for the roles that the source has.

    Raises:
        SourceError: if a column is missing, or serves two roles.
    """
    names = opened.names
    columns = {role: role for role in source.ROLES if role not in source.OPTIONAL or role in names}
    columns |= source.columns or {}
    missing = [name for name in columns.values() if name not in names]
    if missing:
        images = [name for name, kind in (opened.features or {}).items() if isinstance(kind, datasets.Image)]
        guess = {
            role: next((name for name in (*(images if role == "image" else ()), *usual) if name in names), "...")
            for role, usual in source.ROLES.items()
            if role not in source.OPTIONAL
        }
        line = ", ".join(f"{role}: {name}" for role, name in guess.items())
        raise SourceError(
            f"{source.path}: no column {', '.join(map(repr, missing))}; it has {', '.join(names)}. "
            f"Say which is which in the source: columns: {{{line}}}"
        )
    if len(set(columns.values())) < len(columns):
        raise SourceError(f"{source.path}: columns: one column stands for two; copy it under a second name first.")
    return columns


def undecoded(rows: Any) -> Any:
    """A dataset or stream whose images stay as stored: `datasets` would open any path that a row names."""
    stored = datasets.Image(decode=False)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, stored)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(stored))
    return rows


def is_local(path: str) -> bool:
    """Whether a source's path names files here, existing or not, and not a dataset on the Hub."""
    local = Path(path).expanduser()
    named = local.suffix in _BUILDERS or "*" in local.name or path.startswith(("/", ".", "~")) or path.count("/") > 1
    return named or local.exists()


def has_table(folder: Path) -> bool:
    """Whether a folder holds rows and not only image files.

    Rows are what `save_to_disk` wrote, the metadata of an image folder, or files of parquet, arrow or webdataset, in
    the folder or in the folders of its splits.
    """
    names, suffixes = {"state.json", "dataset_dict.json", *_METADATA}, {".parquet", ".arrow", ".tar"}
    found = (file for pattern in ("*", "*/*") for file in folder.glob(pattern))
    return any(file.name in names or file.suffix in suffixes for file in found)


def _open(source: DataSource, seed: int | None, as_written: bool) -> tuple[Any, Origin]:
    path = Path(source.path).expanduser()
    if files := _files(source):
        kinds = {_BUILDERS[file.suffix] for file in files}
        folders = {file.parent.resolve() for file in files}
        if len(kinds) > 1 or (len(folders) > 1 and kinds & {*_WRITTEN}):
            raise SourceError(f"{source.path}: files of several kinds or folders; make each a source of its own.")
        origin = Origin(source.path, folders.pop() if len(folders) == 1 else None)
        if as_written and kinds & {*_WRITTEN}:
            return WrittenRows.read(files).slice(source.split), origin
        split = re.split(r"\W", source.split)[0]
        return _build(source, kinds.pop(), {split: [str(file) for file in files]}, seed), origin
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_disk(source, path), Origin(source.path, path.resolve())
    if path.is_dir():
        if as_written and (metadata := _metadata(path, source.split)):
            rows = WrittenRows.read([metadata], {_FILE_NAME: "image"}).slice(source.split)
            return rows, Origin(source.path, metadata.parent.resolve())
        rows = _build(source, str(path.resolve()), None, seed)
        return rows, Origin(source.path, path.resolve(), built=rows.info.builder_name == "imagefolder")
    if is_local(source.path):
        raise SourceError(f"{source.path}: no such file or folder; correct the path.")
    rows = _build(source, source.path, source.data_files, seed)
    return rows, Origin(source.path, None, built=rows.info.builder_name == "imagefolder")


def _files(source: DataSource) -> list[Path]:
    """The local files that a source names, in order; none for a folder or a Hub dataset."""
    path = Path(source.path).expanduser()
    if source.data_files is not None and path.is_dir():
        patterns = [source.data_files] if isinstance(source.data_files, str) else source.data_files
        files = _matches(path, patterns)
    elif "*" in path.name:
        files = _matches(path.parent, [path.name])
    else:
        files = [path] if path.is_file() else []
    if unknown := [file for file in files if file.suffix not in _BUILDERS]:
        raise SourceError(f"{unknown[0]}: of unknown kind; name files that end in {', '.join(_BUILDERS)}.")
    return files


def _metadata(folder: Path, split: str) -> Path | None:
    """The metadata file of an image folder's split: in the folder of that name, or of a folder without splits."""
    name = re.split(r"\W", split)[0]
    folders = [folder / name, *([folder] if name == "train" else [])]
    return next((file for place in folders for file in map(place.joinpath, _METADATA) if file.is_file()), None)


def _matches(folder: Path, patterns: Iterable[str]) -> list[Path]:
    files = []
    for pattern in patterns:
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if not found:
            raise SourceError(f"{folder / pattern}: no such file; correct the path.")
        files += found
    return files


def _build(source: DataSource, kind: str, data_files: Any, seed: int | None) -> Any:
    builder = datasets.load_dataset_builder(kind, source.name, data_files=data_files, revision=source.revision)
    if seed is not None:
        for files in builder.config.data_files.values():
            np.random.default_rng(seed).shuffle(files)
    if builder.name == "webdataset":
        return _archives(source, builder)
    if source.streaming:
        return builder.as_streaming_dataset(split=source.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split)


def _archives(source: DataSource, builder: datasets.DatasetBuilder) -> Any:
    """The rows of a split of tar archives."""
    name = re.split(r"\W", source.split)[0]
    if name not in builder.config.data_files:
        raise SourceError(f"{source.path}: no split {name!r}; it has {', '.join(builder.config.data_files)}.")
    files = list(builder.config.data_files[name])
    if not source.streaming:
        files = datasets.DownloadManager(builder.dataset_name).download(files)
    rows = open_archives(files, source.streaming, (source.columns or {}).values())
    if source.split == name:
        return rows
    if source.streaming:
        raise SourceError(f"{source.path}: a stream has no slices: write split: {name}.")
    parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({name: len(rows)})
    return rows.select(number for part in parts for number in range(part.from_, part.to))


def _from_disk(source: DataSource, path: Path) -> Any:
    rows = datasets.load_from_disk(str(path))
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise SourceError(f"{source.path}: no split {source.split!r}; it has {', '.join(rows)}.")
        rows = rows[source.split]
    return rows.to_iterable_dataset() if source.streaming else rows


def _json_rows(file: Path) -> Iterator[Any]:
    """The rows of a list in JSON or of JSON lines."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json" and text.lstrip().startswith("["):
        yield from _decode(text, f"{file}")
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold U+2028
        if line.strip():
            yield _decode(line, f"{file}, line {number}")


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where}: is not valid JSON: {error}. Correct the file.") from error


def _csv_rows(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise SourceError(
                    f"{file}, line {reader.line_num}: has more or fewer cells than the header; correct the line."
                )
            yield row


__all__ = ["DataSource", "OpenedRows", "WrittenRows", "find_columns", "has_table", "is_local", "open_rows", "undecoded"]
