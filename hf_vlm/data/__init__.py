"""Data: built-in images and scenes, the user's own sources, image-text pairs, augmentation, collators."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .batches.augment import Augmentation
    from .batches.collators import CaptionCollator, ContrastiveCollator, QuestionCollator
    from .batches.conversation_collator import PLAIN_TEMPLATE, ConversationCollator
    from .batches.conversations import CaptionConversations, QuestionConversations, caption_check
    from .batches.instructions import InstructionRows
    from .batches.pairs import Pair, PairDataset, PairStream, load_pairs
    from .batches.prompt_collators import PROMPT_END, CaptionPromptCollator, PromptCollator, prompt_inputs
    from .batches.questions import Question, QuestionDataset, load_questions
    from .builtin.corruption import corrupt_captions
    from .builtin.easy_vqa import easy_vqa_images, easy_vqa_questions
    from .builtin.emoji import EMOJI_SPLITS, LICENCES, TEST_SPLITS, emoji_captions, emoji_pairs, load_emoji
    from .builtin.instructions import caption_instructions, mix_by_sqrt, question_instructions, scene_instructions
    from .builtin.pope import pope_questions
    from .builtin.scene_conversations import SceneConversations
    from .builtin.scenes import SceneRows, SceneStream, load_scenes
    from .features.cache import CachedFeatures, FeatureCacheError, cache_features, feature_key
    from .sources.conversations import Conversation, ConversationRows, load_conversations, open_conversations
    from .sources.images import ImageError, load_image
    from .sources.load import load_source, load_unchecked
    from .sources.mixing import mix, split_stream
    from .sources.open import DataSource
    from .sources.questions import QuestionRows, question_source
    from .wheels import WHEELS, resolve_part
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

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
    "InstructionRows",
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
    "caption_check",
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
    "load_unchecked",
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
