"""The cache of a frozen tower's features: right values, computed once, resumed, and refused when stale or damaged."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from cases import tiny
from hf_vlm.cli.main import app
from hf_vlm.data import (
    CachedFeatures,
    ContrastiveCollator,
    FeatureCacheError,
    PairDataset,
    PairStream,
    SceneRows,
    SceneStream,
    cache_features,
    feature_key,
)
from hf_vlm.training import cached_tower_features

ROWS = [{"image": tiny.image(seed=i), "caption": f"picture {i}"} for i in range(11)]
DATA = {"path": "tiny", "rows": len(ROWS)}


class Encoder:
    """The token states of a tower; counts the images, and can stop before a given one."""

    def __init__(self, tower, stop: int | None = None):
        self.tower, self.stop, self.seen = tower, stop, 0

    def __call__(self, pixel_values):
        if self.stop is not None and self.seen >= self.stop:
            raise KeyboardInterrupt
        self.seen += len(pixel_values)
        return self.tower(pixel_values=pixel_values).last_hidden_state


@pytest.fixture
def tower():
    return tiny.clip_model().vision_model


def build(folder, tower, stop=None, rows=ROWS, processor=None, data=DATA, **options):
    """A cache in shards of four rows, and how many images were encoded for it."""
    processor, encoder = processor or tiny.clip_processor(), Encoder(tower, stop)
    key = feature_key(tower, processor, data)
    options = {"batch_size": 3, "rows_per_shard": 4, "progress": False, **options}
    return cache_features(folder, rows, processor, encoder, key, **options), encoder.seen


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def flip(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_values_and_only_once(tmp_path, tower, workers):
    features, seen = build(tmp_path / "a", tower, num_workers=workers)
    assert seen == len(features) == 11
    pixels = tiny.clip_processor()(images=[row["image"] for row in ROWS])["pixel_values"]
    with torch.no_grad():
        expected = tower(pixel_values=pixels).last_hidden_state
    assert features[range(11)].dtype == torch.bfloat16
    torch.testing.assert_close(features[range(11)].float(), expected, rtol=2**-8, atol=1e-6)
    order = torch.tensor([10, 0, 7, 7, 3])
    assert torch.equal(features[order], features[list(range(11))][order])
    assert features[[]].shape == (0, features.tokens, features.width)
    again, seen = build(tmp_path / "a", tower, rows_per_shard=5)
    assert seen == 0
    assert torch.equal(again[range(11)], features[range(11)])


def test_rounding_is_that_of_torch(tmp_path, tower):
    values = torch.randn(11, 3, 5)
    features = cache_features(tmp_path, ROWS, tiny.clip_processor(), lambda pixels: values, {}, 11, progress=False)
    assert torch.equal(features[range(11)], values.bfloat16())


def test_random_numbers_are_left_alone(tmp_path, tower):
    before = torch.get_rng_state()
    build(tmp_path, tower)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [[11], [-1], torch.tensor([0, 400])])
def test_a_row_that_is_not_there(tmp_path, tower, wrong):
    features, _ = build(tmp_path, tower)
    with pytest.raises(IndexError, match=r"numbered 0 to 10"):
        features[wrong]
    for bad in (3, [0.5], [True]):
        with pytest.raises(TypeError, match="list of row numbers"):
            features[bad]


def test_stopped_and_resumed(tmp_path, tower):
    build(tmp_path / "whole", tower)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "part", tower, stop=5)
    with pytest.raises(FeatureCacheError, match="not complete"):
        CachedFeatures.open(tmp_path / "part")
    _, seen = build(tmp_path / "part", tower, rows_per_shard=9)
    assert seen == 7
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys, torch
from cases import tiny
from hf_vlm.data.features import shards
from test_feature_cache import build
save, tiny_model = shards.save_file, tiny.clip_model()
def killed(tensors, path, metadata):
    save(tensors, path, metadata)
    if "00001" in str(path):
        os.truncate(path, 600)
        os.kill(os.getpid(), signal.SIGKILL)
shards.save_file = killed
tower = tiny_model.vision_model
tower.load_state_dict(torch.load(sys.argv[2]))
build(sys.argv[1], tower)
"""


def test_killed_while_writing(tmp_path, tower):
    torch.save(tower.state_dict(), tmp_path / "weights")
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [tests, tests.parent, tests / "data"]))}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "part"), str(tmp_path / "weights")]
    assert subprocess.run(command, env=env, check=False).returncode == -9
    assert (tmp_path / "part" / "features-00001.safetensors.unfinished").exists()
    assert build(tmp_path / "part", tower)[1] == 7
    build(tmp_path / "whole", tower)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.parametrize("complete", [True, False])
def test_stale(tmp_path, tower, complete):
    build(tmp_path, tower)
    if not complete:
        (tmp_path / "cache.json").unlink()
        (tmp_path / "features-00001.safetensors").unlink()
    before = contents(tmp_path)
    bias = tower.post_norm.bias.detach().clone()
    with torch.no_grad():
        tower.post_norm.bias[0] += 1
    with pytest.raises(FeatureCacheError, match=r"its weights is .* choose another folder or delete"):
        build(tmp_path, tower)
    with torch.no_grad():
        tower.post_norm.bias.copy_(bias)
    with pytest.raises(FeatureCacheError, match=r"preprocessing\.size\.height is 32, not 48"):
        build(tmp_path, tower, processor=tiny.clip_processor(48))
    with pytest.raises(FeatureCacheError, match=r"data\.path is 'tiny', not 'other'"):
        build(tmp_path, tower, data={**DATA, "path": "other"})
    with pytest.raises(FeatureCacheError, match="number of rows is 11, not 10"):
        build(tmp_path, tower, rows=ROWS[:10])
    assert contents(tmp_path) == before


def test_key(tmp_path, tower):
    """A tower in memory and the same one loaded have one key, whatever it is called; its activation counts."""
    processor = tiny.clip_processor()
    tower.save_pretrained(tmp_path)
    loaded = type(tower).from_pretrained(tmp_path)
    key = feature_key(tower, processor, DATA)
    assert feature_key(loaded, processor.image_processor, DATA) == key
    features, _ = build(tmp_path / "cache", tower)
    CachedFeatures.open(tmp_path / "cache", feature_key(loaded, processor, DATA, "a name", "a commit"))
    loaded.config.hidden_act = "gelu"
    with pytest.raises(FeatureCacheError, match=r"architecture\.hidden_act"):
        CachedFeatures.open(tmp_path / "cache", feature_key(loaded, processor, DATA))
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["key"] == key == features.key


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "header", "swapped"])
def test_damage_is_refused_and_repaired(tmp_path, tower, damage):
    build(tmp_path, tower)
    whole, path = contents(tmp_path), tmp_path / "features-00001.safetensors"
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 2)
    elif damage == "flipped":
        flip(path)
        CachedFeatures.open(tmp_path)
    elif damage == "missing":
        path.unlink()
    elif damage == "header":
        flip(path, 20)
    else:
        path.write_bytes((tmp_path / "features-00000.safetensors").read_bytes())
    with pytest.raises(FeatureCacheError, match=r"features-00001.safetensors is (damaged|missing)"):
        CachedFeatures.open(tmp_path, verify=damage == "flipped")
    assert build(tmp_path, tower, verify=damage == "flipped")[1] == 4
    assert contents(tmp_path) == whole


def test_flipped_in_a_partial_cache(tmp_path, tower):
    build(tmp_path, tower)
    whole = contents(tmp_path)
    (tmp_path / "cache.json").unlink()
    flip(tmp_path / "features-00002.safetensors")
    assert build(tmp_path, tower)[1] == 3
    assert contents(tmp_path) == whole


def test_a_damaged_index(tmp_path, tower):
    build(tmp_path, tower)
    whole = contents(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(FeatureCacheError, match=r"cache.json is damaged"):
        CachedFeatures.open(tmp_path)
    assert build(tmp_path, tower)[1] == 0
    assert contents(tmp_path) == whole


def test_no_finite_number(tmp_path):
    def encode(pixel_values):
        features = pixel_values.flatten(1)[:, None, :8].clone()
        if len(features) == 2:
            features[1, 0, 3] = float("nan")
        return features

    options = {"batch_size": 3, "rows_per_shard": 5, "progress": False}
    with pytest.raises(FeatureCacheError, match="row 4 has features that are not finite"):
        cache_features(tmp_path, ROWS, tiny.clip_processor(), encode, {}, **options)
    assert not list(tmp_path.glob("features-*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_is_one_line(tmp_path, tower, workers):
    rows = [*ROWS[:6], {"image": b"no picture"}]
    with pytest.raises(ValueError, match=r"^row 6: not an image[^\n]*$"):
        build(tmp_path, tower, rows=rows, num_workers=workers)


def test_wrong_shapes_and_no_rows(tmp_path, tower):
    with pytest.raises(FeatureCacheError, match=r"shape \(3, 3\), expected \(3, tokens, width\)"):
        cache_features(tmp_path, ROWS, tiny.clip_processor(), lambda x: x[:, :, 0, 0], {}, 3, progress=False)
    with pytest.raises(FeatureCacheError, match="no rows"):
        build(tmp_path, tower, rows=[])


def test_a_full_disk_is_one_line(tmp_path, tower):
    """A limit on the size of files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(FeatureCacheError, match=r"features-00000.safetensors cannot be written[^\n]*$"):
            build(tmp_path, tower)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not contents(tmp_path)
    assert build(tmp_path, tower)[1] == 11


def test_a_folder_that_cannot_be(tmp_path, tower):
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureCacheError, match="cannot be written"):
        build(tmp_path / "file", tower)


def test_two_at_once(tmp_path, tower):
    """The second waits, and encodes nothing."""
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(build(tmp_path, tower)[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [0, 11]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux how much of a file is in memory")
def test_reading_is_lazy(tmp_path):
    """Of a shard of 24 MB only the rows asked for come into memory, and nothing at opening."""
    rows = [ROWS[0]] * 48

    def encode(pixel_values):
        return torch.ones(len(pixel_values), 64, 4096)

    cache_features(tmp_path, rows, tiny.clip_processor(), encode, {}, progress=False)
    features = CachedFeatures.open(tmp_path)
    shard = re.escape(str(tmp_path / "features-00000.safetensors"))
    resident = re.compile(shard + r"\n(?:\w+: +\d+ kB\n)*?Rss: +(\d+) kB")
    assert not resident.findall(Path("/proc/self/smaps").read_text())
    features[[20, 3]]
    (kilobytes,) = map(int, resident.findall(Path("/proc/self/smaps").read_text()))
    assert 1000 < kilobytes < 12000  # two rows of 512 kB, and what the kernel maps around them


def test_in_a_loader_with_workers(tmp_path, tower):
    features, _ = build(tmp_path, tower)
    features[[5]]
    assert torch.equal(pickle.loads(pickle.dumps(features))[[5, 9]], features[[5, 9]])
    collator = ContrastiveCollator(tiny.clip_processor(), vision_features=features)
    pairs = PairDataset(ROWS)
    loader = DataLoader(pairs, 4, collate_fn=collator, num_workers=2, multiprocessing_context="spawn")
    batches = [batch["vision_features"] for batch in loader]
    assert torch.equal(torch.cat(batches), features[range(11)])


def test_command(tmp_path):
    pytest.importorskip("resvg_py")
    model = tiny.clip_model()
    model.save_pretrained(tmp_path / "clip")
    tiny.clip_processor().save_pretrained(tmp_path / "clip")
    command = ["cache-features", str(tmp_path / "clip"), "--output", str(tmp_path / "cache"), "--limit", "6"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "6 rows of 17 x 32 in bfloat16" in result.stdout
    features = CachedFeatures.open(tmp_path / "cache", verify=True)
    assert features.key["data"] == {"path": "scenes", "split": "train", "seed": 0, "size": 48, "rows": 6}
    CachedFeatures.open(
        tmp_path / "cache", feature_key(model.vision_model, tiny.clip_processor(), features.key["data"])
    )
    rows = SceneRows(SceneStream("train", 0, 48), 6, max_words=8)
    processor, tower = tiny.clip_processor(), model.vision_model
    again = cached_tower_features(tmp_path / "cache", rows, processor, tower, batch_size=0)  # no batch is made
    assert torch.equal(again[[0, 5]], features[[0, 5]])
    with pytest.raises(FeatureCacheError, match="seed is 0, not 1"):
        cached_tower_features(tmp_path / "cache", SceneRows(SceneStream("train", 1, 48), 6), processor, tower)
    assert CliRunner().invoke(app, [*command, "--verify"]).exit_code == 0
    other = CliRunner().invoke(app, [*command, "--image-size", "48"])
    assert "image_size is 32, not 48" in str(other.exception)
    endless = CliRunner().invoke(app, command[:4])
    assert "give their number" in str(endless.exception)


def test_a_stream_is_refused(tmp_path, tower):
    with pytest.raises(ValueError, match="A stream has no row numbers"):
        cached_tower_features(tmp_path, PairStream(datasets.IterableDataset.from_generator(list)), None, tower)


def test_command_on_own_data(tmp_path):
    tiny.clip_model().vision_model.save_pretrained(tmp_path / "tower")
    tiny.clip_processor().image_processor.save_pretrained(tmp_path / "tower")
    (tmp_path / "data").mkdir()
    lines = []
    for i, row in enumerate(ROWS):
        row["image"].save(tmp_path / "data" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "words": row["caption"]}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    command = ["cache-features", str(tmp_path / "tower"), "--output", str(tmp_path / "cache")]
    command += ["--data", str(tmp_path / "data"), "--columns", "image=image,caption=words", "--limit", "7"]
    result = CliRunner().invoke(app, [*command, "--image-size", "48", "--bf16"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "7 rows of 37 x 32" in result.stdout
