"""Image-caption data as users name it in a YAML file: a Hub data set, a folder, or parquet, arrow, jsonl, csv, tar.

`load_source` opens one source; `hf_vlm.data.sources.mixing.mix` opens several.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from torch.utils.data import get_worker_info

from .rows import OnError, Origin, RowReader, SkipReport, SourceError, StreamReader, stored_path

_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tar": "webdataset",
}
_ROLES = ("image", "caption", "id")
# What an error proposes for `columns:` where a source has one of these.
_USUAL_NAMES = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "file_name", "path", "image_path"),
    "caption": ("caption", "captions", "text", "txt", "title", "description", "sentences"),
}
# All streams look alike inside, whatever they were read from, so that they can be mixed.
_STREAM = datasets.Features(
    {
        "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "caption": datasets.List(datasets.Value("string")),
        "id": datasets.Value("string"),
        "_origin": datasets.Value("int32"),
        "_place": datasets.Value("string"),
        "_has_id": datasets.Value("bool"),
    }
)


@dataclass(frozen=True)
class DataSource:
    """One source of image-caption rows.

    Args:
        path: A file (parquet, arrow, jsonl, csv, webdataset tar), a pattern of files ("shards/*.tar"), a folder (of
            images with a metadata.csv or metadata.jsonl, of such files, or written by `save_to_disk`), or the name of a
            data set on the Hub. Image paths in jsonl and csv start from the folder of the file and stay in it.
        name: The configuration of a Hub data set that has several.
        split: The split, or where rows are not streamed a slice of it ("train[:95%]"). Split here rather than
            afterwards if bad rows are left out: a stand-in never comes from beyond the slice.
        columns: Which column is which: `{"image": "jpg", "caption": "txt"}`, and optionally "id" (rows with equal ids
            are positives of each other). Default: the columns of that name.
        weight: Its share in a mixture.
        streaming: Reads row after row instead of preparing the whole source first. Files are shuffled, the rows within
            a file are not: shuffle them when you write shards.
        data_files: Files within `path`, as a name, a pattern, or a list of them.
        revision: The branch, tag or commit of a Hub data set.
    """

    path: str
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] | None = None
    weight: float | None = None
    streaming: bool = False
    data_files: str | list[str] | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.columns or {}) - set(_ROLES):
            raise SourceError(f"{self.path}: columns: {sorted(unknown)} is unknown; name image, caption and id.")
        if self.weight is not None and not self.weight > 0:
            raise SourceError(f"{self.path}: weight is {self.weight}; give a positive number or leave it out.")


def load_source(
    source: DataSource, on_error: OnError = "raise", report: SkipReport | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a source. Images are decoded when their row is asked for.

    Args:
        source: What to open.
        on_error: "raise", or "skip": a row whose image or caption is bad is left out and counted. In a stream it is not
            there; map-style the next good row stands in for it, so do not measure quality on data with bad rows.
        report: Counts the rows left out; a new one by default.

    Returns:
        Rows of `image` (decoded), `caption` (a text or a list of texts) and, where there is such a column, `id`. The
        files of a stream keep their order in the first epoch (`mix` shuffles them there too) and are shuffled by
        `set_epoch` in later ones; no buffer is involved, so `state_dict` resumes exactly.

    Raises:
        SourceError: if the source cannot be opened or lacks a column, or a row names a file outside its folder.
        ImageError: on access, with "raise", if an image cannot be read.
        CaptionError: on access, with "raise", if a row has no caption.
    """
    if source.streaming:
        stream, origin = open_stream(source)
        return read_stream(stream, [origin], report_for(on_error, report))
    rows, origin, columns = _open(source, seed=None)
    return read_rows(rows, origin, columns, report_for(on_error, report))


def report_for(on_error: OnError, report: SkipReport | None) -> SkipReport | None:
    """The report that counts bad rows, or None if they raise."""
    if on_error not in ("raise", "skip"):
        raise SourceError(f"on_error={on_error!r} is unknown; write 'raise' or 'skip'.")
    return (report or SkipReport()) if on_error == "skip" else None


def read_rows(
    rows: datasets.Dataset, origin: Origin, columns: dict[str, str], report: SkipReport | None
) -> datasets.Dataset:
    """Names the columns of a map-style source and decodes its rows on access."""
    rows = rows.select_columns(list(columns.values()))
    rows = rows.rename_columns({name: role for role, name in columns.items() if role != name})
    if isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    reader = RowReader(rows, origin, report)
    return rows.add_column(RowReader.POSITION, np.arange(len(rows))).with_transform(reader)


def open_stream(
    source: DataSource, number: int = 0, seed: int | None = None
) -> tuple[datasets.IterableDataset, Origin]:
    """A stream of undecoded rows with their places.

    Args:
        source: What to open.
        number: The source's position in a mixture.
        seed: Shuffles the files of the source; None keeps their order.
    """
    stream, origin, columns = _open(source, seed)
    if isinstance((stream.features or {}).get(columns["image"]), datasets.Image):
        stream = stream.cast_column(columns["image"], datasets.Image(decode=False))
    to_row = partial(_stream_row, columns=columns, label=origin.label, number=number)
    rows = stream.map(to_row, with_indices=True, features=_STREAM)
    return rows.select_columns(list(_STREAM)), origin


def _stream_row(row: dict[str, Any], index: int, columns: dict[str, str], label: str, number: int) -> dict[str, Any]:
    image, caption = row.get(columns["image"]), row.get(columns["caption"])
    if isinstance(image, str):
        image = {"bytes": None, "path": image}
    elif isinstance(image, bytes):
        image = {"bytes": image, "path": row.get("__key__")}
    row_id = row.get(columns["id"]) if "id" in columns else None
    return {
        "image": image,
        "caption": [caption] if isinstance(caption, str) else caption,
        "id": None if row_id is None else str(row_id),
        "_origin": number,
        "_place": _stream_place(row.get("__url__", label), index, image),
        "_has_id": "id" in columns,
    }


def _stream_place(label: str, index: int, image: Any) -> str:
    """The name of a row's image, or when it was read: a stream does not tell rows by number."""
    if path := stored_path(image):
        return f"{label} ({path})"
    worker = get_worker_info()
    return f"{label}, row {index}" + (f" of worker {worker.id}" if worker else "")


def read_stream(
    stream: datasets.IterableDataset, origins: list[Origin], report: SkipReport | None
) -> datasets.IterableDataset:
    """Decodes the rows of what `open_stream` opened."""
    reader = StreamReader(origins, report)
    return stream.map(reader, batched=True, batch_size=1, remove_columns=list(_STREAM))


def _open(source: DataSource, seed: int | None) -> tuple[Any, Origin, dict[str, str]]:
    try:
        rows, origin = _load(source, seed)
        names = rows.column_names or list(next(iter(rows), {}))
    except SourceError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        while error.__cause__ is not None:
            error = error.__cause__
        raise SourceError(f"{source.path}: cannot be opened: {' '.join(str(error).split())}") from error
    return rows, origin, _columns(source, names, rows.features)


def _load(source: DataSource, seed: int | None) -> tuple[Any, Origin]:
    path = Path(source.path).expanduser()
    if files := _files(source):
        kinds = {_BUILDERS[file.suffix] for file in files}
        folders = {file.parent.resolve() for file in files}
        if len(kinds) > 1 or (len(folders) > 1 and kinds & {"json", "csv"}):
            raise SourceError(f"{source.path}: files of several kinds or folders; make each a source of its own.")
        split = re.split(r"\W", source.split)[0]
        rows = _build(source, kinds.pop(), {split: [str(file) for file in files]}, seed)
        return rows, Origin(source.path, folders.pop() if len(folders) == 1 else None)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_disk(source, path), Origin(source.path, path.resolve())
    if path.is_dir():
        rows = _build(source, str(path.resolve()), None, seed)
        return rows, Origin(source.path, path.resolve(), built=rows.info.builder_name == "imagefolder")
    if path.suffix in _BUILDERS or source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1:
        raise SourceError(f"{source.path}: no such file or folder; correct the path.")
    rows = _build(source, source.path, source.data_files, seed)
    return rows, Origin(source.path, None, built=rows.info.builder_name == "imagefolder")


def _files(source: DataSource) -> list[Path]:
    """The local files that a source names, in order; none for a folder or a Hub data set."""
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
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if not found:
            raise SourceError(f"{folder / pattern}: no such file; correct the path.")
        files += found
    return files


def _build(source: DataSource, kind: str, data_files: Any, seed: int | None) -> Any:
    make = partial(datasets.load_dataset_builder, kind, source.name, data_files=data_files, revision=source.revision)
    builder = make()
    if builder.name == "webdataset":
        # As an Image, bytes would be dropped for a file of the same name in the working folder, were there one.
        features = next(iter(builder.as_streaming_dataset().values())).features
        features = {k: datasets.Value("binary") if isinstance(v, datasets.Image) else v for k, v in features.items()}
        builder = make(features=datasets.Features(features))
    if seed is not None:
        for files in builder.config.data_files.values():
            np.random.default_rng(seed).shuffle(files)
    if source.streaming:
        return builder.as_streaming_dataset(split=source.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split)


def _from_disk(source: DataSource, path: Path) -> Any:
    rows = datasets.load_from_disk(str(path))
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise SourceError(f"{source.path}: no split {source.split!r}; it has {', '.join(rows)}.")
        rows = rows[source.split]
    return rows.to_iterable_dataset() if source.streaming else rows


def _columns(source: DataSource, names: list[str], features: Any) -> dict[str, str]:
    """Role -> column, for the roles that the source has."""
    if not names:
        raise SourceError(f"{source.path}: has no rows in split {source.split!r}.")
    columns = {role: role for role in _ROLES if role != "id" or role in names} | (source.columns or {})
    missing = [name for name in columns.values() if name not in names]
    if missing:
        images = [name for name, kind in (features or {}).items() if isinstance(kind, datasets.Image)]
        guess = {
            role: next((name for name in (*(images if role == "image" else ()), *usual) if name in names), "...")
            for role, usual in _USUAL_NAMES.items()
        }
        line = ", ".join(f"{role}: {name}" for role, name in guess.items())
        raise SourceError(
            f"{source.path}: no column {', '.join(map(repr, missing))}; it has {', '.join(names)}. "
            f"Say which is which in the source: columns: {{{line}}}"
        )
    if len(set(columns.values())) < len(columns):
        raise SourceError(f"{source.path}: columns: one column stands for two; copy it under a second name first.")
    return columns


__all__ = ["DataSource", "load_source", "open_stream", "read_rows", "read_stream", "report_for"]
