"""easy-VQA: 48,000 questions about 5,000 images of one coloured shape, from the pip package easy-vqa.

- Images of 64 x 64 pixels; 13 answers: yes, no, three shapes and eight colours. Most questions are yes/no questions.
- The files are read from the installed package; none of its code is run.
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
    """The questions of a split: 38,575 for training, 9,673 for testing.

    Args:
        split: `"train"` or `"test"`; they share no image.

    Returns:
        Dicts with `question`, `answer` and `index`, the image's row in `easy_vqa_images`.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if the split does not exist.
    """
    asked = json.loads((_folder(split) / "questions.json").read_text(encoding="utf-8"))
    return [{"question": question, "answer": answer, "index": index} for question, answer, index in asked]


def easy_vqa_images(split: str = "train") -> list[dict[str, Any]]:
    """The images of a split in the order of their numbers: 4,000 for training, 1,000 for testing.

    Arguments and errors are those of `easy_vqa_questions`.

    Returns:
        Dicts with `image`, a path, and `id`, the image's number and row.
    """
    folder = _folder(split) / "images"
    count = sum(1 for _ in folder.glob("*.png"))
    return [{"image": str(folder / f"{number}.png"), "id": number} for number in range(count)]


def _folder(split: str) -> Path:
    if split not in ("train", "test"):
        raise ValueError(f"split of easy-VQA must be train or test, got {split!r}")
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError('easy-VQA needs the package easy-vqa: pip install "hf-vlm[data]"')
    return Path(spec.submodule_search_locations[0]) / "data" / split


__all__ = ["LICENCE", "easy_vqa_images", "easy_vqa_questions"]
