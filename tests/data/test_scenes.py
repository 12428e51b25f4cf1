"""Emoji scenes: boxes against pixels, texts against an independent reading of them, splits, shards, repeatability."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from hf_vlm.data.builtin.emoji import EMOJI_SPLITS, TRAIN_STYLES, is_held_out
from hf_vlm.data.builtin.scene_text import article, conflict, is_nameable, plural
from hf_vlm.data.builtin.scenes import BACKGROUNDS, SceneStream, load_scenes

COUNT_WORDS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
SIDES = r"to the left of|to the right of|above|below"
PLACES = r"(?:top |bottom )?(?:left|right)|top|bottom|centre"
ON = r"on an? (?P<colour>\w+) background"


@pytest.fixture(scope="module")
def stream() -> SceneStream:
    return SceneStream()


@pytest.fixture(scope="module")
def scenes(stream: SceneStream) -> list[dict]:
    return [stream.scene(index) for index in range(400)]


@pytest.fixture(scope="module")
def reader(stream: SceneStream) -> "Reader":
    return Reader(stream.names)


def digest(scenes: list[dict]) -> str:
    return hashlib.sha256(
        b"".join(repr(scene | {"image": None}).encode() + scene["image"].tobytes() for scene in scenes)
    ).hexdigest()


# An independent reader of what is said: words to claims, claims against objects.


class Reader:
    """Understands phrases such as `two apples` by looking them up, whole, among those of all names."""

    def __init__(self, names: list[str]) -> None:
        self.claims = {f"{a} {name}": (name, 1) for name in names for a in ("a", "an")}
        self.claims |= {
            f"{n} {plural(name)}": (name, COUNT_WORDS[n]) for name in names for n in ("two", "three", "four")
        }
        self.names = set(names)
        self.singular = {plural(name): name for name in names if plural(name)}

    def listing(self, text: str) -> list[tuple[str, int]]:
        """`a cat, two dogs and a bow and arrow` -> [(cat, 1), (dog, 2), (bow and arrow, 1)]."""
        if text in self.claims:
            return [self.claims[text]]
        for cut in re.finditer(r", | and ", text):
            if text[: cut.start()] in self.claims:
                rest = self.listing(text[cut.end() :])
                if rest:
                    return [self.claims[text[: cut.start()]], *rest]
        return []


def centre(thing: dict) -> tuple[float, float]:
    x0, y0, x1, y1 = thing["box"]
    return (x0 + x1) / 2, (y0 + y1) / 2


def surely(words: str, a: dict, b: dict) -> bool:
    """Every pixel of a on that side of every pixel of b."""
    columns = [set(range(thing["box"][0], thing["box"][2])) for thing in (a, b)]
    rows = [set(range(thing["box"][1], thing["box"][3])) for thing in (a, b)]
    first, second = columns if "the" in words else rows
    if words in ("to the right of", "below"):
        first, second = second, first
    return max(first) < min(second)


def perhaps(words: str, a: dict, b: dict) -> bool:
    """The middle of a on that side of the middle of b: what a generous reader would accept."""
    (ax, ay), (bx, by) = centre(a), centre(b)
    return {"to the left of": ax < bx, "to the right of": ax > bx, "above": ay < by, "below": ay > by}[words]


def third(value: float, side: int, words: tuple[str, str, str]) -> str:
    return words[int(3 * value // side)]


def position(thing: dict, size: tuple[int, int]) -> str:
    x, y = centre(thing)
    found = f"{third(y, size[1], ('top', '', 'bottom'))} {third(x, size[0], ('left', '', 'right'))}".strip()
    return found or "centre"


def verdict(caption: str, scene: dict, reader: Reader, relation) -> bool:
    """Whether a caption is true of a scene; `relation` decides how strictly places are read."""
    objects = scene["objects"]
    counts = Counter(thing["name"] for thing in objects)
    if match := re.fullmatch(rf"(?P<a>.+) (?P<words>{SIDES}) (?P<b>.+) {ON}", caption):
        (a, one), (b, other) = reader.claims[match["a"]], reader.claims[match["b"]]
        assert one == other == 1
        pairs = [(s, o) for s in objects for o in objects if (s["name"], o["name"]) == (a, b)]
        return scene["background"] == match["colour"] and any(relation(match["words"], *pair) for pair in pairs)
    if match := re.fullmatch(r"an? (?P<colour>\w+) background with (?P<list>.+)", caption):
        said = re.findall(rf"(?:^|, | and )(an? .+?) (?:at|on|in) the ({PLACES})(?=,| and |$)", match["list"])
        found = Counter((reader.claims[phrase][0], where) for phrase, where in said)
        there = Counter((thing["name"], position(thing, scene["image"].size)) for thing in objects)
        return scene["background"] == match["colour"] and found == there
    if match := re.fullmatch(rf"(?P<list>.+) {ON}", caption):
        said = reader.listing(match["list"])
        assert said, caption
        return scene["background"] == match["colour"] and dict(said) == dict(counts)
    said = reader.listing(caption.removeprefix("a picture of "))
    assert said, caption
    return dict(said) == dict(counts)


# Images


def test_boxes_are_the_pixels_that_differ_from_the_background(scenes: list[dict]) -> None:
    for scene in scenes:
        pixels = np.asarray(scene["image"])
        drawn = (pixels != BACKGROUNDS[scene["background"]]).any(axis=2)
        inside = np.zeros_like(drawn)
        for thing in scene["objects"]:
            x0, y0, x1, y1 = thing["box"]
            assert not inside[y0:y1, x0:x1].any(), "two boxes overlap"
            inside[y0:y1, x0:x1] = True
            part = drawn[y0:y1, x0:x1]
            assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))
            assert part.mean() > 0.05
        assert not (drawn & ~inside).any()


def test_scenes_have_the_promised_shape(scenes: list[dict]) -> None:
    for scene in scenes:
        assert scene["image"].mode == "RGB"
        assert scene["image"].size == (64, 64)
        assert 1 <= len(scene["objects"]) <= 4
        assert all(thing["style"] in TRAIN_STYLES for thing in scene["objects"])
        words = {tuple(thing["name"].split()) for thing in scene["objects"]}
        assert not any(set(a) < set(b) for a in words for b in words), "one name could be meant by the other"
    assert {len(scene["objects"]) for scene in scenes} == {1, 2, 3, 4}
    assert {scene["background"] for scene in scenes} == set(BACKGROUNDS)


@pytest.mark.parametrize(("size", "objects"), [(48, (1, 1)), (96, (2, 3)), (192, (4, 4))])
def test_sizes_and_numbers_of_objects(size: int, objects: tuple[int, int]) -> None:
    stream = SceneStream("validation", size=size, objects=objects, seed=3)
    for index in range(10):
        scene = stream.scene(index)
        assert scene["image"].size == (size, size)
        assert objects[0] <= len(scene["objects"]) <= objects[1]


def test_scenes_of_several_shapes(reader: "Reader") -> None:
    stream = SceneStream(size=96, aspects=(2.0, 0.5, 1.0))
    made = [stream.scene(index) for index in range(60)]
    assert {scene["image"].size for scene in made} == {(192, 96), (96, 192), (96, 96)}
    for scene in made:
        pixels = np.asarray(scene["image"])
        inside = np.zeros(pixels.shape[:2], dtype=bool)
        for x0, y0, x1, y1 in (thing["box"] for thing in scene["objects"]):
            inside[y0:y1, x0:x1] = True
            assert max(x1 - x0, y1 - y0) <= 0.7 * 96 + 1  # as large as in a square
        assert (pixels[~inside] == BACKGROUNDS[scene["background"]]).all()
        assert all(verdict(caption, scene, reader, surely) for caption in scene["captions"])
        for asked in scene["questions"]:
            if asked["question"].startswith("Where in the picture is the "):
                name = asked["question"].removeprefix("Where in the picture is the ").rstrip("?")
                [thing] = [thing for thing in scene["objects"] if thing["name"] == name]
                assert asked["answer"] == position(thing, scene["image"].size)
    assert any(box[2] > 96 for scene in made for box in (thing["box"] for thing in scene["objects"]))


def test_backgrounds_are_far_apart() -> None:
    colours = np.array(list(BACKGROUNDS.values()))
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1000 * np.eye(len(colours))
    assert distance.min() > 80


# Texts


def test_captions_are_true(scenes: list[dict], reader: Reader) -> None:
    for scene in scenes:
        assert len(scene["captions"]) >= 3
        for caption in scene["captions"]:
            assert verdict(caption, scene, reader, surely), (caption, scene["objects"])


def test_hard_negatives_are_false_and_their_captions_true(scenes: list[dict], reader: Reader) -> None:
    for scene in scenes:
        for pair in scene["hard_negatives"]:
            assert verdict(pair["caption"], scene, reader, surely), pair
            assert not verdict(pair["negative"], scene, reader, perhaps), pair


def changed_words(caption: str, negative: str) -> tuple[str, str]:
    """The shortest stretch of words that differs."""
    a, b = caption.split(), negative.split()
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return " ".join(a), " ".join(b)


def test_hard_negatives_differ_in_one_phrase(scenes: list[dict], reader: Reader) -> None:
    kinds = Counter()
    for scene in scenes:
        for pair in scene["hard_negatives"]:
            old, new = changed_words(pair["caption"], pair["negative"])
            kinds[pair["kind"]] += 1
            if pair["kind"] == "left_right":
                assert {old, new} == {"left", "right"}
            elif pair["kind"] == "above_below":
                assert {old, new} == {"above", "below"}
            elif pair["kind"] == "number":
                assert old != new
                assert {old, new} <= {"two", "three", "four"}
            elif pair["kind"] == "colour":
                assert {re.sub("^an? ", "", words) for words in (old, new)} <= set(BACKGROUNDS)
            else:
                a, b = (reader.listing(pair[key].rsplit(" on a", 1)[0]) for key in ("caption", "negative"))
                exchanged = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
                assert len(exchanged) == 1
                (_, count), (name, other_count) = exchanged[0]
                assert count == other_count
                assert name in reader.names
                assert not any(conflict(name, thing["name"]) for thing in scene["objects"])
    assert set(kinds) == {"left_right", "above_below", "number", "colour", "object"}
    assert min(kinds.values()) > 50


def answer(question: str, scene: dict, reader: Reader) -> set[str]:
    """All answers that the scene allows, places read generously, so that one element means no doubt."""
    objects = scene["objects"]
    counts = Counter(thing["name"] for thing in objects)

    def only(name: str) -> dict:
        (thing,) = [thing for thing in objects if thing["name"] == name]
        return thing

    def yes(truth: bool) -> set[str]:
        return {"yes" if truth else "no"}

    if question == "What is in the picture?":
        return set(counts)
    if question == "What colour is the background?":
        return {scene["background"]}
    if question == "How many things are there?":
        return {str(len(objects))}
    if match := re.fullmatch(rf"What is ({SIDES}) the (.+)\?", question):
        anchor = only(match[2])
        return {thing["name"] for thing in objects if surely(match[1], thing, anchor)}
    if match := re.fullmatch(r"Where in the picture is the (.+)\?", question):
        return {position(only(match[1]), scene["image"].size)}
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        return {str(counts[reader.singular[match[1]]])}
    if match := re.fullmatch(r"Is there an? (.+) in the picture\?", question):
        assert match[1] in reader.names
        return yes(match[1] in counts)
    if match := re.fullmatch(r"Is the background (\w+)\?", question):
        return yes(match[1] == scene["background"])
    if match := re.fullmatch(r"Is the (.+) to the left or to the right of the (.+)\?", question):
        pair = only(match[1]), only(match[2])
        return {side for side in ("left", "right") if perhaps(f"to the {side} of", *pair)}
    if match := re.fullmatch(r"Is the (.+) above or below the (.+)\?", question):
        pair = only(match[1]), only(match[2])
        return {side for side in ("above", "below") if perhaps(side, *pair)}
    match = re.fullmatch(rf"Is the (.+) ({SIDES}) the (.+)\?", question)
    pair = only(match[1]), only(match[3])
    assert surely(match[2], *pair) == perhaps(match[2], *pair)
    return yes(surely(match[2], *pair))


def test_questions_have_one_answer_and_it_is_given(scenes: list[dict], reader: Reader) -> None:
    kinds = Counter()
    for scene in scenes:
        for row in scene["questions"]:
            kinds[row["kind"]] += 1
            assert answer(row["question"], scene, reader) == {row["answer"]}, (row, scene["objects"])
    assert set(kinds) == {"what", "where", "count", "colour", "yesno"}


def test_text_alone_tells_nothing(stream: SceneStream) -> None:
    """Yes and no, sides, numbers and colours are as frequent in what is true as in what is false."""
    true, false, said = Counter(), Counter(), Counter()
    for index in range(3000):
        scene = stream.scene(index)
        said.update(row["answer"] for row in scene["questions"] if row["kind"] == "yesno")
        for pair in scene["hard_negatives"]:
            if pair["kind"] != "object":
                old, new = changed_words(pair["caption"], pair["negative"])
                true[re.sub("^an? ", "", old)] += 1
                false[re.sub("^an? ", "", new)] += 1
    assert abs(said["yes"] / said.total() - 0.5) < 0.02
    for word in ("left", "right", "above", "below", "two", "three", "four", *BACKGROUNDS):
        assert abs(true[word] / (true[word] + false[word]) - 0.5) < 0.1, word


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("apple", "apples"),
        ("ear of corn", "ears of corn"),
        ("face with tears of joy", "faces with tears of joy"),
        ("strawberry", "strawberries"),
        ("monkey", "monkeys"),
        ("fox", "foxes"),
        ("snowman", "snowmen"),
        ("person in bed", "people in bed"),
        ("computer mouse", "computer mice"),
        ("sheaf of rice", "sheaves of rice"),
        ("man running", None),
        ("bow and arrow", None),
        ("face blowing a kiss", None),
    ],
)
def test_plurals(name: str, many: str | None) -> None:
    assert plural(name) == many


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("apple", "an"),
        ("unicorn", "a"),
        ("umbrella", "an"),
        ("hourglass", "an"),
        ("yo-yo", "a"),
        ("euro banknote", "a"),
    ],
)
def test_articles(word: str, expected: str) -> None:
    assert article(word) == expected


def test_names_that_scenes_avoid() -> None:
    for name in ("left arrow", "two hearts", "no smoking", "grapes", "keycap 1", "men wrestling", "person"):
        assert not is_nameable(name), name
    for name in ("syringe", "bus", "jack-o-lantern", "ear of corn"):
        assert is_nameable(name), name


@pytest.mark.parametrize(
    ("name", "other", "expected"),
    [("cat", "black cat", True), ("man running", "woman running", True), ("cat", "dog", False), ("ox", "fox", False)],
)
def test_names_that_exclude_each_other(name: str, other: str, expected: bool) -> None:
    assert conflict(name, other) is conflict(other, name) is expected


# Splits, repeatability, shards


@pytest.mark.parametrize("split", EMOJI_SPLITS)
def test_what_is_held_out_stays_out(split: str) -> None:
    stream = SceneStream(split)
    held_out = split in ("unseen_emoji", "unseen_both")
    assert {is_held_out(drawing.emoji) for drawing in stream.drawings} == {held_out}
    styles = {"unseen_style": {"noto"}, "unseen_both": {"noto"}, "validation": {"twemoji"}}.get(
        split, set(TRAIN_STYLES)
    )
    assert {drawing.style for drawing in stream.drawings} == styles
    reader = Reader(stream.names)
    for index in range(60):  # every name that is said, of present and of absent things, is one of the split's
        scene = stream.scene(index)
        assert {thing["name"] for thing in scene["objects"]} <= reader.names
        assert all(verdict(caption, scene, reader, surely) for caption in scene["captions"])
        assert not any(verdict(pair["negative"], scene, reader, perhaps) for pair in scene["hard_negatives"])
        assert all(answer(row["question"], scene, reader) == {row["answer"]} for row in scene["questions"])


def test_names_of_train_and_of_the_held_out_emoji_are_disjoint(stream: SceneStream) -> None:
    assert not set(stream.names) & set(SceneStream("unseen_emoji").names)


def test_seeds_and_splits_give_other_scenes(stream: SceneStream) -> None:
    first = digest([stream.scene(0)])
    assert first == digest([stream.scene(0)])
    assert len({first, digest([stream.scene(1)]), digest([SceneStream(seed=1).scene(0)])}) == 3


def test_the_same_in_another_process(scenes: list[dict]) -> None:
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/data']\n"
        "from test_scenes import SceneStream, digest\n"
        "stream = SceneStream()\n"
        "print(digest([stream.scene(index) for index in reversed(range(50))][::-1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "77"},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == digest(scenes[:50]), done.stderr


def test_a_stream_travels_without_its_drawings(stream: SceneStream) -> None:
    stream.scene(0)
    sent = pickle.dumps(stream)
    assert len(sent) < 1000
    assert digest([pickle.loads(sent).scene(5)]) == digest([stream.scene(5)])


def test_ranks_and_workers_share_the_scenes(stream: SceneStream) -> None:
    rows = stream.to_iterable_dataset(num_shards=8, num_scenes=41)
    seen = [
        [row["index"] for row in DataLoader(split_dataset_by_node(rows, rank, 2), batch_size=None, num_workers=2)]
        for rank in range(2)
    ]
    assert sorted(seen[0] + seen[1]) == list(range(41))
    assert all(seen)


def test_the_endless_stream_resumes_without_drawing_again(stream: SceneStream, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream.to_iterable_dataset(num_shards=4)
    iterator = iter(rows)
    assert [next(iterator)["index"] for _ in range(6)] == [0, 4, 8, 12, 16, 20]
    state, expected = rows.state_dict(), next(iterator)
    made = []
    original = SceneStream.scene
    monkeypatch.setattr(SceneStream, "scene", lambda self, index: (made.append(index), original(self, index))[1])
    resumed = SceneStream().to_iterable_dataset(num_shards=4)
    resumed.load_state_dict(state)
    assert digest([next(iter(resumed))]) == digest([expected])
    assert made == [24]


def test_a_fixed_test_set(tmp_path: Path) -> None:
    rows = load_scenes("unseen_both", 12)
    again = SceneStream("unseen_both", seed=1)
    assert len(rows) == 12
    for index, row in enumerate(rows):
        scene = again.scene(index)
        assert row["image"].tobytes() == scene["image"].tobytes()
        assert row | {"image": None} == scene | {"image": None}
    rows.save_to_disk(tmp_path / "scenes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "must be one of train, validation"),
        ({"size": 32}, "48 to 1024 pixels, got 32"),
        ({"objects": (2, 5)}, r"within 1 to 4, got \(2, 5\)"),
        ({"objects": (3, 2)}, r"got \(3, 2\)"),
        ({"aspects": (1, 5)}, r"1/4 to 4, at least one, got \(1, 5\)"),
        ({"aspects": ()}, "at least one"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneStream(**arguments)
