"""Emoji scenes: a seeded, unlimited stream of images with complete ground truth.

- A scene is one to four emoji drawings without overlap on a plain named colour, with boxes, captions, questions and
  hard-negative captions (`scene_text.py`). All texts are true by construction.
- Scene i of a stream depends only on the split, the seed and i, and every process can generate it. Ranks and workers
  share a stream without communication, and a test set is a range of numbers.
- The splits are those of `emoji.py`. Held-out emoji and the held-out style never enter a training scene: neither as a
  drawing, nor as a name in a question or negative caption.
- In a third of the scenes with room for it, one emoji is repeated: two, three or four times, equally often. So a number
  in a caption gives no hint whether the caption is true.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .emoji import EMOJI_SPLITS, load_emoji
from .scene_drawings import BACKGROUNDS, Drawing, cut_out, paste
from .scene_text import MOST_OBJECTS, SceneText, conflict, is_nameable, plural

SIDES = {1: (0.35, 0.70), 2: (0.30, 0.45), 3: (0.26, 0.40), 4: (0.24, 0.36)}  # longer side of a drawing / of the image
REPEAT_FRACTION = 1 / 3

SCENE_FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "image": datasets.Image(),
        "background": datasets.Value("string"),
        "objects": datasets.List(
            {
                "name": datasets.Value("string"),
                "emoji": datasets.Value("string"),
                "emoji_id": datasets.Value("int64"),
                "style": datasets.Value("string"),
                "box": datasets.List(datasets.Value("int64"), length=4),
            }
        ),
        "captions": datasets.List(datasets.Value("string")),
        "questions": datasets.List({key: datasets.Value("string") for key in ("question", "answer", "kind")}),
        "hard_negatives": datasets.List({key: datasets.Value("string") for key in ("caption", "negative", "kind")}),
    }
)


class SceneStream:
    """Scenes 0, 1, 2, ... of a split and a seed.

    Args:
        split: a split of `EMOJI_SPLITS`, the source of all drawings and names.
        seed: seed of the scenes.
        size: shorter side in pixels, 48 to 1024.
        objects: minimum and maximum number of objects per scene, within 1 to 4.
        cache_dir: cache of `load_emoji`.
        aspects: aspect ratios (width over height, 1/4 to 4); one is drawn per scene. They do not change the size of the
            drawings.

    Raises:
        ValueError: if an argument is out of range.
        ModuleNotFoundError: if a package of the extra `data` is not installed (raised by the first scene).
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 64,
        objects: tuple[int, int] = (1, MOST_OBJECTS),
        cache_dir: str | Path | None = None,
        aspects: Sequence[float] = (1.0,),
    ) -> None:
        if split not in EMOJI_SPLITS:
            raise ValueError(f"split of the scenes must be one of {', '.join(EMOJI_SPLITS)}, got {split!r}")
        if not 48 <= size <= 1024:
            raise ValueError(f"size of the scenes must be 48 to 1024 pixels, got {size}")
        if not 1 <= objects[0] <= objects[1] <= MOST_OBJECTS:
            raise ValueError(f"objects in a scene must be (fewest, most) within 1 to {MOST_OBJECTS}, got {objects}")
        if not aspects or not all(0.25 <= aspect <= 4 for aspect in aspects):
            raise ValueError(f"aspects of the scenes must be 1/4 to 4, at least one, got {aspects}")
        self.split, self.seed, self.size, self.objects = split, seed, size, tuple(objects)
        self.cache_dir = cache_dir
        self.aspects = tuple(aspects)

    def __getstate__(self) -> dict:
        """The state without the decoded drawings: a worker process loads them from the cache."""
        return {key: value for key, value in self.__dict__.items() if key not in ("drawings", "names", "by_emoji")}

    @cached_property
    def drawings(self) -> list[Drawing]:
        """The split's drawings, limited to names that scenes can use."""
        rows = load_emoji(max(96, self.size // 2), self.cache_dir)[self.split]
        kept = [index for index, name in enumerate(rows["name"]) if is_nameable(name)]
        return [cut_out(row) for row in rows.select(kept)]

    @cached_property
    def by_emoji(self) -> dict[int, list[Drawing]]:
        """All drawings of each emoji."""
        groups: dict[int, list[Drawing]] = {}
        for drawing in self.drawings:
            groups.setdefault(drawing.emoji_id, []).append(drawing)
        return groups

    @cached_property
    def names(self) -> list[str]:
        """The names of the split, used for present and absent objects."""
        return sorted({drawing.name for drawing in self.drawings})

    def scene(self, index: int) -> dict:
        """Generate one scene.

        Args:
            index: number of the scene, from 0.

        Returns:
            dict with `index`, `image` (RGB), `background` (a name of `BACKGROUNDS`), `objects` (dicts
            with `name`, `emoji`, `emoji_id`, `style` and `box`, [x0, y0, x1, y1] in pixels, x1 and y1 exclusive),
            `captions`, `questions` and `hard_negatives` from `SceneText`.
        """
        rng = random.Random(f"{self.split} {self.seed} {index}")
        background = rng.choice(list(BACKGROUNDS))
        drawings = self._choose(background, rng)
        sides = [rng.uniform(*SIDES[len(drawings)]) * self.size for _ in drawings]
        width, height = self._shape(rng)
        canvas = np.empty((height, width, 3), dtype=np.uint8)
        canvas[:] = BACKGROUNDS[background]
        objects = []
        for drawing, slot in zip(drawings, _layout(drawings, sides, (width, height), rng), strict=True):
            described = {key: getattr(drawing, key) for key in ("name", "emoji", "emoji_id", "style")}
            objects.append(described | {"box": paste(canvas, drawing.picture, slot)})
        text = SceneText(objects, background, (width, height), self.names, list(BACKGROUNDS), rng)
        return {
            "index": index,
            "image": Image.fromarray(canvas),
            "background": background,
            "objects": objects,
            "captions": text.captions(),
            "questions": text.questions(),
            "hard_negatives": text.hard_negatives(),
        }

    def to_iterable_dataset(self, num_shards: int = 64, num_scenes: int | None = None) -> datasets.IterableDataset:
        """The stream as a streaming dataset, divided by shards between ranks and data loader workers.

        Args:
            num_shards: shard k holds the scenes k, k + num_shards, ...; use a multiple of ranks x workers.
            num_scenes: number of scenes; None for no limit, where each reader stays in its first shard.

        Returns:
            Rows as returned by `scene`. Resuming from a `state_dict` does not draw the skipped scenes.
        """
        shards = datasets.IterableDataset.from_generator(
            _indices, gen_kwargs={"shards": list(range(num_shards)), "step": num_shards, "num_scenes": num_scenes}
        )
        return shards.map(self._scene_of_row)

    def _scene_of_row(self, row: dict) -> dict:
        return self.scene(row["index"])

    def _shape(self, rng: random.Random) -> tuple[int, int]:
        """Width and height. A single aspect ratio draws no random number."""
        aspect = self.aspects[0] if len(self.aspects) == 1 else rng.choice(self.aspects)
        return round(self.size * max(aspect, 1)), round(self.size / min(aspect, 1))

    def _choose(self, background: str, rng: random.Random) -> list[Drawing]:
        """Drawings with enough contrast to the background. Different emoji have names that do not conflict."""
        fewest, most = self.objects
        first = self._one(background, rng)
        if most > 1 and plural(first.name) and rng.random() < REPEAT_FRACTION:
            repeats = rng.randint(2, most)
            visible = [other for other in self.by_emoji[first.emoji_id] if background in other.backgrounds]
            chosen = [rng.choice(visible) for _ in range(repeats)]
        else:
            chosen = [first]
        wanted = rng.randint(max(fewest, len(chosen)), most)
        while len(chosen) < wanted:
            drawing = self._one(background, rng)
            if not any(conflict(drawing.name, other.name) for other in chosen):
                chosen.append(drawing)
        rng.shuffle(chosen)
        return chosen

    def _one(self, background: str, rng: random.Random) -> Drawing:
        while True:
            drawing = rng.choice(self.drawings)
            if background in drawing.backgrounds:
                return drawing


def load_scenes(
    split: str,
    n: int,
    seed: int = 1,
    size: int = 64,
    objects: tuple[int, int] = (1, MOST_OBJECTS),
    cache_dir: str | Path | None = None,
    aspects: Sequence[float] = (1.0,),
) -> datasets.Dataset:
    """A fixed test set: scenes 0 to n - 1 of a stream. The default seed differs from the training default.

    Args:
        split, seed, size, objects, cache_dir, aspects: See `SceneStream`.
        n: number of scenes.

    Returns:
        Dataset in memory with the columns of `SceneStream.scene` (images as PNG).
    """
    stream = SceneStream(split, seed, size, objects, cache_dir, aspects)
    return datasets.Dataset.from_list([stream.scene(index) for index in range(n)], features=SCENE_FEATURES)


def _indices(shards: list[int], step: int, num_scenes: int | None) -> Iterator[dict]:
    for shard in shards:
        for index in itertools.count(shard, step) if num_scenes is None else range(shard, num_scenes, step):
            yield {"index": index}


def _layout(
    drawings: list[Drawing], sides: list[float], shape: tuple[int, int], rng: random.Random
) -> list[tuple[int, int, int, int]]:
    """Random slots (x0, y0, x1, y1) separated by a gap. If they do not fit after some tries, all of them shrink."""
    gap = max(1, min(shape) // 32)
    while True:
        slots: list[tuple[int, int, int, int]] = []
        for drawing, side in zip(drawings, sides, strict=True):
            scale = side / max(drawing.picture.size)
            width, height = (max(4, round(length * scale)) for length in drawing.picture.size)
            for _ in range(30):
                x, y = rng.randint(0, shape[0] - width), rng.randint(0, shape[1] - height)
                slot = (x, y, x + width, y + height)
                if all(_apart(slot, other, gap) for other in slots):
                    slots.append(slot)
                    break
            else:
                break
        if len(slots) == len(drawings):
            return slots
        sides = [0.95 * side for side in sides]


def _apart(slot: tuple[int, ...], other: tuple[int, ...], gap: int) -> bool:
    aside = slot[2] + gap <= other[0] or other[2] + gap <= slot[0]
    return aside or slot[3] + gap <= other[1] or other[3] + gap <= slot[1]


class SceneRows:
    """The first scenes of a stream as rows for [`PairDataset`] and [`QuestionDataset`].

    Args:
        stream: The stream.
        num_scenes: Number of scenes. Generating a scene takes half a millisecond; scenes are not kept in memory.
        max_words: Drop longer captions, because a batch is padded to its longest caption.

    Indexing gives dicts with `image`, `caption` (all true captions), `questions` (dicts with `question`, `answer` and
    `kind`) and `id`, the scene's number.
    """

    def __init__(self, stream: SceneStream, num_scenes: int, max_words: int | None = None):
        self.stream = stream
        self.num_scenes = num_scenes
        self.max_words = max_words

    @property
    def key(self) -> dict[str, Any]:
        """The settings that the images depend on, for the key of a feature cache."""
        stream = self.stream
        key = {"path": "scenes", "split": stream.split, "seed": stream.seed, "size": stream.size}
        return key if stream.aspects == (1.0,) else key | {"aspects": stream.aspects}

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"There is no scene {index}: scenes are numbered 0 to {self.num_scenes - 1}.")
        scene = self.stream.scene(index)
        return {
            "image": scene["image"],
            "caption": self.short(scene["captions"]),
            "questions": scene["questions"],
            "id": index,
        }

    def short(self, captions: list[str]) -> list[str]:
        """The captions of at most `max_words`, or else the shortest."""
        if self.max_words is None:
            return captions
        kept = [caption for caption in captions if len(caption.split()) <= self.max_words]
        return kept or [min(captions, key=len)]


__all__ = ["BACKGROUNDS", "SCENE_FEATURES", "SceneRows", "SceneStream", "load_scenes"]
