"""Data: the built-in pictures and scenes, sources of the user's own, pairs, augmentation, collators."""

from .augment import Augmentation
from .collators import CaptionCollator, ContrastiveCollator, QuestionCollator
from .conversation_collator import PLAIN_TEMPLATE, ConversationCollator
from .conversations import (
    CaptionConversations,
    Conversation,
    ConversationRows,
    QuestionConversations,
    load_conversations,
    open_conversations,
)
from .corruption import corrupt_captions
from .easy_vqa import easy_vqa_images, easy_vqa_questions
from .emoji import EMOJI_SPLITS, LICENCES, load_emoji
from .emoji_pairs import TEST_SPLITS, emoji_captions, emoji_pairs
from .feature_cache import CachedFeatures, FeatureCacheError, cache_features, feature_key
from .images import ImageError, load_image
from .instructions import caption_instructions, mix_by_sqrt, question_instructions, scene_instructions
from .mixing import mix, split_stream
from .pairs import Pair, PairDataset, PairStream, load_pairs
from .pope import pope_questions
from .prompt_collators import PROMPT_END, CaptionPromptCollator, PromptCollator, prompt_inputs
from .questions import Question, QuestionDataset, QuestionRows, load_questions, question_source
from .scene_conversations import SceneConversations
from .scene_rows import SceneRows
from .scenes import SceneStream, load_scenes
from .sources import DataSource, load_source
from .wheels import WHEELS, resolve_part

__all__ = [
    "EMOJI_SPLITS",
    "LICENCES",
    "PLAIN_TEMPLATE",
    "PROMPT_END",
    "TEST_SPLITS",
    "WHEELS",
    "Augmentation",
    "CachedFeatures",
    "CaptionCollator",
    "CaptionConversations",
    "CaptionPromptCollator",
    "ContrastiveCollator",
    "Conversation",
    "ConversationCollator",
    "ConversationRows",
    "DataSource",
    "FeatureCacheError",
    "ImageError",
    "Pair",
    "PairDataset",
    "PairStream",
    "PromptCollator",
    "Question",
    "QuestionCollator",
    "QuestionConversations",
    "QuestionDataset",
    "QuestionRows",
    "SceneConversations",
    "SceneRows",
    "SceneStream",
    "cache_features",
    "caption_instructions",
    "corrupt_captions",
    "easy_vqa_images",
    "easy_vqa_questions",
    "emoji_captions",
    "emoji_pairs",
    "feature_key",
    "load_conversations",
    "load_emoji",
    "load_image",
    "load_pairs",
    "load_questions",
    "load_scenes",
    "load_source",
    "mix",
    "mix_by_sqrt",
    "open_conversations",
    "pope_questions",
    "prompt_inputs",
    "question_instructions",
    "question_source",
    "resolve_part",
    "scene_instructions",
    "split_stream",
]
