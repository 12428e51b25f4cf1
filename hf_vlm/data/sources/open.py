"""Opens data of any format as rows: the one place that knows files, folders, the Hub and image folders.

- Formats: parquet, arrow, json, jsonl, csv, webdataset tar (a file, a pattern, or files within a folder); a folder of
  such files; an image folder; a folder written by `save_to_disk`; a dataset on the Hub. All of them can be streamed.
- Rows come back undecoded. Image cells hold bytes or a path, and an `Origin` says which files a path may name.
- `load_source`, `question_source`, `open_conversations` and the search index all read through `open_rows`.
"""

import copy
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub.repocard import metadata_load

from ...paths import is_inside, leads_out
from ...terminal import quoted
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
# Kinds of data that `datasets` may find in a folder or on the Hub.
_KINDS = (*dict.fromkeys(_BUILDERS.values()), "imagefolder")
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
    except (OSError, ValueError, DatasetsError, csv.Error, yaml.YAMLError) as error:
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
    features = rows.features
    stored = _stored(features)
    if features == stored:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.cast(stored)
    rows = copy.deepcopy(rows)  # not cast, which would write all rows anew for a nested feature
    rows.info.features = stored
    return rows


def _stored(feature: Any) -> Any:
    """A feature in which nothing opens a file: images, audio, videos and documents stay bytes and paths, nested too."""
    if isinstance(feature, dict):
        return type(feature)({name: _stored(each) for name, each in feature.items()})
    if isinstance(feature, list):
        return [_stored(each) for each in feature]
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_stored(feature.feature))
    if "decode" in getattr(feature, "__dataclass_fields__", {}) and not isinstance(feature, datasets.Json):
        return replace(feature, decode=False)
    return feature


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
        _check_card(source.path, path)
        rows = _build(source, str(path.resolve()), None, seed, partial(_check_built, source, path))
        return rows, Origin(source.path, path.resolve(), built=rows.info.builder_name == "imagefolder")
    if is_local(source.path):
        raise SourceError(f"{source.path}: no such file or folder; correct the path.")
    _check_names(source.path, "data_files", source.data_files)
    rows = _build(source, source.path, source.data_files, seed, partial(_check_built, source, None))
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
    found = next((file for place in folders for file in map(place.joinpath, _METADATA) if file.is_file()), None)
    _check_links(folder, [] if found is None else [found])
    return found


def _matches(folder: Path, patterns: Iterable[str]) -> list[Path]:
    files = []
    for pattern in patterns:
        _check_names(f"{folder}", "data_files", pattern)
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if not found:
            raise SourceError(f"{folder / pattern}: no such file; correct the path.")
        files += found
    _check_links(folder, files)
    return files


def _check_names(label: str, where: str, names: Any) -> None:
    """Refuses names of files that lead out of a source: absolute paths, URLs, and paths with `..`, nested or not."""
    if isinstance(names, str):
        if leads_out(names):
            raise SourceError(
                f"{label}: {where} names {quoted(names)}; name files within the source, by relative paths."
            )
    elif isinstance(names, Mapping | list | tuple):
        for each in names.values() if isinstance(names, Mapping) else names:
            _check_names(label, where, each)


def _check_links(folder: Path, files: Iterable[str | Path]) -> None:
    """Refuses files of a folder that are links to files elsewhere."""
    for file in files:
        if not is_inside(file, folder):
            raise SourceError(f"{file}: leads out of {folder}; copy the file into the folder, or name its own folder.")


def _check_card(label: str, folder: Path) -> None:
    """Refuses a folder whose dataset card (README.md) names files elsewhere, before `datasets` looks for them."""
    card, settings = folder / "README.md", folder / datasets.config.REPOYAML_FILENAME
    headers = [metadata_load(card) if card.is_file() else None]
    headers += [yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else None]
    for header in headers:
        configs = (header.get("configs") if isinstance(header, Mapping) else None) or []
        if not isinstance(configs, list) or not all(isinstance(config, Mapping) for config in configs):
            raise SourceError(f"{label}: its dataset card has the configs {quoted(configs)}; write a list of mappings.")
        for config in configs:
            for field in ("data_files", "data_dir"):
                _check_names(label, f"its dataset card, under {field},", config.get(field))


def _check_built(source: DataSource, folder: Path | None, builder: datasets.DatasetBuilder) -> None:
    """Refuses a dataset of another kind, or one that is made of files outside its folder or its Hub repository."""
    if builder.name not in _KINDS:
        raise SourceError(f"{source.path}: holds {builder.name} data; give a source of {', '.join(_KINDS)}.")
    files = [file for of_split in (builder.config.data_files or {}).values() for file in of_split]
    if folder is not None:
        _check_links(folder, files)
    elif outside := [file for file in files if not str(file).startswith(f"hf://datasets/{source.path}@")]:
        raise SourceError(f"{source.path}: its dataset card names {quoted(outside[0])}, which is not of this dataset.")


def _build(
    source: DataSource,
    kind: str,
    data_files: Any,
    seed: int | None,
    check: Callable[[datasets.DatasetBuilder], None] | None = None,
) -> Any:
    builder = datasets.load_dataset_builder(kind, source.name, data_files=data_files, revision=source.revision)
    if check is not None:
        check(builder)
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


def _check_saved(path: Path) -> None:
    """Refuses a folder of `save_to_disk` whose lists of splits and files name others, or that lacks them."""
    listed = path / "dataset_dict.json" if (path / "dataset_dict.json").is_file() else path / "state.json"
    try:
        content = json.loads(listed.read_text(encoding="utf-8"))
        splits = content["splits"] if listed.name == "dataset_dict.json" else []
        names = splits or [file["filename"] for file in content["_data_files"]]
        _check_names(f"{path}", listed.name, names)
        _check_links(path, [path / name for name in names])
    except (KeyError, TypeError, json.JSONDecodeError):
        raise SourceError(f"{listed}: is not as save_to_disk writes it; save the dataset again.") from None
    for split in splits:
        _check_saved(path / split)


def _from_disk(source: DataSource, path: Path) -> Any:
    _check_saved(path)
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
