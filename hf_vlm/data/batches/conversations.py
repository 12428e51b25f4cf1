"""Conversations made from captions and questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..sources.conversations import IMAGE_MARK, SHORT_ANSWER, Conversation, Message
from ..sources.rows import Rows
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
        asked: Message = {"role": "user", "content": IMAGE_MARK}
        return {"messages": [asked, {"role": "assistant", "content": pair["caption"]}], "images": [pair["image"]]}


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


__all__ = ["CaptionConversations", "QuestionConversations"]
