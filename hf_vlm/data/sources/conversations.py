"""Reads conversations about images from their published formats, as rows of `messages` and `images`.

- LLaVA-Instruct and mix665k: `conversations` of `{"from": "human" | "gpt", "value": ...}` with `<image>` in the text,
  and `image`, a path or several; ShareGPT is the same with a `system` turn and often without images.
- TRL: `messages` of `{"role": ..., "content": ...}`, contents being texts or lists of parts, and `images`.
- The only `<image>` in a text is put before that text, with a newline after it, as LLaVA does. Parts keep their order:
  `hf_vlm.models.messages` has the rule, which processors share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ...models.messages import flat_content
from ...terminal import quoted
from .cells import UNREADABLE, is_utf8
from .errors import ConversationError
from .images import load_image
from .open import DataSource, WrittenRows, open_rows, undecoded
from .rows import (
    Check,
    OnError,
    Origin,
    Rows,
    SkipReport,
    SourceError,
    image_of,
    next_good,
    place_of,
    report_for,
    stored_path,
)

IMAGE_MARK = "<image>"
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
"""How LLaVA-1.5 asks for a short answer (arXiv 2310.03744, section 3.2)."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

CONVERSATION_KEYS = ("columns", "data_files", "image_folder", "name", "path", "revision", "split")
"""Keys of a source of conversations."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Conversation(TypedDict):
    """Turns with `<image>` where an image is, and the images in their order, each as `load_image` takes it.

    `where` is the name of the row in errors, of rows that come from a source.
    """

    messages: list[Message]
    images: list[Any]
    where: NotRequired[str]


def read_conversation(
    row: Mapping[str, Any], where: str, image_folder: str | Path | None = None, origin: Origin | None = None
) -> Conversation:
    """Normalise a row of any of the formats.

    Args:
        row: A dict with `messages` or `conversations`, and optionally `image` or `images`.
        where: The name of the row in errors.
        image_folder: The folder that image paths are relative to and must stay in.
        origin: Where the rows come from, if `datasets` listed the images of a folder itself.

    Raises:
        ConversationError: if there are no turns, they do not alternate from the user to the assistant, a turn is empty,
            or there are more or fewer `<image>` than images.
        SourceError: if an image is a path and there is no image_folder, or the path leads out of it.
    """
    if isinstance(row, Mapping) and UNREADABLE in row:
        raise ConversationError(f"{where}: {row[UNREADABLE]}")
    turns = (row.get("messages") or row.get("conversations")) if isinstance(row, Mapping) else None
    if isinstance(turns, ValueError):  # a cell that could not be read
        raise ConversationError(f"{where}: the column of messages {turns}")
    if not turns:
        raise ConversationError(f"{where} has neither messages nor conversations: add one of them or remove the row.")
    if not isinstance(turns, list | tuple):
        raise ConversationError(f"{where} has {quoted(turns)} as its turns; give it a list of them or remove the row.")
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns)]
    images = row.get("images") if row.get("images") is not None else row.get("image")
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    if images and not any(IMAGE_MARK in message["content"] for message in messages):
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = f"{IMAGE_MARK}\n" * len(images) + first["content"]
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != len(images):
        raise ConversationError(
            f"{where} has {marks} {IMAGE_MARK} in its turns, but {len(images)} images; make them equal."
        )
    _check_turns(messages, where)
    located = [_located(image, where, image_folder, origin) for image in images]
    return {"messages": messages, "images": located, "where": where}


def _message(turn: Mapping[str, Any], where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ConversationError(f"{where} is {quoted(turn)}; write a dict with a role and a content.")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise ConversationError(f"{where} has the role {quoted(role)}; it must be one of {', '.join(ROLES)}.")
    if isinstance(content, list):
        if any(isinstance(part, Mapping) and part.get("type") == "image_url" for part in content):
            raise ConversationError(
                f"{where} has a part of type 'image_url': put the image itself among the row's images."
            )
        try:
            content = flat_content(content, where)
        except ValueError as error:
            raise ConversationError(str(error)) from None
    elif isinstance(content, str) and content.count(IMAGE_MARK) == 1:
        content = f"{IMAGE_MARK}\n{content.replace(IMAGE_MARK, '').strip()}"
    if not isinstance(content, str) or not content.replace(IMAGE_MARK, "").strip():
        raise ConversationError(f"{where} has no text: {quoted(content)}; add text or remove the row.")
    if not is_utf8(content):
        raise ConversationError(f"{where} has half of a surrogate pair in {quoted(content)}; correct the text.")
    return {"role": ROLES[role], "content": content}


def _check_turns(messages: list[Message], where: str) -> None:
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected or any(message["role"] == "system" for message in messages[1:]):
        said = ", ".join(message["role"] for message in messages)
        raise ConversationError(
            f"{where} has the roles {said}; user and assistant must alternate, and the assistant must be last."
        )
    if any(IMAGE_MARK in message["content"] for message in messages if message["role"] == "assistant"):
        raise ConversationError(
            f"{where} has {IMAGE_MARK} in an assistant turn, which cannot contain images; remove it."
        )


def _located(image: Any, where: str, folder: str | Path | None, origin: Origin | None) -> Any:
    if origin is not None and origin.built:
        return image_of(image, origin, where)
    path = stored_path(image)
    has_bytes = isinstance(image, Mapping) and image.get("bytes") is not None
    if isinstance(path, str) and folder is None and not has_bytes:
        raise SourceError(f"{where} names the image {quoted(path)}: give image_folder, and paths that stay within it.")
    found = image_of(image, Origin(where, None if folder is None else Path(folder)), where)
    if isinstance(found, Path) and folder is not None:
        return str(Path(folder) / str(path))
    return image if isinstance(found, bytes) else found


class ConversationRows:
    """Conversations by row number, normalised on access.

    Args:
        rows: Rows of any of the formats: a list, a `datasets.Dataset`.
        image_folder: The folder that image paths are relative to.
        name: The name of the rows in errors.
        on_error: "raise", or "skip": a row that is not a conversation, or whose images cannot be read, is counted and
            replaced by the next good one. Images are then decoded on access and not by the collator.
        report: Counts the skipped rows, possibly of several sources.
        origin: Where the rows come from, if `datasets` listed the images of a folder itself.
        check: Called with each row and its place if bad rows are skipped, such as [`ConversationCollator.check`]; a
            ValueError makes the row a bad one.

    Raises:
        ValueError: on indexing: if a row is not a conversation; with "skip" only after too many consecutive bad rows.
        SourceError: on indexing, also with "skip": if a row names an image that is not in image_folder.
    """

    def __init__(
        self,
        rows: Rows,
        image_folder: str | Path | None = None,
        name: str = "conversations",
        on_error: OnError = "raise",
        report: SkipReport | None = None,
        origin: Origin | None = None,
        check: Check | None = None,
    ):
        self.rows = rows
        self.image_folder = image_folder
        self.name = name
        self.origin = origin
        self.check = check
        report = report_for(on_error, report)
        self.tally = None if report is None else report.source(name, len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self.rows))[index]  # or an IndexError, which ends a loop over the rows
        return next_good(self._read, index, len(self.rows), self.name, self.tally)

    def _read(self, index: int) -> Conversation:
        row = read_conversation(self.rows[index], f"Row {index} of {self.name}", self.image_folder, self.origin)
        if self.tally is None:
            return row  # the collator decodes its images
        images = [load_image(image, place_of(self.name, index, image)) for image in row["images"]]
        row = {**row, "images": images}
        if self.check is not None:
            self.check(row, row["where"])
        return row


def load_conversations(path: str | Path, image_folder: str | Path | None = None, **options) -> ConversationRows:
    """Conversations of a JSON file in the format of LLaVA-Instruct or ShareGPT.

    Args:
        path: A `.json` file with a list of rows, or a `.jsonl` file with one row a line.
        image_folder: The folder that image paths start from.
        **options: `on_error`, `report` and `check` of [`ConversationRows`].

    Raises:
        ValueError: if the file is not valid JSON, or holds no rows.
    """
    opened = open_rows(DataSource(str(path)), skip=options.get("on_error") == "skip")
    return ConversationRows(opened.rows, image_folder, str(path), **options)


def open_conversations(source: Mapping[str, Any], **options) -> ConversationRows:
    """Conversations of a source as recipes name it.

    Args:
        source: `path`, and optionally `name`, `split` ("train" by default), `data_files` and `revision`, as of
            [`DataSource`]; `image_folder`, the folder that image paths start from; and `columns`, which may name the
            columns of messages and images: `{"messages": "json", "image": "jpg"}` in a webdataset tar.
        **options: `on_error`, `report` and `check` of [`ConversationRows`].

    Raises:
        ValueError: if the source names another field, or cannot be opened.
    """
    path, columns = source["path"], dict(source.get("columns") or {})
    if unknown := sorted(set(source) - set(CONVERSATION_KEYS)):
        raise ValueError(f"The source {path} has {unknown[0]!r}; it can have {', '.join(CONVERSATION_KEYS)}.")
    if unknown := sorted(set(columns) - {"messages", "image"}):
        raise ValueError(f"{path}: columns: {unknown} is unknown; name messages and image.")
    fields = {name: value for name, value in source.items() if name not in ("image_folder", "columns")}
    opened = open_rows(DataSource(**fields), skip=options.get("on_error") == "skip")
    if absent := sorted(set(columns.values()) - set(opened.names)):
        raise ValueError(f"{path}: no column {absent[0]!r}; it has {', '.join(opened.names)}.")
    rows = opened.rows if isinstance(opened.rows, WrittenRows) else undecoded(opened.rows)
    rows = _RenamedRows(rows, columns) if columns else rows
    return ConversationRows(rows, source.get("image_folder"), path, origin=opened.origin, **options)


class _RenamedRows:
    """Rows with the columns of messages and images under their usual names."""

    def __init__(self, rows: Rows, columns: Mapping[str, str]):
        self.rows, self.columns = rows, columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        found = {role: row.get(name) for role, name in self.columns.items()}
        messages = found.get("messages", row.get("messages") or row.get("conversations"))
        if isinstance(messages, Mapping):  # a file of a whole row, as in a tar
            found["messages"] = messages.get("messages") or messages.get("conversations")
        return {**row, **found}


__all__ = [
    "CONVERSATION_KEYS",
    "IMAGE_MARK",
    "SHORT_ANSWER",
    "Conversation",
    "ConversationRows",
    "Message",
    "load_conversations",
    "open_conversations",
    "read_conversation",
]
