"""Items of an index, from a folder of images, a file of descriptions, or a dataset.

The id of an item is the path of its image, its `id` column, or a hash of its content. It is the same whenever a source
is read, so that an interrupted build can resume.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..data.sources.cells import Number, read_captions, read_id
from ..data.sources.images import load_image
from ..data.sources.open import WrittenRows, has_table, undecoded
from ..data.sources.rows import CaptionError, Origin, SourceError, image_of
from ..paths import is_inside
from ..terminal import printable

CAPTION_NAMES = ("caption", "text", "name", "title", "description")
TEXT_FILES = (".txt", ".jsonl", ".csv")
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
NOT_IMAGES = (".txt", ".json", ".jsonl", ".csv", ".md", ".parquet", ".html", ".xml", ".yaml", ".yml")


@dataclass
class Item:
    """An image or a text for an index.

    Args:
        id: Unique; adding it again replaces it.
        image: The image, as anything that `hf_vlm.data.load_image` reads; None for a text.
        text: The text, or the caption of the image.
        kind: "image" or "text".
        path: Path of an image that is in a file.
        metadata: Further columns: text, numbers, booleans, lists of text.
        place: Name of the item in errors; by default its id.
    """

    id: str
    image: Any = None
    text: str = ""
    kind: str = "image"
    path: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    def load(self) -> Image.Image:
        """The decoded image.

        Raises:
            ImageError: if the image cannot be read.
        """
        return load_image(self.image, where=self.place or self.id)

    def check_text(self) -> str:
        """The text.

        Raises:
            CaptionError: if it is empty.
        """
        if not isinstance(self.text, str) or not self.text.strip():
            raise CaptionError(f"{self.place or self.id}: the text is empty; fill it or remove the row.")
        return self.text


def folder_items(folder: str | Path) -> list[Item]:
    """The images of a folder and its subfolders; ids and captions are their paths.

    Hidden files, and files whose suffix says that they are not images (text, tables, pages), are left out.

    Raises:
        SourceError: if a file is a link that leads out of the folder.
        ValueError: if there are no images.
    """
    root = Path(folder).expanduser().resolve()
    items = []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() not in NOT_IMAGES:
                if not is_inside(path, root):
                    raise SourceError(f"{path}: the link leads out of {folder}; remove it or copy the file.")
                items.append(Item(str(path), path, path.relative_to(root).as_posix(), path=str(path)))
    if not items:
        raise ValueError(f"{folder}: no images in this folder; name another folder.")
    return items


def text_items(path: str | Path) -> list[Item]:
    """Items from a file of descriptions: txt (one a line), or jsonl or csv with a column of `CAPTION_NAMES`.

    Other columns become metadata.

    Raises:
        ValueError: if the file is not in its format; names the line.
    """
    path = Path(path).expanduser()
    readers = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path}: not a file of descriptions; those end in {', '.join(readers)}.")
    items = []
    try:
        for number, row in readers[path.suffix](path):
            items.append(_text_item(row, f"{path}, line {number}"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if not items:
        raise ValueError(f"{path}: no descriptions in this file; name another file.")
    return items


def _text_item(row: dict[str, Any], place: str) -> Item:
    row = dict(row)
    name = next((name for name in CAPTION_NAMES if name in row), None)
    if name is None:
        raise ValueError(f"{place}: no text column; name it one of {', '.join(CAPTION_NAMES)}.")
    text, row_id = row.pop(name), row.pop("id", None)
    identity = content_id("text", text, json.dumps(row, sort_keys=True)) if row_id is None else str(row_id)
    return Item(identity, text=text, kind="text", metadata=row, place=place)


def _txt_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, {"text": line.strip()}) for number, line in enumerate(file, 1) if line.strip())


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object.")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: more or fewer cells than the header; correct the line."
                )
            rows.append((reader.line_num, row))
    for name in {*(reader.fieldnames or ())} - {"id", *CAPTION_NAMES}:
        for (_, row), value in zip(rows, _numbers([row[name] for _, row in rows]), strict=True):
            row[name] = value
    yield from rows


def _numbers(cells: list[str]) -> list[Any]:
    """The cells of a column as numbers if all are numbers, else as texts; None for empty cells."""
    for convert in (int, float):
        try:
            values = [convert(cell) if cell else None for cell in cells]
        except ValueError:
            continue
        if all(
            value is None or convert is float or str(value) == cell for value, cell in zip(values, cells, strict=True)
        ):
            return values
    return [cell or None for cell in cells]


@dataclass
class DatasetItems:
    """The rows of a `datasets.Dataset` as items. An image is read when the iteration reaches it.

    Args:
        rows: The dataset, or the rows of files of text: their ids and captions are texts, and a column of metadata has
            a type if all of its cells have it.
        columns: Role (`image`, `caption`, `id`) -> column. Default: the first image column, a column of
            `CAPTION_NAMES`, and `id`.
        kinds: "image": images with their captions. "text": each caption as an item.
        metadata: Columns to keep as metadata; by default all others that hold text, numbers, or lists of text.
        label: Name of the dataset in errors.
        origin: Which files the rows may name; None allows any.

    Raises:
        ValueError: if a column is missing.
    """

    rows: Any
    columns: dict[str, str] | None = None
    kinds: Sequence[str] = ("image",)
    metadata: Sequence[str] | None = None
    label: str = "dataset"
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rows, WrittenRows):
            self.rows = _typed(self.rows, self.columns or {}, as_csv=self.label.endswith(".csv"))
        features = self.rows.features
        image_columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        named = [name for name in IMAGE_NAMES if name in features] if self.origin is not None else []
        roles = {"image": [*image_columns, *named], "caption": CAPTION_NAMES, "id": ("id",)}
        found = {role: next((name for name in names if name in features), None) for role, names in roles.items()}
        self.roles = {role: name for role, name in {**found, **(self.columns or {})}.items() if name is not None}
        needed = {"image": "image", "text": "caption"}
        missing = [needed[kind] for kind in self.kinds if needed[kind] not in self.roles]
        absent = [name for name in (*self.roles.values(), *(self.metadata or ())) if name not in features]
        if missing or absent:
            raise ValueError(f"{self.label}: no column for {(missing or absent)[0]}; it has {', '.join(features)}.")
        if self.metadata is None:
            others = [name for name in features if name not in self.roles.values()]
            self.metadata = [name for name in others if _is_metadata(features[name])]
        self.rows = undecoded(self.rows.with_format(None))
        self.rows = self.rows.select_columns([*self.roles.values(), *self.metadata])

    def __len__(self) -> int:
        return len(self.rows) * len(self.kinds)

    def __iter__(self) -> Iterator[Item]:
        for number, row in enumerate(self.rows):
            captions = row.get(self.roles.get("caption", ""))
            captions = captions if isinstance(captions, list) else [captions or ""]
            metadata = {name: row[name] for name in self.metadata or ()}
            place = f"{self.label}, row {number}"
            if "image" in self.kinds:
                yield self._image_item(row, captions, metadata, place)
            if "text" in self.kinds:
                for text in captions:
                    identity = content_id("text", text, json.dumps(metadata, sort_keys=True, default=str))
                    yield Item(identity, text=text, kind="text", metadata=metadata, place=place)

    def _image_item(self, row: dict[str, Any], captions: list[str], metadata: dict[str, Any], place: str) -> Item:
        cell = row[self.roles["image"]]
        source: dict[str, Any] = cell if isinstance(cell, dict) else {"path": cell}
        if isinstance(cell, bytes):
            source = {"bytes": cell}
        path, text = source.get("path"), captions[0] if captions else ""
        if "id" in self.roles and row[self.roles["id"]] is not None:
            identity = str(row[self.roles["id"]])
        else:
            identity = content_id("image", source.get("bytes") or path or "", text)
        place += f" ({printable(path, 200)})" if path else ""
        if self.origin is not None and cell is not None:
            cell = image_of(cell, self.origin, place)
            path = str(cell) if isinstance(cell, Path) else path
        return Item(identity, cell, text, path=path, metadata=metadata, place=place)


def _typed(rows: WrittenRows, columns: Mapping[str, str], as_csv: bool) -> datasets.Dataset:
    """The rows of files of text as a dataset; cells that are no value of their role are missing."""
    found = list(rows)
    captions = {columns.get("caption"), *CAPTION_NAMES}
    table = {}
    for name in rows.column_names:
        cells = [row.get(name) if isinstance(row, Mapping) else None for row in found]
        if name == columns.get("id", "id"):
            table[name] = [_value(read_id, cell) for cell in cells]
        elif name in captions:
            table[name] = [_value(read_captions, cell) for cell in cells]
        elif name in columns.values():
            table[name] = cells
        else:
            table[name] = _numbers([cell or "" for cell in cells]) if as_csv else [_plain(cell) for cell in cells]
    return datasets.Dataset.from_dict(table, on_mixed_types="use_json")


def _value(read: Callable[[Any], Any], cell: Any) -> Any:
    try:
        return read(cell)
    except ValueError:
        return None


def _plain(cell: Any) -> Any:
    """A cell with its numbers of JSON as numbers."""
    if isinstance(cell, Number):
        return json.loads(cell.text)
    if isinstance(cell, list):
        return [_plain(part) for part in cell]
    return {name: _plain(part) for name, part in cell.items()} if isinstance(cell, dict) else cell


def _is_metadata(feature: Any) -> bool:
    value = feature.feature if isinstance(feature, datasets.List) else feature
    return isinstance(value, datasets.Value) and value.dtype not in ("null", "binary", "large_binary")


def content_id(kind: str, *parts: str | bytes) -> str:
    """An id made of an item's content."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{len(data)}:".encode() + data)
    return f"{kind}-{digest.hexdigest()[:24]}"


def is_dataset(path: Path, columns: dict[str, str] | None = None) -> bool:
    """Whether a file or folder holds a table of images, rather than image files or descriptions alone."""
    if path.is_dir():
        return has_table(path)
    if not path.is_file() or path.suffix not in (".jsonl", ".csv"):
        return path.suffix in (".parquet", ".arrow", ".json", ".tar")
    if columns is not None and "image" in columns:
        return True
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    return "image" in next(iter(rows), (0, {}))[1]


def read_items(
    source: str | Path | datasets.Dataset, kinds: Sequence[str] = ("image",)
) -> Sequence[Item] | DatasetItems:
    """The items of a source: a dataset, a folder of images, an image, or a file of descriptions.

    Raises:
        ValueError: if the path does not exist.
    """
    if isinstance(source, datasets.Dataset):
        return DatasetItems(source, kinds=kinds)
    path = Path(source).expanduser()
    if path.is_dir():
        return folder_items(path)
    if not path.is_file():
        raise ValueError(f"{source}: no such file or folder; correct the path.")
    if path.suffix in TEXT_FILES:
        return text_items(path)
    return [Item(str(path.resolve()), path, path.name, path=str(path.resolve()))]


__all__ = ["DatasetItems", "Item", "content_id", "folder_items", "read_items", "text_items"]
