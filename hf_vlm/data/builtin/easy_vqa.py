"""easy-VQA: 48,000 questions about 5,000 pictures of one coloured shape, from the pip package of that name.

- Pictures of 64 x 64 pixels; 13 answers: yes, no, three shapes and eight colours. Most questions ask for yes or no.
- The files are read where the package keeps them; none of its code is run.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

LICENCE = {
    "name": "easy-VQA",
    "licence": "MIT",
    "credit": "easy-VQA, by Victor Zhou",
    "source": "https://github.com/vzhou842/easy-VQA",
}


def easy_vqa_questions(split: str = "train") -> list[dict[str, Any]]:
    """The questions of a split: 38,575 to train with, 9,673 to test.

    Args:
        split: `"train"` or `"test"`; they share no picture file.

    Returns:
        Dicts with `question`, `answer` and `index`, the picture's row in `easy_vqa_images`.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: there is no such split.
    """
    asked = json.loads((_folder(split) / "questions.json").read_text(encoding="utf-8"))
    return [{"question": question, "answer": answer, "index": index} for question, answer, index in asked]


def easy_vqa_images(split: str = "train") -> list[dict[str, Any]]:
    """The pictures of a split in the order of their numbers: 4,000 to train with, 1,000 to test.

    Arguments and errors as of `easy_vqa_questions`.

    Returns:
        Dicts with `image`, a path, and `id`, the picture's number and row.
    """
    folder = _folder(split) / "images"
    count = sum(1 for _ in folder.glob("*.png"))
    return [{"image": str(folder / f"{number}.png"), "id": number} for number in range(count)]


def _folder(split: str) -> Path:
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits train and test, not {split!r}")
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError('easy-VQA needs the package easy-vqa: pip install "hf-vlm[data]"')
    return Path(spec.submodule_search_locations[0]) / "data" / split


__all__ = ["LICENCE", "easy_vqa_images", "easy_vqa_questions"]
