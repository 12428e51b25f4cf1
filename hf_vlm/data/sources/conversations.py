"""Conversations about images, read from the formats they are published in, as rows of `messages` and `images`.

- LLaVA-Instruct and mix665k: `conversations` of `{"from": "human" | "gpt", "value": ...}` with `<image>` in the text,
  and `image`, a path or several; ShareGPT is the same with a `system` turn and often without images.
- TRL: `messages` of `{"role": ..., "content": ...}`, contents being texts or lists of parts, and `images`.
- `<image>` is put before the text of its turn, with a line break after it, as LLaVA does.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import datasets

from .images import load_image
from .rows import HOPELESS, OnError, Rows, SkipReport, SourceError, hopeless, place_of
from .sources import report_for

IMAGE_MARK = "<image>"
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
"""How LLaVA-1.5 asks for a short answer (arXiv 2310.03744, section 3.2)."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


class Conversation(TypedDict):
    """Turns with `<image>` where an image is, and the images in their order, each as `load_image` takes it."""

    messages: list[Message]
    images: list[Any]


def read_conversation(row: Mapping[str, Any], where: str, image_folder: str | Path | None = None) -> Conversation:
    """A row of any of the formats.

    Args:
        row: With `messages` or `conversations`, and perhaps `image` or `images`.
        where: Names the row in errors.
        image_folder: Where paths of images begin; a path may not lead out of it.

    Raises:
        ValueError: if there are no turns, they do not alternate from the user to the assistant, a turn is empty, or
            there are more or fewer `<image>` than images.
        SourceError: if an image is a path and there is no image_folder, or the path leads out of it.
    """
    turns = (row.get("messages") or row.get("conversations")) if isinstance(row, Mapping) else None
    if not turns:
        raise ValueError(f"{where} has neither messages nor conversations: there is nothing to learn from it.")
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns)]
    images = row.get("images") if row.get("images") is not None else row.get("image")
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    if images and not any(IMAGE_MARK in message["content"] for message in messages):
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = f"{IMAGE_MARK}\n" * len(images) + first["content"]
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != len(images):
        raise ValueError(f"{where} has {marks} {IMAGE_MARK} in its turns, but {len(images)} images: make them equal.")
    _check_turns(messages, where)
    return {"messages": messages, "images": [_located(image, where, image_folder) for image in images]}


def _message(turn: Mapping[str, Any], where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is {turn!r}; it must say who speaks and what.")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where} is said by {role!r}; it must be one of {', '.join(ROLES)}.")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else part for part in content]
        if unknown := [kind for kind in kinds if kind not in ("text", "image")]:
            raise ValueError(
                f"{where} has a part of type {unknown[0]!r}: write {{'type': 'text', 'text': ...}} or {{'type': "
                "'image'}, and the image itself among the row's images."
            )
        marks = f"{IMAGE_MARK}\n" * kinds.count("image")
        content = marks + "".join(part.get("text") or "" for part in content if part["type"] == "text")
    if not isinstance(content, str) or not content.replace(IMAGE_MARK, "").strip():
        raise ValueError(f"{where} has no text: {content!r}. Remove the row or give it a text.")
    if content.count(IMAGE_MARK) == 1:
        content = f"{IMAGE_MARK}\n{content.replace(IMAGE_MARK, '').strip()}"
    return {"role": ROLES[role], "content": content}


def _check_turns(messages: list[Message], where: str) -> None:
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected or any(message["role"] == "system" for message in messages[1:]):
        said = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{where} is said by {said}; user and assistant must take turns, and the assistant come last.")
    if any(IMAGE_MARK in message["content"] for message in messages if message["role"] == "assistant"):
        raise ValueError(f"{where} has {IMAGE_MARK} in a turn of the assistant, which cannot show images: remove it.")


def _located(image: Any, where: str, folder: str | Path | None) -> Any:
    if isinstance(image, Mapping):
        if isinstance(image.get("bytes"), bytes):
            return image
        image = image.get("path")
    if not isinstance(image, str):
        return image
    path = PurePosixPath(image)
    if folder is None or path.is_absolute() or ".." in path.parts:
        raise SourceError(f"{where} names the image {image!r}: give image_folder, and paths that stay within it.")
    return str(Path(folder) / path)


class ConversationRows:
    """Conversations by row number, normalised when they are asked for.

    Args:
        rows: Rows of any of the formats: a list, a `datasets.Dataset`.
        image_folder: Where paths of images begin.
        name: What errors call the rows.
        on_error: "raise", or "skip": for a row that is no conversation, or whose images cannot be read, the next good
            one stands in, and it is counted. Images are then opened when a row is asked for, and not by the collator.
        report: Counts them, together with those of other sources.

    Raises:
        ValueError: on indexing: with "raise" for a row that is no conversation, with "skip" if row after row is bad.
        SourceError: on indexing, also with "skip": if a row names an image that is not in image_folder.
    """

    def __init__(
        self,
        rows: Rows,
        image_folder: str | Path | None = None,
        name: str = "conversations",
        on_error: OnError = "raise",
        report: SkipReport | None = None,
    ):
        self.rows = rows
        self.image_folder = image_folder
        self.name = name
        self.report = report_for(on_error, report)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self.rows))[index]  # or an IndexError, which ends a loop over the rows
        if self.report is None:
            return self._read(index)
        for step in range(min(len(self.rows), HOPELESS)):
            number = (index + step) % len(self.rows)
            try:
                row = self._read(number)
                images = [load_image(image, place_of(self.name, number, image)) for image in row["images"]]
                return {**row, "images": images}
            except SourceError:
                raise
            except ValueError as error:
                self.report.add(error)
        raise hopeless(self.name)

    def _read(self, index: int) -> Conversation:
        return read_conversation(self.rows[index], f"Row {index} of {self.name}", self.image_folder)


def load_conversations(path: str | Path, image_folder: str | Path | None = None, **options) -> ConversationRows:
    """Reads a file of LLaVA-Instruct's or ShareGPT's kind.

    Args:
        path: A `.json` file of a list of rows, or a `.jsonl` file of one a line.
        image_folder: Where paths of images begin.
        **options: `on_error` and `report` of [`ConversationRows`].

    Raises:
        ValueError: if the file is neither.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        lines = text.split("\n")  # not splitlines: a text may hold U+2028
        rows = [json.loads(line) for line in lines if line.strip()] if str(path).endswith("l") else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; it must be a list of rows.")
    return ConversationRows(rows, image_folder, str(path), **options)


def open_conversations(source: Mapping[str, Any], **options) -> ConversationRows:
    """A source of conversations as recipes name it.

    Args:
        source: `path` of a JSON file of LLaVA's or ShareGPT's format, with `image_folder`; or of a data set with
            `messages` and images, on the Hub or in a folder, with `name`, `split` ("train" by default) and `revision`.
        **options: `on_error` and `report` of [`ConversationRows`].

    Raises:
        ValueError: if it says anything else.
    """
    path = source["path"]
    is_file = path.endswith((".json", ".jsonl"))
    known = {"path", "image_folder"} | (set() if is_file else {"name", "split", "revision"})
    if unknown := sorted(set(source) - known):
        raise ValueError(f"The source {path} has {unknown[0]!r}; it can have {', '.join(sorted(known))}.")
    if is_file:
        return load_conversations(path, source.get("image_folder"), **options)
    rows = datasets.load_dataset(
        path, source.get("name"), split=source.get("split", "train"), revision=source.get("revision")
    )
    if rows.info.builder_name != "imagefolder":  # which names files that it found itself
        rows = _undecoded(rows)
    return ConversationRows(rows, source.get("image_folder"), path, **options)


def _undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with their images as they are stored: `datasets` would open any path that a row names."""
    stored = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, stored)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(stored))
    return rows


__all__ = [
    "IMAGE_MARK",
    "SHORT_ANSWER",
    "Conversation",
    "ConversationRows",
    "Message",
    "load_conversations",
    "open_conversations",
    "read_conversation",
]
