"""Texts about a scene: captions, questions with answers, hard-negative captions.

- A scene is a list of objects, each with a `name` and a `box` (x0, y0, x1, y1), on a background of a named colour.
- Every text is true and every answer unambiguous. A spatial word is used only if the boxes do not overlap in that
  direction, "the ..." only if the name occurs once, and a count only if the plural is known.
- Hard negatives replace one word or phrase of a true caption. The text alone does not tell which caption is true:
  sides, numbers and colours are equally frequent in true and false captions.
"""

import random
import re
from collections import Counter
from functools import cache

OPPOSITES = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
AXES = {"left_right": ("to the left of", "to the right of"), "above_below": ("above", "below")}
NUMBERS = {2: "two", 3: "three", 4: "four"}
MOST_OBJECTS = max(NUMBERS)

# RESERVED: words that captions use for position, number or negation. UNFIT_HEADS: heads that are not singular nouns.
# GENERIC: names so general that they may also describe an object with another name.
RESERVED = frozenset(
    "left right up down top bottom leftwards rightwards upwards downwards facing pointing pointed tilted vertical"
    " together no not one two three four upside under".split()
)
UNFIT_HEADS = frozenset(
    "locked unlocked registered prohibited dizzy foggy radioactive wireless star-struck multiply divide away free open"
    " information skis zzz done off".split()
)
GENERIC = frozenset("person man woman child boy girl bird fish bug ship face eye".split())
PERSON_WORDS = frozenset("person man woman boy girl".split())
PREPOSITIONS = re.compile(r" (?:with|without|in|of|on|at|behind|over|for|from|to) ")
IRREGULAR = dict(
    pair.split(":")
    for pair in "child:children mouse:mice foot:feet tooth:teeth goose:geese ox:oxen die:dice leaf:leaves sheaf:sheaves"
    " wolf:wolves knife:knives elf:elves scarf:scarves potato:potatoes tomato:tomatoes superhero:superheroes deer:deer"
    " moose:moose bison:bison squid:squid shrimp:shrimp fish:fish buffalo:buffalo".split()
)


def is_nameable(name: str) -> bool:
    """Whether scenes can use the name: a singular noun in plain letters, without words of place, number or negation."""
    words = name.split()
    head = PREPOSITIONS.split(name)[0]
    plural_form = re.search(r"[^sui]s$", head) or words[0] in ("men", "women", "people")
    plain = re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*", name)
    left_out = name in GENERIC or head.split()[-1] in UNFIT_HEADS or not RESERVED.isdisjoint(re.split("[ -]", name))
    return bool(plain) and not plural_form and not left_out


def conflict(name: str, other: str) -> bool:
    """Whether two names may describe one object: `cat` and `black cat`, `man running` and `woman running`."""
    first, second = _plain(name), _plain(other)
    return first in second or second in first


@cache
def _plain(name: str) -> str:
    return f" {' '.join('person' if word in PERSON_WORDS else word for word in name.split())} "


@cache
def plural(name: str) -> str | None:
    """The plural (`ears of corn`); None if the noun is not the last word before a preposition."""
    head = PREPOSITIONS.split(name, maxsplit=1)[0]
    *others, noun = head.split()
    described = any(word in PERSON_WORDS or word == "and" for word in others)  # man running, bow and arrow
    action = any(word.endswith("ing") for word in [*others[1:], noun] if len(word) > 5)
    if described or action:
        return None
    return " ".join([*others, _plural_noun(noun)]) + name[len(head) :]


def _plural_noun(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    for singular, many in (("person", "people"), ("man", "men")):
        if noun.endswith(singular):
            return noun.removesuffix(singular) + many
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|z|ch|sh)$", noun) else "s")


def phrase(name: str, count: int = 1) -> str:
    """`an apple`, `two apples`; the count must be 1 if `plural` returns None."""
    return f"{article(name)} {name}" if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def article(word: str) -> str:
    """The indefinite article, by pronunciation."""
    if re.match(r"uni|one|euro|ewe|util", word):
        return "a"
    return "an" if re.match(r"[aeiou]|hour|sos|ng |x-ray|mx ", word) else "a"


def holds(subject: dict, words: str, other: dict) -> bool:
    """Whether the subject's box is completely on the given side of the other's box."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = subject["box"], other["box"]
    return {"to the left of": x1 <= u0, "to the right of": u1 <= x0, "above": y1 <= v0, "below": v1 <= y0}[words]


def reaches(subject: dict, words: str, other: dict) -> bool:
    """Whether any part of the subject lies further to the given side than the whole of the other."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = subject["box"], other["box"]
    return {"to the left of": x0 < u0, "to the right of": x1 > u1, "above": y0 < v0, "below": y1 > v1}[words]


def place(box: list[int], size: tuple[int, int]) -> str:
    """The third of the image (width, height) that contains the centre of a box: `top left`, `centre`, ..."""
    column = min(3 * (box[0] + box[2]) // (2 * size[0]), 2)
    row = min(3 * (box[1] + box[3]) // (2 * size[1]), 2)
    return " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column]))) or "centre"


class SceneText:
    """The texts of one scene.

    Args:
        objects: dicts with `name` and `box`.
        background: name of the background colour.
        size: width and height of the image in pixels.
        names: names to choose absent objects from.
        colours: names of all background colours.
        rng: random numbers for all choices; equal states give equal texts.
    """

    def __init__(
        self,
        objects: list[dict],
        background: str,
        size: tuple[int, int],
        names: list[str],
        colours: list[str],
        rng: random.Random,
    ) -> None:
        self.objects, self.background, self.size = objects, background, size
        self.names, self.colours, self.rng = names, colours, rng
        self.counts = Counter(thing["name"] for thing in objects)
        self.singles = [thing for thing in objects if self.counts[thing["name"]] == 1]
        self.relations = {}  # axis -> one true (subject, words, other)
        for axis, sides in AXES.items():
            true = [(a, words, b) for a in self.singles for b in self.singles for words in sides if holds(a, words, b)]
            if true:
                self.relations[axis] = rng.choice(true)

    def captions(self) -> list[str]:
        """True captions: all objects, with and without the background; one relation per axis; all positions."""
        things = _listing([phrase(name, count) for name, count in self.counts.items()])
        placed = [f"{phrase(thing['name'])} {_at(place(thing['box'], self.size))}" for thing in self.objects]
        related = [self._relation_caption(*relation) for relation in self.relations.values()]
        return [
            f"{things} {self._on()}",
            f"a picture of {things}",
            *related,
            f"{phrase(self.background + ' background')} with {_listing(placed)}",
        ]

    def questions(self) -> list[dict]:
        """Questions with one correct answer: `question`, `answer`, `kind` (what, where, count, colour, yesno)."""
        asked = [
            *self._what(),
            *self._where(),
            *self._count(),
            ("What colour is the background?", self.background, "colour"),
            *self._yes_or_no(),
        ]
        return [dict(zip(("question", "answer", "kind"), row, strict=True)) for row in asked]

    def hard_negatives(self) -> list[dict]:
        """True and false captions: `caption`, `negative`, `kind` (left_right, above_below, number, colour, object)."""
        pairs = []
        for axis, (subject, words, other) in self.relations.items():
            caption = self._relation_caption(subject, words, other)
            pairs.append((caption, self._relation_caption(subject, OPPOSITES[words], other), axis))
        phrases = {name: phrase(name, count) for name, count in self.counts.items()}
        caption = f"{_listing(list(phrases.values()))} {self._on()}"

        def twin(name: str, false_phrase: str) -> str:
            return f"{_listing(list((phrases | {name: false_phrase}).values()))} {self._on()}"

        repeated = [name for name, count in self.counts.items() if count > 1]
        if repeated:
            name = self.rng.choice(repeated)
            count = self.rng.choice([number for number in NUMBERS if number != self.counts[name]])
            pairs.append((caption, twin(name, phrase(name, count)), "number"))
        colour = self.rng.choice([colour for colour in self.colours if colour != self.background])
        pairs.append((caption, f"{_listing(list(phrases.values()))} {self._on(colour)}", "colour"))
        name = self.rng.choice(list(self.counts))
        pairs.append((caption, twin(name, phrase(self._absent(self.counts[name]), self.counts[name])), "object"))
        return [dict(zip(("caption", "negative", "kind"), pair, strict=True)) for pair in pairs]

    def _what(self) -> list[tuple[str, str, str]]:
        if len(self.objects) == 1:
            return [("What is in the picture?", self.objects[0]["name"], "what")]
        asked = []
        for anchor in self.singles:
            for words in OPPOSITES:
                there = [thing for thing in self.objects if holds(thing, words, anchor)]
                # An object that is only partly on that side of the anchor would be a second plausible answer.
                doubtful = [thing for thing in self.objects if thing not in there and reaches(thing, words, anchor)]
                if len(there) == 1 and not doubtful:
                    asked.append((f"What is {words} the {anchor['name']}?", there[0]["name"], "what"))
        return [self.rng.choice(asked)] if asked else []

    def _where(self) -> list[tuple[str, str, str]]:
        asked = []
        margin = min(self.size) // 16
        placed = []
        for thing in self.singles:
            x0, y0, x1, y1 = thing["box"]
            shifts = [(dx, dy) for dx in (-margin, margin) for dy in (-margin, margin)]
            if len({place([x0 + dx, y0 + dy, x1 + dx, y1 + dy], self.size) for dx, dy in shifts}) == 1:
                placed.append(thing)  # its centre is not near the border between two thirds
        if placed:
            thing = self.rng.choice(placed)
            asked.append((f"Where in the picture is the {thing['name']}?", place(thing["box"], self.size), "where"))
        for axis, (subject, words, other) in self.relations.items():
            choice = "to the left or to the right of" if axis == "left_right" else "above or below"
            answer = words.removeprefix("to the ").removesuffix(" of")
            asked.append((f"Is the {subject['name']} {choice} the {other['name']}?", answer, "where"))
        return asked

    def _count(self) -> list[tuple[str, str, str]]:
        asked = [("How many things are there?", str(len(self.objects)), "count")]
        countable = [name for name in self.counts if plural(name)]
        if countable:
            name = self.rng.choice(countable)
            asked.append((f"How many {plural(name)} are there?", str(self.counts[name]), "count"))
        return asked

    def _yes_or_no(self) -> list[tuple[str, str, str]]:
        """One question of each kind; a coin flip decides whether the answer is yes."""
        yes, answers = [self.rng.random() < 0.5 for _ in range(3)], ("no", "yes")
        name = self.rng.choice(list(self.counts)) if yes[0] else self._absent(1)
        colour = self.background
        if not yes[1]:
            colour = self.rng.choice([colour for colour in self.colours if colour != self.background])
        asked = [
            (f"Is there {phrase(name)} in the picture?", answers[yes[0]], "yesno"),
            (f"Is the background {colour}?", answers[yes[1]], "yesno"),
        ]
        if self.relations:
            subject, words, other = self.rng.choice(list(self.relations.values()))
            words = words if yes[2] else OPPOSITES[words]
            asked.append((f"Is the {subject['name']} {words} the {other['name']}?", answers[yes[2]], "yesno"))
        return asked

    def _absent(self, count: int) -> str:
        """A name that describes no object of the scene; it has a plural if `count` is above 1."""
        while True:
            name = self.rng.choice(self.names)
            if (count == 1 or plural(name)) and not any(conflict(name, there) for there in self.counts):
                return name

    def _relation_caption(self, subject: dict, words: str, other: dict) -> str:
        return f"{phrase(subject['name'])} {words} {phrase(other['name'])} {self._on()}"

    def _on(self, colour: str | None = None) -> str:
        return f"on {phrase((colour or self.background) + ' background')}"


def _listing(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _at(position: str) -> str:
    preposition = {"left": "on", "right": "on", "centre": "in"}.get(position, "at")
    return f"{preposition} the {position}"


__all__ = [
    "MOST_OBJECTS", "OPPOSITES", "SceneText", "article", "conflict", "holds", "is_nameable", "phrase", "place", "plural"
]  # fmt: skip
