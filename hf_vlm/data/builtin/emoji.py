"""Built-in images: emoji as drawn by three vendors, with English names and keywords.

- Drawings by human artists, from pip packages (extra `data`). Nothing is downloaded.
- Emoji: fully qualified ones (keycaps too) that all three vendors draw. Excluded are skin tones, flags of countries and
  regions, and two dozen whose Noto glyph resvg renders wrong.
- If a vendor draws several emoji alike (`man walking` and `person walking`, most families), only the one with the
  shortest code sequence is kept.
- Held out from training: 15 % of the emoji, chosen by a hash of their code points, and the style `noto`. The hash
  ignores families: `man astronaut` may be seen and `woman astronaut` held out.
- Drawn once per size and cached in `~/.cache/hf_vlm/emoji`. The environment variable `HF_VLM_CACHE` replaces
  `~/.cache/hf_vlm`. The cache key contains the versions of the packages.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from tqdm import tqdm

from .drawings import PROBE_SIZE, STYLES, Drawings, code_points, package_folder, package_versions

TRAIN_STYLES = ("openmoji", "twemoji")
HELD_OUT_FRACTION = 0.15
VALIDATION_FRACTION = 0.06

EMOJI_SPLITS = {
    "train": "seen emoji (85 %, by sha256 of the code points), openmoji and twemoji, without the validation drawings",
    "validation": "the twemoji drawing of 6 % of the seen emoji (by another sha256); train has their openmoji drawing",
    "unseen_style": "all seen emoji in the style noto, which is never trained on",
    "unseen_emoji": "the held-out emoji (15 %), styles openmoji and twemoji",
    "unseen_both": "the held-out emoji in the style noto",
}

LICENCES = {
    "openmoji": {
        "licence": "CC-BY-SA-4.0",
        "credit": "OpenMoji, the open-source emoji and icon project",
        "source": "https://github.com/hfg-gmuend/openmoji",
    },
    "twemoji": {
        "licence": "CC-BY-4.0",
        "credit": "Twemoji, copyright Twitter, Inc and other contributors",
        "source": "https://github.com/jdecked/twemoji",
    },
    "noto": {
        "licence": "OFL-1.1",
        "credit": "Noto Color Emoji, copyright Google Inc.",
        "source": "https://github.com/googlefonts/noto-emoji",
    },
}

MAX_KEYWORDS = 6
TEST_SPLITS = ("unseen_style", "unseen_emoji", "unseen_both")
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "name": datasets.Value("string"),
        "keywords": datasets.List(datasets.Value("string")),
        "emoji": datasets.Value("string"),
        "style": datasets.Value("string"),
        "emoji_id": datasets.Value("int64"),
    }
)

RULES = 1  # part of the cache key: increment when a rule in this file or in drawings.py changes
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
REGION_LETTERS = range(0x1F1E6, 0x1F1FF + 1)
TAGS = range(0xE0000, 0xE007F + 1)  # flags of regions are written with them
TWIN_DISTANCE = 2.0  # of 255, root mean square at PROBE_SIZE; pairs above it are visibly different
BLANK_COVERAGE = 0.01  # the emptiest real drawing covers 3 % of its square


def load_emoji(size: int = 96, cache_dir: str | Path | None = None) -> datasets.DatasetDict:
    """Load the built-in images; draws them first if they are not in the cache.

    Args:
        size: side in pixels, 16 to 1024.
        cache_dir: folder of the cache, `$HF_VLM_CACHE/emoji` or `~/.cache/hf_vlm/emoji` if None.

    Returns:
        The splits of `EMOJI_SPLITS`, with the columns `image` (RGBA, transparent background), `name`, `keywords`,
        `emoji` (the characters), `style`, `emoji_id` (equal for all drawings of one emoji).

    Raises:
        ModuleNotFoundError: if a package of the extra `data` is not installed.
        ValueError: if the size is out of range.
    """
    if not 16 <= size <= 1024:
        raise ValueError(f"size of the emoji images must be 16 to 1024 pixels, got {size}")
    root = Path(cache_dir or Path(os.environ.get("HF_VLM_CACHE", "~/.cache/hf_vlm")) / "emoji").expanduser()
    key = hashlib.sha256(json.dumps([RULES, package_versions()]).encode()).hexdigest()[:12]
    folder = root / f"{size}px-{key}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):  # ranks and workers start together; one of them draws
            if not folder.exists():
                _save_atomically(_draw_splits(size), folder)
    return datasets.load_from_disk(folder)


def is_held_out(emoji: str) -> bool:
    """Whether the emoji is one of the 15 % held out from training."""
    return _hash_fraction("held out", emoji) < HELD_OUT_FRACTION


def emoji_name(emoji: str) -> str:
    """English name in lower case, words separated by spaces: `grinning face with big eyes`."""
    import emoji as unicode_emoji

    name = unicode_emoji.EMOJI_DATA[emoji]["en"].strip(":").replace("_", " ").lower()
    return name.translate({0x2019: "'", 0x201C: None, 0x201D: None})  # typographic apostrophe and quotation marks


def _hash_fraction(salt: str, emoji: str) -> float:
    """A number in [0, 1) that depends only on the salt and the code points, in every process."""
    text = salt + ":" + "-".join(f"{point:x}" for point in code_points(emoji))
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


def _split_of(emoji: str, style: str) -> str:
    if is_held_out(emoji):
        return "unseen_emoji" if style in TRAIN_STYLES else "unseen_both"
    if style not in TRAIN_STYLES:
        return "unseen_style"
    held_back = style == "twemoji" and _hash_fraction("validation", emoji) < VALIDATION_FRACTION
    return "validation" if held_back else "train"


def _candidates() -> list[str]:
    """Fully qualified emoji without skin tones and regions, shortest code sequence (then shortest name) first."""
    package_folder("emoji")
    import emoji as unicode_emoji

    left_out = {*SKIN_TONES, *REGION_LETTERS, *TAGS}
    qualified = unicode_emoji.STATUS["fully_qualified"]
    kept = [
        emoji
        for emoji, entry in unicode_emoji.EMOJI_DATA.items()
        if entry["status"] == qualified and left_out.isdisjoint(code_points(emoji))
    ]
    return sorted(kept, key=lambda emoji: (len(code_points(emoji)), len(emoji_name(emoji)), code_points(emoji)))


def _drawn_apart(candidates: list[str], drawings: Drawings) -> list[str]:
    """The candidates that every vendor draws, without those that a vendor draws like an earlier candidate."""
    drawn = [emoji for emoji in candidates if all(drawings.exists(emoji, style) for style in STYLES)]
    near = np.zeros((len(drawn), len(drawn)), dtype=bool)
    blank = np.zeros(len(drawn), dtype=bool)
    for style in STYLES:
        bar = tqdm(drawn, desc=f"comparing the emoji of {style}", unit=" emoji")
        thumbnails = np.stack([np.asarray(drawings.draw(emoji, style, PROBE_SIZE).convert("RGBa")) for emoji in bar])
        blank |= (thumbnails[..., 3] > 127).mean(axis=(1, 2)) < BLANK_COVERAGE
        near |= _distances(thumbnails.reshape(len(drawn), -1)) < TWIN_DISTANCE
    kept: list[int] = []
    for index in range(len(drawn)):
        if not blank[index] and not near[index, kept].any():
            kept.append(index)
    return [drawn[index] for index in kept]


def _distances(pixels: np.ndarray) -> np.ndarray:
    """Root mean square differences `(n, n)` between the rows of `(n, values)`."""
    rows = pixels.astype(np.float64)
    squares = (rows**2).sum(axis=1)
    summed = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    return np.sqrt(np.maximum(summed, 0) / rows.shape[1])


def _keywords(emoji: str, table: dict[tuple[int, ...], list[str]]) -> list[str]:
    """Keywords, except the name, duplicates and emoticons such as `:d`."""
    words = [word.lower().replace("_", " ").strip() for word in table.get(code_points(emoji), [])]
    return [word for word in dict.fromkeys(words) if re.match(r"\w", word) and word != emoji_name(emoji)]


def _rows(size: int) -> Iterator[dict]:
    drawings = Drawings()
    table = json.loads((package_folder("em-keyboard") / "emojis.json").read_text("utf-8"))
    table = {code_points(emoji): words for emoji, words in table.items()}
    emoji_list = sorted(_drawn_apart(_candidates(), drawings), key=code_points)
    for emoji_id, emoji in enumerate(tqdm(emoji_list, desc=f"drawing emoji at {size} px", unit=" emoji")):
        name, keywords = emoji_name(emoji), _keywords(emoji, table)
        for style in STYLES:
            png = io.BytesIO()
            drawings.draw(emoji, style, size).save(png, format="PNG")
            values = ({"bytes": png.getvalue(), "path": None}, name, keywords, emoji, style, emoji_id)
            yield dict(zip(FEATURES, values, strict=True))


def _draw_splits(size: int) -> datasets.DatasetDict:
    splits = {name: [] for name in EMOJI_SPLITS}
    for row in _rows(size):
        splits[_split_of(row["emoji"], row["style"])].append(row)
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows, FEATURES) for name, rows in splits.items()})


def _save_atomically(splits: datasets.DatasetDict, folder: Path) -> None:
    """Write to a temporary folder next to the target and rename it, so that the target is always complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process; we hold the lock
    try:
        splits.save_to_disk(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def emoji_captions(name: str, keywords: Sequence[str]) -> list[str]:
    """Training captions of an emoji: its name (twice), the name in a phrase, and the name with each of six keywords.

    The list is finite, so that embeddings of a frozen text tower can be cached.
    """
    return [name, name, f"an emoji of {name}", *(f"{name}, {keyword}" for keyword in keywords[:MAX_KEYWORDS])]


def emoji_pairs(split: datasets.Dataset, names_only: bool = False) -> list[dict[str, Any]]:
    """Rows for [`PairDataset`], decoded once and held in memory (about 36 kB each at 96 pixels).

    Args:
        split: A split of [`load_emoji`].
        names_only: Use only the name as caption, as in evaluation; otherwise all of [`emoji_captions`].

    Returns:
        Dicts with `image` (RGBA), `caption` (list of strings) and `id`. All styles of an emoji share its `id`, so its
        drawings are positives of each other's captions.
    """
    return [
        {
            "image": row["image"],
            "caption": [row["name"]] if names_only else emoji_captions(row["name"], row["keywords"]),
            "id": row["emoji_id"],
        }
        for row in split
    ]


__all__ = [
    "EMOJI_SPLITS",
    "LICENCES",
    "TEST_SPLITS",
    "TRAIN_STYLES",
    "emoji_captions",
    "emoji_name",
    "emoji_pairs",
    "is_held_out",
    "load_emoji",
]
