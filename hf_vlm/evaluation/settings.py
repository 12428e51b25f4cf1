"""How checkpoints are evaluated."""

from dataclasses import dataclass
from typing import Any

import torch

from ..data.builtin.instruction_templates import Wordings


@dataclass(frozen=True)
class Settings:
    """How tasks are done.

    Args:
        rerank: Candidates of each query that a matching model re-ranks.
        prompt: What captions begin with, not scored. Of a language model, the instruction, in place of a wording.
        wordings: Whether InstructBLIP is asked in the first of the trained or of the unseen wordings of a task.
        beams: Beams of captions.
        caption_tokens: The longest caption in tokens.
        answer_tokens: The longest answer in tokens.
        max_questions: Questions of a test set that are asked, the first (0: all).
        rank_answers: Choose from the answers of the training questions in place of writing.
        bf16: Run under autocast to bfloat16.
        progress: Show progress bars.
    """

    rerank: int = 32
    prompt: str | None = None
    wordings: Wordings = "train"
    beams: int = 3
    caption_tokens: int = 40
    answer_tokens: int = 10
    max_questions: int = 0
    rank_answers: bool = False
    bf16: bool = False
    progress: bool = True

    @property
    def shown(self) -> dict[str, Any]:
        """What every report takes."""
        return {"progress": self.progress, "autocast_dtype": torch.bfloat16 if self.bf16 else None}


DEFAULTS = Settings()

__all__ = ["DEFAULTS", "Settings"]
