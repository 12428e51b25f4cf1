"""Instruction templates for each task, similar to those in InstructBLIP's appendix.

- Responses are short, so most templates ask for a short response: the model also learns the length.
- `UNSEEN_WORDINGS` ask the same in different words. They are held out from training, to measure whether a model follows
  instructions or recognises prompts.
"""

from collections.abc import Mapping
from typing import Literal

Wordings = Literal["train", "unseen"]

TASKS: Mapping[str, tuple[str, ...]] = {
    "caption": (),
    "vqa": ("question",),
    "classification": ("question", "options"),
    "matching": ("caption",),
    "reasoning": ("question",),
}
"""Task -> the fields in its templates."""

TRAIN_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "caption": (
        "Write a short caption for the image.",
        "Write a description of the picture.",
        "Give a brief description of the image.",
        "Describe the picture briefly.",
        "Describe in a few words what you see.",
        "Briefly say what the image shows.",
        "What does the picture show?",
        "Use a few words to describe the image.",
        "Can you briefly describe what you see in the image?",
        "A short caption of the image:",
        "A short description of the picture:",
        "Image description:",
    ),
    "vqa": (
        "{question}",
        "Question: {question}",
        "Q: {question} A:",
        "Question: {question} Short answer:",
        "{question} In short:",
        "{question} Answer with as few words as possible.",
        "Given the image, answer the question briefly. {question}",
        "Based on the picture, answer this with a word or two: {question}",
        "Use the image to answer the question: {question}",
        "Look at the picture. {question}",
        "What is the answer to this question about the image? {question}",
        'Somebody asks about the image: "{question}" The answer in brief:',
    ),
    "classification": (
        "{question} Options: {options}. Answer:",
        "Question: {question} Options: {options}. Short answer:",
        "Options: {options}. {question}",
        "{question} Choose one of these: {options}.",
        "{question} Choose the right option from: {options}.",
        "Given the image, answer with one of the options. {question} Options: {options}.",
        "Look at the picture and choose. {question} The options are: {options}.",
        "{question} The answer is one of: {options}. Answer:",
        "Possible answers are: {options}. Question: {question} Answer:",
        "Classify the image. {question} Classes: {options}.",
    ),
    "matching": (
        'Does this text describe the picture: "{caption}"?',
        'Is "{caption}" a true description of the image?',
        'Is the caption "{caption}" right? Answer yes or no.',
        'Caption: "{caption}" Does it match the image?',
        'Text: "{caption}" Question: does the text fit the picture? Short answer:',
        'Look at the picture. Does it show "{caption}"?',
        'Does the image show "{caption}"? Answer with yes or no.',
        'Do the image and the text "{caption}" belong together? Answer:',
        'The caption says "{caption}". Is that what the image shows?',
        '"{caption}" - does this describe what you see?',
    ),
    "reasoning": (
        "{question} Give a reason.",
        "{question} Explain your answer.",
        "{question} Answer and say why.",
        "Question: {question} Answer with a reason:",
        "Look at the picture, think, and answer with a reason. {question}",
        "Answer the question about the image and explain the answer. {question}",
        "{question} Give the answer first, then what it follows from.",
        "Use the image to answer, and explain: {question}",
        "{question} Why? Answer:",
    ),
}

UNSEEN_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "caption": (
        "Tell somebody who cannot look at it what this is.",
        "Summarise the visual content in one phrase.",
        "Please provide alternative text for this illustration.",
        "Imagine a label under this drawing. How does it read?",
    ),
    "vqa": (
        "I wonder about something here: {question}",
        "Respond tersely to the following query on the illustration: {question}",
        "Please help me out. {question} Be concise.",
        "My friend, who sees the same scene, asks: {question} Tell her in a word.",
    ),
    "classification": (
        "Pick whichever applies ({options}): {question}",
        "This is a quiz with several candidates, {options}, of which only one is correct. {question}",
        "{question} I hesitate between {options}; decide for me.",
    ),
    "matching": (
        'Somebody claims to see "{caption}" here. Would you agree?',
        'Check the following statement against what is drawn: "{caption}". Reply yes if it holds, no otherwise.',
        'Verify, yes or no: "{caption}".',
        'Could "{caption}" have been written by a person with this very scene before them, without mistake?',
    ),
    "reasoning": (
        "{question} Please justify what you say.",
        "I would like to know, with grounds: {question}",
        "Solve this little puzzle about the scene and support your solution. {question}",
    ),
}


def wordings_of(task: str, wordings: Wordings = "train") -> tuple[str, ...]:
    """The instruction templates of a task.

    Args:
        task: A key of `TASKS`; its value names the fields in braces.
        wordings: `"train"`, or `"unseen"` for the held-out templates.

    Raises:
        ValueError: if the task or the wordings are unknown.
    """
    tables = {"train": TRAIN_WORDINGS, "unseen": UNSEEN_WORDINGS}
    if wordings not in tables:
        raise ValueError(f"wordings={wordings!r} is unknown: choose 'train' or 'unseen'.")
    if task not in TASKS:
        raise ValueError(f"The instruction task {task!r} is unknown: choose {', '.join(TASKS)}.")
    return tables[wordings][task]


__all__ = ["TASKS", "TRAIN_WORDINGS", "UNSEEN_WORDINGS", "Wordings", "wordings_of"]
