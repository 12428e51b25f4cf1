"""`hf-vlm info` on checkpoints whose files hold anything: an answer or one line, within seconds, nothing built.

One entry at a time of the config, of the records and of the processor is replaced by values of other types and sizes.
"""

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from cases import tiny
from cases.table import CASES
from hf_vlm.hub.info import checkpoint_info, format_info

pytestmark = pytest.mark.slow
SECONDS, TRIALS = 10, 150
VALUES = [10**8, 10**30, 0, -1, None, "text", [], {}, 1.5, True, float("nan"), [10**8], "\x1b[31m"]
VALUES += [{"a": {"b": None}}, [None], [{"name": None}], [{"rows": [1]}]]
RECORD = {
    "recipe": "clip_pretrain",
    "arguments": {"model": {}},
    "versions": {"torch": "2"},
    "training": {"steps": 5, "minutes": 1.5, "device": "cpu"},
    "parameters": {},
    "data": [{"name": "a", "rows": {"train": 5}, "licence": "mit"}],
    "parts": [{"part": "text", "id": "x", "licence": "mit"}],
    "licence": "mit",
}
RESULTS = {"retrieval": {"test": {"text_to_image_r1": 0.5, "num_images": 5, "chance": {"text_to_image_r1": 0.1}}}}


def places(content: Any, place: tuple = ()) -> Iterator[tuple]:
    """The path to every entry of a JSON file, and to the file itself."""
    yield place
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in entries:
        yield from places(value, (*place, name))


def replaced(content: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    copy = json.loads(json.dumps(content))
    entry = copy
    for name in place[:-1]:
        entry = entry[name]
    entry[place[-1]] = value
    return copy


def answer(folder: Path) -> str:
    """What is wrong with the answer; empty if it is a printable text, or one printable line of an error."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        said = format_info(checkpoint_info(str(folder)))
        return "" if said.replace("\n", "").isprintable() else "not printable"
    except TimeoutError as error:
        return str(error)
    except StrictDataclassError:  # whose last line the command line shows
        return ""
    except (ValueError, OSError) as error:
        return "" if str(error).isprintable() and str(error) else f"not one line: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(
    "case", ["clip", "blip, pretraining", "blip2, second stage, llama", "blip2, instructions, t5", "llava, anyres"]
)
def test_configs(case: str, tmp_path: Path) -> None:
    CASES[case].build().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    trials = [(place, value) for place in places(config) for value in VALUES]
    wrong = []
    for place, value in random.Random(0).sample(trials, TRIALS):
        file.write_text(json.dumps(replaced(config, place, value)))
        if said := answer(tmp_path):
            wrong.append((place, value, said))
    assert not wrong


@pytest.mark.parametrize("name", ["training_record.json", "results.json", "processor_config.json"])
def test_records(name: str, tmp_path: Path) -> None:
    tiny.clip_model().save_pretrained(tmp_path)
    tiny.clip_processor().save_pretrained(tmp_path)
    (tmp_path / "training_record.json").write_text(json.dumps(RECORD))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    file = tmp_path / name
    content = json.loads(file.read_text())
    trials = [(place, value) for place in places(content) for value in VALUES]
    wrong = []
    for place, value in random.Random(0).sample(trials, min(TRIALS, len(trials))):
        file.write_text(json.dumps(replaced(content, place, value)))
        if said := answer(tmp_path):
            wrong.append((place, value, said))
    assert not wrong
