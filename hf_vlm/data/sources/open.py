"""Opens data of any format as rows: the one place that knows files, folders, the Hub and image folders.

- Formats: parquet, arrow, json, jsonl, csv, webdataset tar (a file, a pattern, or files within a folder); a folder of
  such files; an image folder; a folder written by `save_to_disk`; a dataset on the Hub. All of them can be streamed.
- Text (json, jsonl, csv, the metadata of an image folder) is read by `tables.py` as it is written. `datasets` reads the
  other formats, whose columns have types.
- Rows come back undecoded. Image cells hold bytes or a path, and an `Origin` says which files a path may name.
- `load_source`, `question_source`, `open_conversations` and the search index all read through `open_rows`.
"""

import copy
import glob
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub.repocard import metadata_load

from ...paths import is_inside, leads_out
from ...terminal import quoted
from .archives import open_archives
from .arrow import arrow_builder, check_arrow
from .parquet import parquet_builder
from .rows import Origin, SourceError
from .splits import TRAIN, check_names, find_rows, find_streams, split_names, split_of_files
from .tables import TABLES, WrittenRows, first_columns, stream_tables

_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tar": "webdataset",
}
# Kinds of data that `datasets` may find in a folder or on the Hub.
_KINDS = (*dict.fromkeys(_BUILDERS.values()), "imagefolder")
# Columns of conversations.
_CONVERSATION = ("messages", "conversations", "images")
# Types of columns of ids, and those whose texts are exact.
_IDS = ("string", "large_string", "int", "uint", "null", "binary", "large_binary", "member")
_EXACT = ("timestamp", "date", "time", "duration", "decimal")
# Metadata files of an image folder.
_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class DataSource:
    """One source of image-caption rows.

    Args:
        path: A file (parquet, arrow, json, jsonl, csv, webdataset tar), a pattern of files ("shards/*.tar"), a folder
            (of images with a metadata.csv or metadata.jsonl, of such files, or written by `save_to_disk`), or the name
            of a dataset on the Hub. Image paths in json and csv start from the folder of the file and stay in it.
        name: The configuration of a Hub dataset that has several.
        split: The split, several ("train+validation") or, where rows are not streamed, slices ("train[:95%]"). Slice
            here, not afterwards, if bad rows are skipped: a replacement row never comes from beyond the slice. Files
            hold one split: train, or the one that their names say (`test.csv`).
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


def open_rows(source: DataSource, seed: int | None = None, skip: bool = False) -> OpenedRows:
    """Opens a source of any format. No image is read.

    Args:
        source: What to open.
        seed: Shuffles the files of a streaming source; None keeps their order.
        skip: Whether bad rows will be skipped. Otherwise a row of text that cannot be read is refused here.

    Raises:
        SourceError: if the source cannot be opened, or the split has no rows.
    """
    try:
        rows, origin = _open(source, seed)
        names = rows.column_names or (first_columns(rows) if isinstance(rows, datasets.IterableDataset) else [])
    except SourceError:
        raise
    except (OSError, ValueError, DatasetsError, yaml.YAMLError) as error:
        while error.__cause__ is not None:
            error = error.__cause__
            if isinstance(error, SourceError):
                raise error from None
        raise SourceError(f"{source.path}: cannot be opened: {' '.join(str(error).split())}") from error
    if isinstance(rows, WrittenRows) and not skip and (wrong := rows.unreadable()):
        raise SourceError(wrong)
    if not names:
        raise SourceError(f"{source.path}: has no rows in split {source.split!r}.")
    rows = with_class_names(rows)
    return OpenedRows(rows, origin, names, getattr(rows, "features", None))


def with_class_names(rows: Any) -> Any:
    """A dataset or stream whose class numbers are class names: a number without a name is no value."""
    for name, kind in (getattr(rows, "features", None) or {}).items():
        listed = isinstance(kind, datasets.List)
        classes = kind.feature if listed else kind
        if not isinstance(classes, datasets.ClassLabel):
            continue
        text = datasets.List(datasets.Value("string")) if listed else datasets.Value("string")
        name_of = partial(_class_names, names=dict(enumerate(classes.names)))
        if isinstance(rows, datasets.Dataset):
            names = [name_of(cell) for cell in rows.with_format(None)[name][:]]
            rows = rows.remove_columns(name).add_column(name, names, feature=text)
        else:
            to_names = partial(_named, column=name, name_of=name_of)
            rows = undecoded(rows)
            rows = rows.map(to_names, features=datasets.Features({**rows.features, name: text}))
    return rows


def _class_names(cell: Any, names: Mapping[int, str]) -> Any:
    return [names.get(number) for number in cell] if isinstance(cell, list) else names.get(cell)


def _named(row: dict[str, Any], column: str, name_of: Callable[[Any], Any]) -> dict[str, Any]:
    return {column: name_of(row[column])}


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


def with_text_ids(rows: Any, source: DataSource, columns: Mapping[str, str]) -> Any:
    """A dataset or stream whose column of ids holds texts or integers: dates and decimals become texts, exactly.

    Raises:
        SourceError: if ids are of another type.
    """
    column = columns.get("id")
    kind = (rows.features or {}).get(column)
    if kind is None:
        return rows
    dtype = getattr(kind, "dtype", None)
    if dtype is not None and dtype.startswith(_EXACT):
        return rows.cast_column(column, datasets.Value("string"))
    if dtype is None or not dtype.startswith(_IDS):
        held = dtype or type(kind).__name__
        raise SourceError(f"{source.path}: column {column!r} holds {held}; ids are texts or integers: store them so.")
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


def _open(source: DataSource, seed: int | None) -> tuple[Any, Origin]:
    path = Path(source.path).expanduser()
    if files := _files(source):
        return _open_files(source, files, seed)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_disk(source, path), Origin(source.path, path.resolve())
    if not path.is_dir() and is_local(source.path):
        raise SourceError(f"{source.path}: no such file or folder; correct the path.")
    folder = path.resolve() if path.is_dir() else None
    if folder is None:
        _check_names(source.path, "data_files", source.data_files)
        builder = _builder(source, source.path, source.data_files)
    else:
        _check_card(source.path, folder)
        builder = _builder(source, str(folder), None)
    _check_built(source, folder, builder)
    if tables := _tables_of(builder, folder):
        return _open_tables(source, tables, seed, folder), Origin(source.path, folder)
    origin = Origin(source.path, folder, built=builder.name == "imagefolder")
    if builder.name == "webdataset" or (builder.name == "parquet" and folder is not None):
        return _open_kind(source, builder.name, _files_by_split(builder), seed), origin
    return _build(source, builder, seed), origin


def _open_files(source: DataSource, files: list[Path], seed: int | None) -> tuple[Any, Origin]:
    """Local files, all of one kind, whose reader opens them."""
    kinds = {_BUILDERS[file.suffix] for file in files}
    folders = {file.parent.resolve() for file in files}
    texts = any(file.suffix in TABLES for file in files)
    if len(kinds) > 1 or (len(folders) > 1 and texts):
        raise SourceError(f"{source.path}: files of several kinds or folders; make each a source of its own.")
    origin = Origin(source.path, folders.pop() if len(folders) == 1 else None)
    named = {split_of_files(source.path, source.split, files): [str(file) for file in files]}
    if texts:
        return _open_tables(source, named, seed), origin
    return _open_kind(source, kinds.pop(), named, seed), origin


def _open_kind(source: DataSource, kind: str, files: Mapping[str, list[str]], seed: int | None) -> Any:
    """Files of tar, parquet or arrow, by split."""
    check_names(source.path, source.split, files)
    if source.split != "all":
        files = {name: files[name] for name in split_names(source.split)}
    columns = source.columns or {}
    if kind == "webdataset":
        return _archives(source, {name: _shuffled(paths, seed) for name, paths in files.items()})
    if kind == "parquet":
        wanted = {*_CONVERSATION, *(columns.get(role, role) for role in source.ROLES)}
        return _build(source, parquet_builder(files, wanted), seed)
    if kind == "arrow":
        return _build(source, arrow_builder(files), seed)
    return _build(source, datasets.load_dataset_builder(kind, data_files=_escaped(files)), seed)


def _shuffled(files: list[str], seed: int | None) -> list[str]:
    files = list(files)
    if seed is not None:
        np.random.default_rng(seed).shuffle(files)
    return files


def _escaped(files: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {name: [glob.escape(path) for path in paths] for name, paths in files.items()}


def _open_tables(
    source: DataSource, tables: Mapping[str, list[str]], seed: int | None, image_folder: Path | None = None
) -> Any:
    """Files of text by split; those of an image folder name images, below which folder is said."""
    if source.streaming:
        names = [file for name in find_streams(source.path, source.split, tables) for file in tables[name]]
        return stream_tables(_shuffled(names, seed), image_folder)
    check_names(source.path, source.split, tables)
    wanted = tables if source.split == "all" else dict.fromkeys(split_names(source.split))
    parts = {name: WrittenRows.read(tables[name], image_folder) for name in wanted}
    ranges = find_rows(source.path, source.split, {name: len(rows) for name, rows in parts.items()})
    return WrittenRows.joined([parts[name].select(start, stop) for name, start, stop in ranges])


def _tables_of(builder: datasets.DatasetBuilder, folder: Path | None) -> dict[str, list[str]]:
    """The files of text, by split, that `datasets` would read with types; none if it reads other files."""
    config, files = builder.config, _files_by_split(builder)
    if builder.name == "imagefolder" and folder is not None:
        files = {split: [file for file in found if Path(file).name in _METADATA] for split, found in files.items()}
    elif builder.name not in ("json", "csv") or config != type(config)(
        name=config.name, data_files=config.data_files, data_dir=config.data_dir
    ):
        return {}
    return files if all(files.values()) else {}


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


def _files_by_split(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    return {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}


def _builder(source: DataSource, kind: str, data_files: Any) -> datasets.DatasetBuilder:
    return datasets.load_dataset_builder(kind, source.name, data_files=data_files, revision=source.revision)


def _build(source: DataSource, builder: datasets.DatasetBuilder, seed: int | None) -> Any:
    if seed is not None:
        for files in builder.config.data_files.values():
            np.random.default_rng(seed).shuffle(files)
    if source.streaming:
        streams = builder.as_streaming_dataset()
        return _together([streams[name] for name in find_streams(source.path, source.split, streams)])
    builder.download_and_prepare()
    return _slices(source, builder.as_dataset())


def _archives(source: DataSource, files: Mapping[str, list[str]]) -> Any:
    """The samples of tar archives, by split."""
    wanted = (source.columns or {}).values()
    if source.streaming:
        names = find_streams(source.path, source.split, files)
        return open_archives([file for name in names for file in files[name]], True, wanted)
    download = datasets.DownloadManager("webdataset").download
    return _slices(source, {name: open_archives(download(found), False, wanted) for name, found in files.items()})


def _slices(source: DataSource, splits: Mapping[str, datasets.Dataset]) -> datasets.Dataset:
    """The rows of a split expression."""
    ranges = find_rows(source.path, source.split, {str(name): len(rows) for name, rows in splits.items()})
    return _together([splits[name].select(range(start, stop)) for name, start, stop in ranges])


def _together(parts: list[Any]) -> Any:
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _check_saved(path: Path) -> None:
    """Refuses a folder of `save_to_disk` whose lists of splits and files name others, or that lacks them."""
    listed = path / "dataset_dict.json" if (path / "dataset_dict.json").is_file() else path / "state.json"
    try:
        content = json.loads(listed.read_text(encoding="utf-8"))
        splits = content["splits"] if listed.name == "dataset_dict.json" else []
        names = splits or [file["filename"] for file in content["_data_files"]]
        _check_names(f"{path}", listed.name, names)
        _check_links(path, [path / name for name in names])
        for name in () if splits else names:
            check_arrow(path / name)
    except (KeyError, TypeError, json.JSONDecodeError):
        raise SourceError(f"{listed}: is not as save_to_disk writes it; save the dataset again.") from None
    for split in splits:
        _check_saved(path / split)


def _from_disk(source: DataSource, path: Path) -> Any:
    _check_saved(path)
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):  # one split: its own, or train
        own = str(saved.split or TRAIN)
        saved = {own if own in split_names(source.split) else TRAIN: saved}
    if source.streaming:
        names = find_streams(source.path, source.split, saved)
        return _together([saved[name].to_iterable_dataset() for name in names])
    return _slices(source, saved)


__all__ = [
    "DataSource",
    "OpenedRows",
    "WrittenRows",
    "find_columns",
    "has_table",
    "is_local",
    "open_rows",
    "undecoded",
    "with_text_ids",
]
