"""The built-in datasets by name, and what each offers: pairs, questions, conversations, test sets, licences.

A new dataset is a module and a row of `BUILTIN`. `hf-vlm evaluate --data NAME`, `cache-features --data NAME` and
`index build ... NAME` then accept it. Importing this module is cheap: a dataset is imported when it is opened.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Fields = dict[str, Any]


@dataclass(frozen=True)
class BuiltinOptions:
    """Options for opening a built-in dataset; each dataset ignores the options that it does not have.

    Args:
        split: The split.
        seed: Seed of generated data.
        size: Pixels of an image's shorter side.
        limit: Number of rows (0: all).
        aspects: Aspect ratios (width / height) of generated images.
    """

    split: str = "train"
    seed: int = 0
    size: int = 64
    limit: int = 0
    aspects: Sequence[float] = (1.0,)


Open = Callable[[BuiltinOptions], Any]


@dataclass(frozen=True)
class BuiltinData:
    """A built-in dataset. Fields that the dataset does not offer are None.

    Args:
        about: A short description for help texts.
        pairs: Opens rows of `image`, `caption` and `id`.
        questions: Opens rows of `image` with `question` and `answer`, or with `questions`.
        conversations: Opens rows of `messages` and `images`.
        table: Opens a `datasets.Dataset` for a search index.
        columns: Role -> column of `table`: image, caption, id.
        key: Returns the options that determine the images, for the key of a feature cache.
        test_sets: Opens (name, fields of `hf_vlm.evaluation`'s TestSet) for each test set, or only for the given names.
        test_fields: The fields of a TestSet that `test_sets` fills, except images.
        train_questions: Opens the questions whose most frequent answer is the baseline of question answering.
        task_prefix: Prefix of the names of tasks in a report.
        sizes: The smallest and the largest size of an image in pixels.
        provenance: Returns the sources with licence, credit and number of rows, for records and model cards.
    """

    about: str
    pairs: Open | None = None
    questions: Open | None = None
    conversations: Open | None = None
    table: Open | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    key: Callable[[BuiltinOptions], Fields] = lambda options: {}
    test_sets: Callable[[BuiltinOptions, Sequence[str] | None], Iterator[tuple[str, Fields]]] | None = None
    test_fields: tuple[str, ...] = ()
    train_questions: Open | None = None
    task_prefix: str = ""
    sizes: tuple[int, int] = (1, 1024)
    provenance: Callable[[], list[Fields]] = list

    def fit(self, size: int) -> int:
        """The nearest size that images of the dataset can have."""
        return min(max(size, self.sizes[0]), self.sizes[1])

    def images(self, options: BuiltinOptions) -> Any:
        """Opens rows that have at least an `image`."""
        opened = self.pairs or self.questions
        if opened is None:
            raise ValueError(f"This built-in dataset has no images to read by row: {self.about}.")
        return opened(options)


def _emoji_pairs(options: BuiltinOptions) -> Any:
    from .emoji import emoji_pairs, load_emoji

    return emoji_pairs(load_emoji(options.size)[options.split])


def _emoji_table(options: BuiltinOptions) -> Any:
    import datasets

    from .emoji import load_emoji

    return datasets.concatenate_datasets(list(load_emoji().values()))


def _emoji_test_sets(options: BuiltinOptions, names: Sequence[str] | None) -> Iterator[tuple[str, Fields]]:
    from .emoji import TEST_SPLITS, load_emoji

    splits = load_emoji()
    for name in names or TEST_SPLITS:
        rows = splits[name]
        texts = list(rows["name"])
        yield (
            name,
            {"images": rows["image"], "captions": texts, "references": texts, "ids": rows["emoji_id"], "labels": texts},
        )


def _emoji_provenance() -> list[Fields]:
    from collections import Counter

    from .emoji import LICENCES, load_emoji

    counts = {split: Counter(rows["style"]) for split, rows in load_emoji().items()}
    return [
        {"name": style, **licence, "rows": {split: n[style] for split, n in counts.items() if n[style]}}
        for style, licence in LICENCES.items()
    ]


def _scene_stream(options: BuiltinOptions) -> Any:
    from .scenes import SceneStream

    return SceneStream(options.split, options.seed, options.size, aspects=options.aspects)


def _scene_rows(options: BuiltinOptions) -> Any:
    from .scenes import SceneRows

    if options.limit < 1:
        raise ValueError("Scenes are unlimited: give their number, such as --limit 10000.")
    return SceneRows(_scene_stream(options), options.limit)


def _scene_conversations(options: BuiltinOptions) -> Any:
    from .scene_conversations import SceneConversations

    return SceneConversations(_scene_rows(options), options.seed)


def _scene_table(options: BuiltinOptions) -> Any:
    from .scenes import load_scenes

    return load_scenes(options.split, options.limit or 1000, options.seed, options.size, aspects=options.aspects)


def _scene_test_sets(options: BuiltinOptions, names: Sequence[str] | None) -> Iterator[tuple[str, Fields]]:
    from ..batches.collators import pair_id
    from .emoji import TEST_SPLITS
    from .scenes import load_scenes

    for name in names or TEST_SPLITS:
        scenes = load_scenes(name, options.limit, size=options.size, aspects=options.aspects)
        captions = list(scenes["captions"])
        yield (
            name,
            {
                "images": scenes["image"],
                "captions": [texts[0] for texts in captions],
                "ids": [pair_id(texts[0]) for texts in captions],
                "references": captions,
                "hard_negatives": scenes["hard_negatives"],
                "questions": scenes["questions"],
                "objects": [[thing["name"] for thing in things] for things in scenes["objects"]],
            },
        )


def _scene_train_questions(options: BuiltinOptions) -> Any:
    from .scenes import SceneStream

    stream = SceneStream("train", size=options.size, aspects=options.aspects)
    return [question for index in range(TRAIN_SCENES) for question in stream.scene(index)["questions"]]


def _easy_vqa_questions(options: BuiltinOptions) -> Any:
    from .easy_vqa import easy_vqa_images, easy_vqa_questions

    images, asked = easy_vqa_images(options.split), easy_vqa_questions(options.split)
    return [{"image": images[row["index"]]["image"], **row} for row in asked[: options.limit or None]]


def _easy_vqa_conversations(options: BuiltinOptions) -> Any:
    from ..batches.conversations import QuestionConversations
    from .easy_vqa import easy_vqa_images, easy_vqa_questions

    return QuestionConversations(easy_vqa_questions(options.split), easy_vqa_images(options.split))


def _easy_vqa_table(options: BuiltinOptions) -> Any:
    import datasets

    from .easy_vqa import easy_vqa_images

    return datasets.Dataset.from_list(easy_vqa_images(options.split)).cast_column("image", datasets.Image())


def _easy_vqa_test_sets(options: BuiltinOptions, names: Sequence[str] | None) -> Iterator[tuple[str, Fields]]:
    import random

    from ..sources.images import LazyImages
    from .easy_vqa import easy_vqa_images, easy_vqa_questions

    images, questions = easy_vqa_images("test"), easy_vqa_questions("test")
    if 0 < options.limit < len(questions):
        questions = random.Random(0).sample(questions, options.limit)
    asked: dict[int, list[Fields]] = {}
    for question in questions:
        asked.setdefault(question["index"], []).append(question)
    yield "test", {"images": LazyImages([images[i] for i in asked]), "questions": list(asked.values())}


def _easy_vqa_train_questions(options: BuiltinOptions) -> Any:
    from .easy_vqa import easy_vqa_questions

    return easy_vqa_questions("train")


def _easy_vqa_provenance() -> list[Fields]:
    from .easy_vqa import LICENCE, easy_vqa_questions

    return [{**LICENCE, "rows": {"train": len(easy_vqa_questions("train"))}}]


TRAIN_SCENES = 1000
"""Number of training scenes whose questions determine the most frequent answer."""

BUILTIN: dict[str, BuiltinData] = {
    "emoji": BuiltinData(
        about="emoji drawings of three vendors",
        sizes=(16, 1024),
        pairs=_emoji_pairs,
        table=_emoji_table,
        columns={"caption": "name"},
        key=lambda options: {"path": "emoji", "split": options.split, "size": options.size},
        test_sets=_emoji_test_sets,
        test_fields=("captions", "references", "labels"),
        provenance=_emoji_provenance,
    ),
    "scenes": BuiltinData(
        about="scenes composed of emoji drawings",
        sizes=(48, 1024),
        pairs=_scene_rows,
        questions=_scene_rows,
        conversations=_scene_conversations,
        table=_scene_table,
        columns={"caption": "captions"},
        key=lambda options: _scene_rows(options).key,
        test_sets=_scene_test_sets,
        test_fields=("captions", "references", "hard_negatives", "questions", "objects"),
        train_questions=_scene_train_questions,
        provenance=_emoji_provenance,
    ),
    "easy_vqa": BuiltinData(
        about="questions about one coloured shape",
        questions=_easy_vqa_questions,
        conversations=_easy_vqa_conversations,
        table=_easy_vqa_table,
        key=lambda options: {"path": "easy_vqa", "split": options.split, "limit": options.limit},
        test_sets=_easy_vqa_test_sets,
        test_fields=("questions",),
        train_questions=_easy_vqa_train_questions,
        task_prefix="easy_",
        provenance=_easy_vqa_provenance,
    ),
}


def find_builtin(name: str) -> BuiltinData | None:
    """The built-in dataset of a name; None for a path or Hub id.

    A name wins over a file or folder of the same name, whatever the working folder: `./scenes` is the folder.
    """
    if name in BUILTIN and Path(name).exists():
        logger.warning("%s is the built-in dataset, not the file or folder %s here: write ./%s for that.", *[name] * 3)
    return BUILTIN.get(name)


__all__ = ["BUILTIN", "TRAIN_SCENES", "BuiltinData", "BuiltinOptions", "find_builtin"]
