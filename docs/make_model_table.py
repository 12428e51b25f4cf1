"""Writes model_cards/README.md: one row per released model, read from the model cards in that folder.

    python docs/make_model_table.py            # rewrites model_cards/README.md
    python docs/make_model_table.py --check    # exits with 1 if it is not current

Metrics come from a card's metadata (the model index), parameters and minutes from its tables.
"""

import re
import sys
from pathlib import Path

from huggingface_hub import ModelCard

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
TABLE = CARDS / "README.md"
SPLIT = "unseen_style"
METRICS = {"R@1": "text_to_image_r1", "CIDEr": "cider", "VQA": "vqa_accuracy"}
DATASETS = ("hf_vlm_scenes", "hf_vlm_emoji")  # leaves out other wordings and easy-VQA
HEADER = ("model", "parameters", "trained", "minutes", *METRICS, "card")
INTRODUCTION = """# Model cards

One card for each released small model, with the numbers that its recipe measured.

{table}

Parameters are in millions. Minutes are those of the recipe's own stage, on CPU, with evaluations during training but
not after it. Metrics are on emoji seen in training, drawn in an unseen style: R@1 is text-to-image retrieval by
embeddings; VQA is accuracy. CLIP is measured on single drawings, all other models on scenes, so its R@1 does not
compare with theirs. `blip2-small` was trained on captions only, not on questions. The cards hold the other
test sets and the baselines.
"""


def rows() -> list[list[str]]:
    """The cells of every released model, in the order of file names."""
    return [row(path) for path in sorted(CARDS.glob("*.md")) if path != TABLE]


def row(path: Path) -> list[str]:
    """The cells of one model's row.

    Raises:
        ValueError: if the card lacks the table of parameters or the minutes.
    """
    card = ModelCard.load(path)
    total, trained = (f"{int(count.replace(',', '')) / 1e6:.1f}" for count in cells(card.text, "total", path))
    (minutes,) = cells(card.text, "minutes of training, evaluations in between included", path)
    scores = {
        result.metric_type: f"{result.metric_value:.3f}"
        for result in card.data.eval_results
        if result.dataset_type in DATASETS and result.dataset_split == SPLIT
    }
    link = f"[{path.name}]({path.name})"
    return [card.data.model_name, total, trained, minutes, *(scores.get(key, "") for key in METRICS.values()), link]


def cells(text: str, label: str, path: Path) -> list[str]:
    """The cells to the right of a label in the card's tables."""
    found = re.search(rf"^\| {re.escape(label)} \| (.*) \|$", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no row {label!r}: write the card with its recipe.")
    return found[1].split(" | ")


def render() -> str:
    """The text of the page."""
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 2), "---"], *rows()]
    return INTRODUCTION.format(table="\n".join(f"| {' | '.join(line)} |" for line in lines))


def main(arguments: list[str]) -> int:
    """Rewrites or checks the page; the exit code."""
    text = render()
    current = TABLE.is_file() and TABLE.read_text(encoding="utf-8") == text
    if "--check" in arguments:
        print("model_cards/README.md is current." if current else "model_cards/README.md is not current.")
        return 0 if current else 1
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
