"""Batches of conversations with images; only the assistant's turns are supervised.

- The assistant's turns are located by rendering the conversation turn by turn, so any chat template works.
- Image placeholders are expanded after tokenisation and never truncated.
- `packed` puts several samples into one row. Positions restart at each sample and there is no attention mask, so that
  transformers does not let samples attend to each other. Padding occurs only at the ends of rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.utils import logging

from ...models.messages import flat_content
from ...terminal import printable
from ..sources.conversations import IMAGE_MARK, Conversation, Message
from ..sources.errors import ConversationError, LengthError
from ..sources.images import load_image
from ..sources.rows import stored_path

logger = logging.get_logger(__name__)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
"""LLaVA's first stage: the image and its caption. LLaVA ends it with a newline; we use the end token so that the model
learns to stop."""
IGNORED = -100


def assistant_spans(
    render: Any, messages: Sequence[Message], where: str, end_token: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the spans of the assistant's turns in it, each with its end of turn.

    Args:
        render: `(messages, add_generation_prompt) -> str`.
        messages: The conversation.
        where: Name of the conversation in errors.
        end_token: The end token, which a template may put at the end of a whole conversation only, as Phi-3's does.

    Raises:
        ValueError: if the template renders a turn differently once another follows. A difference between the start of
            an answer and its first word is accepted.
    """
    text, spans = render(messages, False), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], True)
        for through in _renderings(render, messages[: number + 1], before, end_token):
            if text.startswith(through) and through.startswith(before):
                spans.append((len(before), len(through)))
                break
        else:
            raise ValueError(
                f"{where}: the chat template renders turn {number} differently once another follows: use another chat "
                "template, or conversations with one answer."
            )
    return text, spans


def _renderings(render: Any, messages: Sequence[Message], before: str, end_token: str | None) -> Iterator[str]:
    """Texts of the conversation up to the end of its last turn, which may be rendered so within a longer one."""
    *earlier, last = messages
    said = flat_content(last.get("content") or "").strip()
    through = render(messages, False).rstrip()
    yield through
    # The last answer may be rendered differently from earlier ones: Qwen3's starts with an empty thought.
    marked = render([*earlier, {"role": "assistant", "content": "MARK"}], False)
    like_earlier = before + said + marked.rpartition("MARK")[2].rstrip()
    yield like_earlier
    for longer in (through, like_earlier) if end_token else ():
        shorter = longer.removesuffix(end_token or "").rstrip()
        if not shorter.endswith(said):  # an answer that nothing ends would not teach to stop
            yield shorter


class ConversationCollator:
    """Turn conversations into the inputs of LLaVA.

    Args:
        processor: A [`VlmLlavaProcessor`].
        max_length: Maximum number of tokens of a sample, placeholders included; longer samples are truncated.
        packed: Whether to put several samples into rows of `row_length`.
        row_length: Tokens of a packed row; `max_length` by default.
        chat_template: Template in place of the processor's own, such as `PLAIN_TEMPLATE`.

    Returns:
        On call: `input_ids` and `labels` (-100 outside the assistant's turns) of shape `(rows, length)`, padded on the
        right; `attention_mask`, or with `packed` `position_ids`; if there are images, `pixel_values` and, with
        "anyres", `image_sizes`.

    Raises:
        ValueError: on call, with the sample's name: if an image would be truncated, if a sample has more or fewer
            `<image>` than images, or if the assistant's turns cannot be located.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int = 2048,
        packed: bool = False,
        row_length: int | None = None,
        chat_template: str | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.packed = packed
        self.row_length = max(row_length or max_length, max_length)
        self.chat_template = chat_template
        self.pad = processor.tokenizer.pad_token_id

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        samples, pictures = [], []
        for number, row in enumerate(rows):
            where = row.get("where") or f"sample {number} of the batch"
            loaded = [load_image(image, _place(where, image)) for image in row["images"]]
            images = [self.processor.image_processor.process_image(image) for image in loaded]
            samples.append(self.tokens(row["messages"], images, where))
            pictures.append(images)
        batch, order = self._packed(samples) if self.packed else self._padded(samples)
        if images := [image for number in order for image in pictures[number]]:
            batch |= dict(self.processor.image_processor(images, return_tensors="pt"))
        return batch

    def check(self, row: Conversation, where: str) -> None:
        """Checks that the images of a row fit, so that a row that does not can be skipped before it is in a batch.

        Args:
            row: A row with decoded images.
            where: Name of the row in errors.

        Raises:
            ValueError: as on call; a [`LengthError`] if an image would be truncated.
        """
        self.tokens(row["messages"], row["images"], where)

    def length(self, row: Conversation) -> int:
        """Approximate number of tokens of a row, for grouping batches by length, without opening the images.

        Each image counts as one of the tower's image size.
        """
        text = self.render(row["messages"], add_generation_prompt=False)
        size = self.processor.image_processor.size
        more = self.processor.num_image_tokens(size["height"], size["width"]) - 1  # than the mark in the text
        images = more * len(row["images"])
        words = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return min(len(self.processor.begin_tokens(text)) + len(words) + images, self.max_length)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation."""
        if not messages:
            return ""
        return self.processor.apply_chat_template(
            list(messages), self.chat_template, add_generation_prompt=add_generation_prompt
        )

    def tokens(self, messages: Sequence[Message], images: Sequence[Any], where: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation; the image sizes determine the number of placeholders."""
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_token_id
        text, spans = assistant_spans(self.render, messages, where, tokenizer.eos_token)
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if (marks := read["input_ids"].count(image_id)) != len(images):
            raise ConversationError(
                f"{where} has {marks} {IMAGE_MARK} in its turns, but {len(images)} images; make them equal."
            )
        ids = self.processor.begin_tokens(text)
        labels, waiting = [IGNORED] * len(ids), list(images)
        for token, (start, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            if token == image_id:
                picture = waiting.pop(0)
                count = self.processor.num_image_tokens(picture.height, picture.width)
                if len(ids) + count > self.max_length:
                    raise LengthError(
                        f"{where}: an image of {count} tokens after {len(ids)} other tokens exceeds max_length="
                        f"{self.max_length}: raise max_length, or remove the sample."
                    )
                ids += [image_id] * count
                labels += [IGNORED] * count
            else:
                spoken = end > start and any(start >= first and end <= last for first, last in spans)
                ids.append(token)
                labels.append(token if spoken else IGNORED)
        if len(ids) > self.max_length:
            logger.warning_once(f"Conversations of more than max_length={self.max_length} tokens are truncated.")
        labels[0] = IGNORED  # the first token has no context to be predicted from
        return ids[: self.max_length], labels[: self.max_length]

    def _padded(self, samples: list[tuple[list[int], list[int]]]) -> tuple[dict[str, torch.Tensor], list[int]]:
        length = max(len(ids) for ids, _ in samples)
        batch = {
            "input_ids": [ids + [self.pad] * (length - len(ids)) for ids, _ in samples],
            "labels": [labels + [IGNORED] * (length - len(labels)) for _, labels in samples],
            "attention_mask": [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in samples],
        }
        return {name: torch.tensor(rows) for name, rows in batch.items()}, list(range(len(samples)))

    def _packed(self, samples: list[tuple[list[int], list[int]]]) -> tuple[dict[str, torch.Tensor], list[int]]:
        bins = fill_rows([len(ids) for ids, _ in samples], self.row_length)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for chosen in bins:
            ids = [token for number in chosen for token in samples[number][0]]
            labels = [label for number in chosen for label in samples[number][1]]
            positions = [position for number in chosen for position in range(len(samples[number][0]))]
            for name, row in (("input_ids", ids), ("labels", labels), ("position_ids", positions)):
                rows[name].append(row)
        length = max(map(len, rows["input_ids"]))
        for ids, labels, positions in zip(*rows.values(), strict=True):
            missing = length - len(ids)
            ids += [self.pad] * missing
            labels += [IGNORED] * missing
            positions += range(missing)  # padding counts as one more sample
        order = [number for chosen in bins for number in chosen]
        return {name: torch.tensor(values) for name, values in rows.items()}, order


def _place(where: str, image: Any) -> str:
    path = stored_path(image)
    return f"{where} ({printable(path, 200)})" if path else where


def fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Sample numbers of each row, packed by first-fit decreasing."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = next((row for row, left in enumerate(room) if left >= lengths[number]), None)
        if fits is None:
            rows.append([])
            room.append(row_length)
            fits = len(rows) - 1
        rows[fits].append(number)
        room[fits] -= lengths[number]
    return rows


__all__ = ["IMAGE_MARK", "PLAIN_TEMPLATE", "ConversationCollator", "assistant_spans", "fill_rows"]
