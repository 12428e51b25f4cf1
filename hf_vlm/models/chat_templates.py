"""Chat templates and special tokens: what the processors of BLIP-2, InstructBLIP and LLaVA share.

- Chat templates of text-only LLMs expect texts; those of llava-hf expect parts. `in_form_of` gives a template its form.
- What messages contain is read by `messages.py`.
- `added_tokens` says what a tokenizer puts around a text: a prompt begins with one begin token and has no end token.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .messages import IMAGE_TOKEN

PADDING = ("padding", "padding_side", "max_length", "pad_to_multiple_of", "return_attention_mask", "return_tensors")


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with the placeholder, a padding token, and padding on the left, as generation needs it."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    read = tokenizer("a", return_special_tokens_mask=True)
    ids, is_added = read["input_ids"], read["special_tokens_mask"]
    start = is_added.index(0) if 0 in is_added else len(ids)
    end = len(ids) - is_added[::-1].index(0) if 0 in is_added else len(ids)
    return ids[:start], ids[end:]


def padded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]], options: dict[str, Any]) -> BatchEncoding:
    """`input_ids` and `attention_mask` of rows of token ids, padded by the options of a tokenizer's call."""
    chosen = {name: options[name] for name in PADDING if name in options}
    if chosen.get("padding") != "max_length":  # it is then the length of truncation
        chosen.pop("max_length", None)
    return tokenizer.pad({"input_ids": rows}, **chosen)


def as_batch(conversation: Sequence) -> tuple[list[Sequence[dict]], bool]:
    """A list of conversations, and whether the input was already one."""
    batched = bool(conversation) and isinstance(conversation[0], list | tuple)
    return (list(conversation) if batched else [conversation]), batched


def in_form_of(
    template: str | dict, chats: Sequence[Sequence[Mapping[str, Any]]], text_of: Callable[[Any, str], str]
) -> list[list[dict]]:
    """Conversations in the form that a template reads.

    Args:
        template: The chat template; several named templates count as templates that read texts.
        chats: Conversations whose contents are texts or parts, or absent.
        text_of: Turns a message's content into one text, given the message's name for errors.
    """
    in_parts = isinstance(template, str) and reads_parts(template)

    def formed(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        if message.get("content") is None:  # a turn with tool calls; the template decides, as transformers has it
            return {name: value for name, value in message.items() if name != "content"}
        text = text_of(message["content"], f"Message {number}")
        return {**message, "content": [{"type": "text", "text": text}] if in_parts else text}

    return [[formed(number, message) for number, message in enumerate(chat)] for chat in chats]


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


__all__ = [
    "PADDING",
    "added_tokens",
    "as_batch",
    "in_form_of",
    "padded",
    "reads_parts",
    "with_image_token",
]
