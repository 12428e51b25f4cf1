"""Records what pycocoevalcap makes of the captions in tests/data/caption_scores.json.

Run in the folder tests: `python -m scripts.record_caption_scores`. It wants Java and
`pip install --no-deps pycocoevalcap==1.2`. The captions and the choices of rows are read from the file; the words (from
its Java tokeniser) and the scores on those words are written back to it.
"""

import json
from pathlib import Path
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

FILE = Path(__file__).resolve().parents[1] / "data" / "caption_scores.json"


def scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The scores of some rows, whose words are known."""
    truths = {place: row["reference_words"] for place, row in enumerate(rows)}
    captions = {place: [row["prediction_words"]] for place, row in enumerate(rows)}
    bleu, _ = Bleu(4).compute_score(truths, captions, verbose=0)
    return {
        "cider": float(Cider().compute_score(truths, captions)[0]),
        **{f"bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)},
        "rouge_l": float(Rouge().compute_score(truths, captions)[0]),
    }


def main() -> None:
    """Tokenises and scores."""
    record = json.loads(FILE.read_text(encoding="utf-8"))
    rows = record["rows"]
    texts = {place: [row["prediction"], *row["references"]] for place, row in enumerate(rows)}
    words = PTBTokenizer().tokenize({place: [{"caption": text} for text in row] for place, row in texts.items()})
    for place, row in enumerate(rows):
        row["prediction_words"], *row["reference_words"] = words[place]
    for corpus in record["corpora"]:
        corpus["scores"] = scores([rows[place] for place in corpus["rows"]])
    lists = []
    for key, items in record.items():
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        lists.append(f'"{key}": [\n{lines}\n]')
    FILE.write_text("{\n" + ",\n".join(lists) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
