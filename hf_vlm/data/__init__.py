"""Data: the built-in pictures and scenes, sources of the user's own, pairs, augmentation, collators."""

from .augment import Augmentation
from .collators import CaptionCollator, ContrastiveCollator, QuestionCollator
from .corruption import corrupt_captions
from .emoji import EMOJI_SPLITS, LICENCES, load_emoji
from .emoji_pairs import TEST_SPLITS, emoji_captions, emoji_pairs
from .images import ImageError, load_image
from .mixing import mix, split_stream
from .pairs import Pair, PairDataset, PairStream, load_pairs
from .questions import Question, QuestionDataset, load_questions
from .scene_rows import SceneRows
from .scenes import SceneStream, load_scenes
from .sources import DataSource, load_source
from .wheels import WHEELS, resolve_part

__all__ = [
    "EMOJI_SPLITS",
    "LICENCES",
    "TEST_SPLITS",
    "WHEELS",
    "Augmentation",
    "CaptionCollator",
    "ContrastiveCollator",
    "DataSource",
    "ImageError",
    "Pair",
    "PairDataset",
    "PairStream",
    "Question",
    "QuestionCollator",
    "QuestionDataset",
    "SceneRows",
    "SceneStream",
    "corrupt_captions",
    "emoji_captions",
    "emoji_pairs",
    "load_emoji",
    "load_image",
    "load_pairs",
    "load_questions",
    "load_scenes",
    "load_source",
    "mix",
    "resolve_part",
    "split_stream",
]
