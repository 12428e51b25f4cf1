"""Conversations made from captions and questions."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..sources.conversations import IMAGE_MARK, SHORT_ANSWER, Conversation, Message
from ..sources.rows import Check, Rows
from .conversation_collator import ConversationCollator
from .pairs import make_pair


class CaptionConversations:
    """Captions as conversations for LLaVA's first stage: the user's turn is the image alone.

    Args:
        rows: Dicts with `image` and `caption`, one text or a list from which one is chosen.
        seed: Determines the choice, together with the row number.

    Raises:
        ValueError: on indexing, if a caption is empty.
    """

    def __init__(self, rows: Rows, seed: int = 0):
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        pair = make_pair(self.rows[index], index, (self.seed,), epoch=0, shuffle_captions=True)
        return caption_conversation(pair["image"], pair["caption"])


def caption_conversation(image: Any, caption: str) -> Conversation:
    """A caption as the answer to its image alone."""
    asked: Message = {"role": "user", "content": IMAGE_MARK}
    return {"messages": [asked, {"role": "assistant", "content": caption}], "images": [image]}


def caption_check(collator: ConversationCollator) -> Check:
    """The check of [`load_source`] and [`mix`] that a row's image fits into a sample of the collator."""
    return partial(_check_caption, collator)


def _check_caption(collator: ConversationCollator, row: Mapping[str, Any], where: str) -> None:
    caption = row["caption"] if isinstance(row["caption"], str) else row["caption"][0]
    collator.check(caption_conversation(row["image"], caption), where)


class QuestionConversations:
    """Questions with short answers as conversations, one conversation per image.

    Args:
        questions: Dicts with `question`, `answer` and `index`, the row of the image.
        images: Dicts with `image`, by row number.
        wording: Template of the first question of each image, with `{question}`.
    """

    def __init__(self, questions: Sequence[Mapping[str, Any]], images: Rows, wording: str = SHORT_ANSWER):
        asked: dict[int, list[Mapping[str, Any]]] = {}
        for question in questions:
            asked.setdefault(question["index"], []).append(question)
        self.asked = list(asked.items())
        self.images = images
        self.wording = wording

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Conversation:
        row, asked = self.asked[index]
        messages: list[Message] = []
        for number, one in enumerate(asked):
            question = one["question"] if number else f"{IMAGE_MARK}\n{self.wording.format(question=one['question'])}"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": one["answer"]})
        return {"messages": messages, "images": [self.images[row]["image"]]}


__all__ = ["CaptionConversations", "QuestionConversations", "caption_check", "caption_conversation"]
