"""Conversations about scenes, of the three kinds of LLaVA-Instruct (arXiv 2304.08485, section 3), made by rule.

LLaVA asked a text-only LLM to write them from captions and boxes. Of scenes all objects, boxes and colours are known,
so every sentence can be true without one. Two kinds are LLaVA-1.5's (arXiv 2310.03744, section 3.2): short answers and
captions, asked for by a fixed sentence that says how to respond. As there, all short questions about an image are one
conversation.
"""

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..sources.conversations import IMAGE_MARK, SHORT_ANSWER, Conversation, Message
from .instructions import scene_reasoning
from .scene_rows import SceneRows
from .scene_text import OPPOSITES, holds, phrase, place

CAPTION = "Provide a one-sentence caption for the provided image."
DETAIL_QUESTIONS = (
    "Describe the image in detail.",
    "What do you see in this picture? Describe everything.",
    "Can you give a thorough description of the image?",
    "Explain what is shown here and where it is.",
)
KINDS: Mapping[str, float] = {"conversation": 3.0, "detail": 1.0, "reasoning": 1.0, "short": 4.0, "caption": 1.0}
"""The kinds, and how often each comes."""
MOST_SPOKEN = 4  # questions that a conversation answers in sentences

Scene = Mapping[str, Any]
Turns = list[tuple[str, str]]


class SceneConversations:
    """Conversations about the scenes of a stream, by row number.

    Args:
        rows: The scenes.
        seed: Decides kind and wording, together with the row's number.
        kinds: Weights of the kinds, by name; `KINDS` by default.

    Indexing gives a [`Conversation`]; its image is the scene.

    Raises:
        ValueError: if a kind is unknown.
    """

    def __init__(self, rows: SceneRows, seed: int = 0, kinds: Mapping[str, float] | None = None):
        kinds = KINDS if kinds is None else kinds
        if unknown := [name for name in kinds if name not in KINDS]:
            raise ValueError(f"{unknown[0]!r} is no kind of conversation; there are {', '.join(KINDS)}.")
        self.rows = rows
        self.seed = seed
        self.kinds = dict(kinds)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no scene {index}: they are numbered 0 to {len(self) - 1}.")
        scene = self.rows.stream.scene(index)
        rng = random.Random(f"{self.seed} conversation {index}")
        kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        turns = self.turns(kind, scene, rng) or self.turns("caption", scene, rng)
        messages: list[Message] = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        messages[0]["content"] = f"{IMAGE_MARK}\n{messages[0]['content']}"
        return {"messages": messages, "images": [scene["image"]]}

    def turns(self, kind: str, scene: Scene, rng: random.Random) -> Turns:
        """Questions and answers of one kind; none where the scene has nothing to reason about."""
        if kind == "caption":
            return [(CAPTION, self.rows.short(scene["captions"])[0])]
        if kind == "detail":
            return [(rng.choice(DETAIL_QUESTIONS), detail(scene))]
        if kind == "reasoning":
            asked = scene_reasoning(scene["objects"], rng)
            return [(question, sentence(answer)) for question, answer in rng.sample(asked, len(asked))]
        questions = rng.sample(scene["questions"], len(scene["questions"]))
        if kind == "short":
            first, *others = questions
            asked = [(SHORT_ANSWER.format(question=first["question"]), first["answer"])]
            return asked + [(one["question"], one["answer"]) for one in others]
        return [(one["question"], spoken(one)) for one in questions[:MOST_SPOKEN]]


def sentence(text: str) -> str:
    """A phrase with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def spoken(asked: Mapping[str, str]) -> str:
    """The answer to a question of a scene, as a sentence."""
    question, answer = asked["question"], asked["answer"]
    body = question.rstrip("?")
    if answer in ("yes", "no"):
        return f"{answer.capitalize()}, {_statement(body, answer == 'yes')}."
    if body.startswith("How many ") and body.endswith(" are there"):
        things = body.removeprefix("How many ").removesuffix(" are there")
        return f"There {'is only one' if answer == '1' else f'are {answer} {things}'}."
    if body.startswith("Where in the picture is "):
        at = {"left": "on", "right": "on", "centre": "in"}.get(answer, "at")
        return f"{sentence(body.removeprefix('Where in the picture is '))[:-1]} is {at} the {answer}."
    if body == "What colour is the background":
        return f"The background is {answer}."
    if body == "What is in the picture":
        return f"There is {phrase(answer)} in the picture."
    if body.startswith("What is "):
        return f"{sentence(phrase(answer))[:-1]} is {body.removeprefix('What is ')}."
    subject = body.removeprefix("Is ")  # is the cat above or below the dog
    for choice, sides in (
        ("to the left or to the right of", {"left": "to the left of", "right": "to the right of"}),
        ("above or below", {"above": "above", "below": "below"}),
    ):
        if choice in subject:
            first, second = subject.split(f" {choice} ")
            return sentence(f"{first} is {sides[answer]} {second}")
    raise ValueError(f"No sentence is known for the answer to {question!r}.")


def _statement(body: str, holds_true: bool) -> str:
    """`Is there a cat in the picture` as `there is (no) cat`; `Is the background red` as `the background is (not)`."""
    if body.startswith("Is there "):
        thing = body.removeprefix("Is there ").removesuffix(" in the picture")
        return f"there is {thing} in the picture" if holds_true else f"there is no {thing.split(' ', 1)[1]} in it"
    rest, negation = body.removeprefix("Is "), "" if holds_true else " not"
    if rest.startswith("the background "):
        return f"the background is{negation} {rest.removeprefix('the background ')}"
    side = next(words for words in OPPOSITES if f" {words} the " in rest)
    subject, other = rest.split(f" {side} ")
    return f"{subject} is{negation} {side} {other}"


def detail(scene: Scene) -> str:
    """All that is in a scene: how many of what, where each is, and how neighbours lie to each other."""
    objects: Sequence[dict[str, Any]] = scene["objects"]
    counts = Counter(thing["name"] for thing in objects)
    listed = _listing([phrase(name, count) for name, count in counts.items()])
    said = [f"The image shows {listed} on {phrase(scene['background'] + ' background')}."]
    seen: Counter[str] = Counter()
    for thing in objects:
        name, where = thing["name"], place(thing["box"], scene["image"].size)
        seen[name] += 1
        which = f"The {name}" if counts[name] == 1 else f"{'One' if seen[name] == 1 else 'Another'} {name}"
        at = {"left": "on", "right": "on", "centre": "in"}.get(where, "at")
        said.append(f"{which} is {at} the {where}.")
    singles = [thing for thing in objects if counts[thing["name"]] == 1]
    for first, second in itertools.pairwise(singles):
        words = next((words for words in OPPOSITES if holds(first, words, second)), None)
        if words is not None:
            said.append(f"The {first['name']} is {words} the {second['name']}.")
    return " ".join(said)


def _listing(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))


__all__ = ["CAPTION", "KINDS", "SceneConversations", "detail", "spoken"]
