"""Messages of conversations as texts, and the images in them: one rule for training rows and for processors.

- A message's content is a text, or parts: `{"type": "image"}` and `{"type": "text", "text": ...}`.
- Parts keep their order. Images before any text are each followed by a newline, as in LLaVA's training; an image after
  a text stands where it is, with nothing around it.
- An absent content (of a turn with tool calls) stays absent; a part whose text is None is empty.

This file imports only `images.py`: it travels with checkpoints, and reading conversations needs no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .images import shown

IMAGE_TOKEN = "<image>"
IMAGE_PARTS = ("image", "image_url")


def flat_content(content: str | Sequence[Mapping[str, Any]], where: str = "A message") -> str:
    """A message's content as one text with `<image>` in the place of each image.

    Args:
        content: A text, which is returned as it is, or parts.
        where: Name of the message in errors.

    Raises:
        ValueError: for a part that is neither text nor image, such as `{"type": "video"}`, and for a content that is
            neither a text nor a list.

    Example:
        ```python
        >>> flat_content([{"type": "image"}, {"type": "text", "text": "What is this?"}])
        '<image>\\nWhat is this?'
        >>> flat_content([{"type": "text", "text": "A: "}, {"type": "image"}, {"type": "text", "text": ", B: "}])
        'A: <image>, B: '
        ```
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where} has the content {shown(content)}: write a text, or a list of parts.")
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind == "text" and isinstance(part.get("text"), str | None):
            text += part.get("text") or ""
        elif kind in IMAGE_PARTS:
            is_leading = not text.replace(f"{IMAGE_TOKEN}\n", "")
            text += f"{IMAGE_TOKEN}\n" if is_leading else IMAGE_TOKEN
        else:
            found = f"a part of type {shown(kind)}" if kind != "text" else f"the part {shown(part)}"
            raise ValueError(f"{where} has {found}: write {{'type': 'text', 'text': ...}} or {{'type': 'image'}}.")
    return text


def without_images(content: str | Sequence[Mapping[str, Any]], where: str = "A message") -> str:
    """A message's content as one text without its images; arguments and errors are those of `flat_content`."""
    if isinstance(content, list | tuple):
        flat_content(content, where)
        content = [part for part in content if part["type"] == "text"]
    return flat_content(content, where).replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")


def images_of(chat: Sequence[Mapping[str, Any]]) -> list:
    """The images, addresses and paths in a conversation; the image of a part without any is passed separately."""
    contents = [message.get("content") for message in chat]
    parts = [part for content in contents if not isinstance(content, str) for part in content or ()]
    found = []
    for part in parts:
        if part["type"] == "image_url":  # OpenAI's form
            address = part.get("image_url")
            part = address if isinstance(address, Mapping) else {"url": address}
        elif part["type"] != "image":
            continue
        found += [part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None]
    return found


def count_images(chat: Sequence[Mapping[str, Any]]) -> int:
    """Number of `<image>` in the messages of a conversation."""
    contents = [message.get("content") for message in chat]
    flat = [flat_content(one, f"Message {number}") for number, one in enumerate(contents) if one is not None]
    return sum(text.count(IMAGE_TOKEN) for text in flat)


__all__ = ["IMAGE_PARTS", "IMAGE_TOKEN", "count_images", "flat_content", "images_of", "without_images"]
