"""Conversations as text: what the processors of BLIP-2, InstructBLIP and LLaVA share.

- A message's content is a text, or parts: `{"type": "image"}` and `{"type": "text", "text": ...}`.
- Chat templates of text-only LLMs expect texts; those of llava-hf expect parts. `in_form_of` gives a template its form.
- Images named in the parts (path, address, base64, PIL) are collected for the processor's call.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import load_image
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE_TOKEN = "<image>"
IMAGE_PARTS = ("image", "image_url")


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with the placeholder, a padding token, and padding on the left, as generation needs it."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def flat_content(content: str | list[dict]) -> str:
    """A message's content as one text, with `<image>` and a newline for each image before the rest."""
    if isinstance(content, str):
        return content
    num_images = sum(part["type"] in IMAGE_PARTS for part in content)
    words = "".join(part["text"] for part in content if part["type"] == "text")
    return f"{IMAGE_TOKEN}\n" * num_images + words


def without_images(content: str | list[dict]) -> str:
    """A message's content as one text without its images."""
    return flat_content(content).replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")


def as_batch(conversation: Sequence) -> tuple[list[Sequence[dict]], bool]:
    """A list of conversations, and whether the input was already one."""
    batched = bool(conversation) and isinstance(conversation[0], list | tuple)
    return (list(conversation) if batched else [conversation]), batched


def in_form_of(
    template: str | dict, chats: Sequence[Sequence[dict]], text_of: Callable[[str | list[dict]], str]
) -> list[list[dict]]:
    """Conversations in the form that a template reads.

    Args:
        template: The chat template; several named templates count as templates that read texts.
        chats: Conversations whose contents are texts or parts.
        text_of: Turns a message's content into one text.
    """
    in_parts = isinstance(template, str) and reads_parts(template)
    return [
        [
            {**message, "content": [{"type": "text", "text": text}] if in_parts else text}
            for message in chat
            for text in [text_of(message["content"])]
        ]
        for chat in chats
    ]


@cache
def reads_parts(template: str) -> bool:
    """Whether a template reads content in parts only, as those of llava-hf do; plain text is then omitted."""
    text = "a text to look for"
    return not _shows(template, text, text) and _shows(template, [{"type": "text", "text": text}], text)


def _shows(template: str, content: str | list[dict], text: str) -> bool:
    messages = [{"role": "user", "content": content}]
    try:
        shown, _ = render_jinja_template([messages], chat_template=template, bos_token="", eos_token="")
    except (jinja2.TemplateError, TypeError):  # for example a template that concatenates a list and a string
        return False
    return text in shown[0]


def images_of(chat: Sequence[dict]) -> list:
    """The images, addresses and paths in a conversation; the image of a part without any is passed separately."""
    parts = [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]
    found = []
    for part in parts:
        if part["type"] == "image_url":  # OpenAI's form
            part = part["image_url"] if isinstance(part["image_url"], dict) else {"url": part["image_url"]}
        elif part["type"] != "image":
            continue
        found += [part[key] for key in ("image", "url", "path", "base64") if key in part]
    return found


def loaded_images(images: Any) -> Any:
    """The same images, nested in the same lists, with addresses, paths and base64 replaced by PIL images."""
    if isinstance(images, list | tuple):
        return [loaded_images(one) for one in images]
    return load_image(images) if isinstance(images, str) else images


__all__ = [
    "IMAGE_PARTS",
    "IMAGE_TOKEN",
    "as_batch",
    "flat_content",
    "images_of",
    "in_form_of",
    "loaded_images",
    "reads_parts",
    "with_image_token",
    "without_images",
]
