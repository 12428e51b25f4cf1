"""The Hub: pushed by one process, loaded by another, over HTTP against a Hub on the loopback interface.

What was pushed gives the same bits as the folder it came from; what fails leaves the Hub as it was and says why.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig, BertModel, SiglipVisionConfig, SiglipVisionModel

from cases import tiny
from hf_vlm import VlmClipModel
from hf_vlm.data import ContrastiveCollator
from hf_vlm.hub import push
from hf_vlm.hub.cards.card import is_unedited, write_card
from hf_vlm.hub.export import save_with_code
from hf_vlm.hub.push import PushError, push_folder
from hf_vlm.hub.record import write_record
from hf_vlm.training import ContrastiveTrainer, ContrastiveTrainingArguments
from hub_processes import ACCOUNTS, CARD, READER, STRANGER, WRITER, WRONG, Worker, environment
from loopback_hub import ATTRIBUTES, File, LoopbackHub

CHECKPOINT = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def running() -> Iterator[LoopbackHub]:
    with LoopbackHub(ACCOUNTS) as hub:
        yield hub


@pytest.fixture(scope="module")
def workers(running: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Worker]]:
    """A process that may write, and one without a token; both start at once."""
    folder = tmp_path_factory.mktemp("workers")
    pair = Worker(running, folder / "writer", WRITER), Worker(running, folder / "reader", None)
    yield pair
    for worker in pair:
        worker.close()


@pytest.fixture
def hub(running: LoopbackHub) -> LoopbackHub:
    """The Hub, empty and without faults."""
    running.heal()
    running.repos.clear()
    running.storage.clear()
    running.requests.clear()
    return running


@pytest.fixture
def writer(workers: tuple[Worker, Worker]) -> Worker:
    return workers[0]


@pytest.fixture
def reader(workers: tuple[Worker, Worker]) -> Worker:
    return workers[1]


def save(folder: Path, model: VlmClipModel | None = None, **options: object) -> Path:
    """A checkpoint with all other files that a run writes."""
    (model or tiny.clip_model()).save_pretrained(folder, **options)
    tiny.clip_processor().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    for name in ("training_record.json", "results.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    for name in ("training_args.bin", "optimizer.pt", "momentum.safetensors", "notes.txt", "train.py"):
        (folder / name).write_bytes(b"\x80 not for the Hub")
    (folder / "checkpoint-3").mkdir()
    shutil.copy(folder / "config.json", folder / "checkpoint-3")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "clip-tiny")


# --- there and back


def test_by_id_as_from_the_folder(hub, writer, reader, tmp_path):
    """Both Auto classes, both pipelines and a snapshot; the download of the weights breaks off once and goes on."""
    folder = save(tmp_path / "clip", tiny.clip_model(text={"vocab_size": 140_000}))
    assert (folder / "model.safetensors").stat().st_size > 13_000_000
    url = writer.result("push_folder", folder, "org/clip-tiny")
    assert url == f"{hub.url}/org/clip-tiny"
    hub.cut_download = 11_000_000
    assert reader.result("logits", "org/clip-tiny") == reader.result("logits", folder)
    assert 206 in {status for _, _, status in hub.requests}
    assert reader.result("pipelines", "org/clip-tiny") == reader.result("pipelines", folder)
    snapshot = Path(reader.result("snapshot_download", "org/clip-tiny"))
    for name in CHECKPOINT:
        assert (snapshot / name).read_bytes() == (folder / name).read_bytes(), name


def test_one_commit_holds_what_belongs_to_the_model(hub, writer, folder):
    writer.result("push_folder", folder, "org/clip")
    first, *commits = hub.repos["org/clip"].commits.values()
    assert [commit.parent for commit in commits] == [first.sha]
    about = {"README.md", "training_record.json", "results.json"}
    assert set(hub.files("org/clip")) == {ATTRIBUTES, *CHECKPOINT, *about}
    assert hub.files("org/clip")["README.md"].decode() == CARD


def test_a_card_that_nobody_edited_names_the_repository(hub, writer, folder):
    for name in ("training_record.json", "results.json", "README.md"):
        (folder / name).unlink()
    write_card(folder)
    writer.result("push_folder", folder, "org/named")
    card = hub.files("org/named")["README.md"].decode()
    assert '"org/named"' in card
    assert f'"{folder.name}"' not in card
    edited = write_card(folder).read_text() + "More.\n"
    (folder / "README.md").write_text(edited)
    writer.result("push_folder", folder, "org/edited")
    assert hub.files("org/edited")["README.md"].decode() == edited


def test_a_recorded_card_is_recognised_after_push_and_download(hub, writer, folder, tmp_path):
    """The record's hash matches the card next to it: here, and on the Hub, where the card names the repository."""
    write_record(folder, {"recipe": "clip_pretrain"})
    (folder / "results.json").unlink()
    (folder / "README.md").unlink()
    write_card(folder)
    assert is_unedited(folder)
    writer.result("push_folder", folder, "org/recorded")
    pushed = hub.files("org/recorded")
    assert b'"org/recorded"' in pushed["README.md"]
    for name in ("README.md", "training_record.json"):
        assert pushed[name] != (folder / name).read_bytes()
        (tmp_path / name).write_bytes(pushed[name])
    assert is_unedited(tmp_path)


def test_model_and_processor_push_themselves(hub, writer, reader, folder):
    writer.result("push_parts", folder, "org/parts")
    assert reader.result("logits", "org/parts") == reader.result("logits", folder)


def test_weights_of_an_earlier_push_are_not_left(hub, writer, reader, folder, tmp_path):
    """One file replaced by shards: `from_pretrained` would prefer the old one."""
    writer.result("push_folder", folder, "org/clip")
    other = save(tmp_path / "sharded", max_shard_size="20KB")
    assert not (other / "model.safetensors").exists()
    writer.result("push_folder", other, "org/clip")
    assert reader.result("logits", "org/clip") == reader.result("logits", other)
    assert "model.safetensors" not in hub.files("org/clip")
    writer.result("push_folder", folder, "org/clip")
    assert {name for name in hub.files("org/clip") if "safetensors" in name} == {"model.safetensors"}


def test_a_revision_leaves_main_alone(hub, writer, reader, folder, tmp_path):
    writer.result("push_folder", folder, "org/clip")
    main = hub.state()["org/clip"]["main"]
    other = save(tmp_path / "other")
    url = writer.result("push_folder", other, "org/clip", revision="v2")
    assert url.endswith("/org/clip/tree/v2")
    assert hub.state()["org/clip"]["main"] == main
    found = [reader.result("logits", "org/clip", revision=revision) for revision in ("main", "v2")]
    assert found == [reader.result("logits", folder), reader.result("logits", other)]
    assert found[0] != found[1]


def test_a_pull_request_leaves_main_alone(hub, writer, reader, folder, tmp_path):
    """Even from somebody who may not write there."""
    writer.result("push_folder", folder, "org/clip")
    main = hub.state()["org/clip"]["main"]
    other = save(tmp_path / "other")
    said = writer.result("cli", "push", other, "org/clip", "--create-pr", "--message", "Better", token=STRANGER)
    assert said["code"] == 0
    assert said["out"].strip().endswith(f"{hub.url}/org/clip/discussions/1")
    refs = hub.state()["org/clip"]
    assert refs["main"] == main
    assert hub.repos["org/clip"].commits[refs["refs/pr/1"]].message == "Better"
    assert reader.result("logits", "org/clip", revision="refs/pr/1") == reader.result("logits", other)


def test_a_private_repository_needs_a_token(hub, writer, reader, folder):
    said = writer.result("cli", "push", folder, "org/secret", "--private")
    assert said["code"] == 0
    assert hub.repos["org/secret"].private
    answer = reader("logits", "org/secret")
    assert answer["error"] == "OSError"
    assert "org/secret" in answer["text"]
    assert reader.result("logits", "org/secret", token=READER) == reader.result("logits", folder)
    assert reader("logits", "org/secret", token=WRONG, force_download=True)["error"] == "OSError"


def test_a_name_alone_is_in_the_namespace_of_the_token(hub, writer, folder):
    assert writer.result("push_folder", folder, "clip").endswith("/writer/clip")
    assert set(hub.state()) == {"writer/clip"}


def test_pushing_the_same_again_adds_no_commit(hub, writer, folder):
    writer.result("push_folder", folder, "org/clip")
    before = hub.state()
    writer.result("push_folder", folder, "org/clip")
    assert hub.state() == before


# --- with code

WITHOUT_PACKAGE = """
import hashlib, importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hf_vlm") is None
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

torch.set_num_threads(1)
picture = Image.linear_gradient("L").convert("RGB").resize((40, 36))

for name in ("own", "native"):
    source = f"org/{name}"
    model, info = AutoModel.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    again = AutoModelForZeroShotImageClassification.from_pretrained(source, trust_remote_code=True)
    inputs = processor(images=[picture], text=["a red cat", "tree"])
    with torch.inference_mode():
        logits = model.eval()(**inputs).logits_per_image
        assert torch.equal(logits, again.eval()(**inputs).logits_per_image)
    print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())

for source, options in (("org/own", {"trust_remote_code": False}), ("org/plain", {})):
    try:
        AutoModel.from_pretrained(source, **options)
    except ValueError as error:
        print(str(error).splitlines()[0])
"""


def native_towers() -> VlmClipModel:
    """SigLIP's vision tower and BERT, as `from_parts` takes them."""
    sizes = tiny.layer_sizes()
    vision = SiglipVisionModel(SiglipVisionConfig(image_size=tiny.IMAGE_SIZE, patch_size=8, **sizes))
    text = BertModel(BertConfig(vocab_size=len(tiny.VOCABULARY), max_position_embeddings=tiny.MAX_LENGTH, **sizes))
    return tiny.randomise(VlmClipModel.from_parts(vision, text, projection_dim=16))


def test_pushed_with_its_code_it_loads_without_the_package(hub, writer, reader, folder, tmp_path):
    """With our towers and with native ones; and without remote code the error is transformers' own."""
    for name, model in (("own", tiny.clip_model()), ("native", native_towers())):
        writer.result("push_folder", save(tmp_path / name, model), f"org/{name}", with_code=True)
        assert hub.files(f"org/{name}")["README.md"].decode() == CARD
    assert {"modeling_clip.py", "processing_clip.py"} <= set(hub.files("org/own"))
    assert "train.py" not in hub.files("org/own")
    writer.result("push_folder", folder, "org/plain")
    env = environment(hub.url, tmp_path / "home", None) | {"PYTHONPATH": ""}
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-S", "-c", WITHOUT_PACKAGE, packages]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *digests, refused, unknown = done.stdout.splitlines()
    assert digests == [reader.result("logits", tmp_path / name) for name in ("own", "native")]
    assert "contains custom code" in refused
    assert "model type `vlm_clip` but Transformers does not recognize" in unknown


def test_a_native_architecture_needs_no_code(hub, writer, folder, tmp_path):
    native = tmp_path / "native"
    writer.result("cli", "convert", folder, native, "--to", "native")
    answer = writer("push_folder", native, "org/native", with_code=True)
    assert answer["error"] == "ValueError"
    assert "CLIPModel" in answer["text"]
    writer.result("push_folder", native, "org/native")
    assert "model.safetensors" in hub.files("org/native")


def test_help_has_an_example(writer):
    said = writer.result("cli", "push", "--help")
    assert said["code"] == 0
    assert "hf-vlm push" in said["out"].split("Example")[-1]


# --- what goes wrong


def error_line(worker: Worker, *args: object, **options: object) -> str:
    """The one line of a command that fails."""
    said = worker.result("cli", *args, **options)
    assert said["code"] == 1, said
    assert "Traceback" not in said["err"]
    (line,) = re.findall(r"Error: .*", said["err"])  # a progress bar may stand before it
    assert not said["out"]
    return line


@pytest.mark.parametrize(
    ("target", "options", "token", "expected"),
    [
        ("org/clip", [], WRONG, "401"),
        ("org/new", [], WRONG, "401"),
        ("org/clip", [], READER, "403"),
        ("org/new", [], READER, "403"),
        ("elsewhere/new", [], WRITER, "403"),
        ("org/absent", ["--create-pr"], WRITER, "404"),
        ("org/clip", ["--private"], WRITER, "public"),
        ("org/clip", ["--create-pr", "--revision", "v2"], WRITER, "revision"),
        ("org/a/b", [], WRITER, "org/a/b"),
        ("org/--", [], WRITER, "org/--"),
    ],
)
def test_a_refused_push_is_one_line_and_changes_nothing(hub, writer, folder, target, options, token, expected):
    writer.result("push_folder", folder, "org/clip")
    before = hub.state()
    line = error_line(writer, "push", folder, target, *options, token=token)
    assert expected in line
    assert token not in line
    assert hub.state() == before


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vlm_unheard_of"}')


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (break_config, "vlm_unheard_of"),
        (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (cut_weights, "model.safetensors"),
        (shutil.rmtree, "config.json"),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "push an adapter by PEFT",
        ),
    ],
)
def test_a_folder_without_a_whole_checkpoint_is_refused_before_anything_is_sent(hub, folder, damage, expected):
    damage(folder)
    with pytest.raises(ValueError, match=expected) as caught:
        push_folder(folder, "org/clip", token=WRITER)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["vocab.txt", "README.md", "LICENSE", "model.safetensors", "config.json", "qformer_tokenizer", "merges.txt"]
)
def test_a_link_to_somebodys_file_is_refused_before_anything_is_sent(hub, folder, name, tmp_path):
    """Followed, it would publish a private file under the name of a public one."""
    linked = folder / name
    secret = tmp_path / "secret" / "tokenizer.json"
    secret.parent.mkdir()
    shutil.copy(linked if linked.is_file() else folder / "tokenizer.json", secret)
    linked.unlink(missing_ok=True)
    linked.symlink_to(secret.parent if name == "qformer_tokenizer" else secret)
    for with_code in (False, True):
        with pytest.raises(ValueError, match=f"{name}.* is a link to a file outside"):
            push_folder(folder, "org/clip", token=WRITER, with_code=with_code)
    assert not hub.requests


def test_links_within_the_folder_and_to_the_hubs_cache_are_followed(folder, tmp_path, monkeypatch):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    monkeypatch.setattr(push, "HF_HUB_CACHE", str(tmp_path / "hub"))
    blob = tmp_path / "hub" / "models--org--name" / "blobs" / "1234"
    blob.parent.mkdir(parents=True)
    (folder / "tokenizer.json").rename(blob)
    (folder / "tokenizer.json").symlink_to(blob)
    push.check_checkpoint(folder)


def test_only_weights_and_code_that_are_named_are_pushed(tmp_path):
    folder = save(tmp_path / "clip", max_shard_size="50KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    for name in ("model-00001-of-00009.safetensors", "adapter_model.safetensors", "notes.model", "secret.py"):
        (folder / name).write_bytes(b"\x80 not for the Hub")
    expected = (CHECKPOINT - {"model.safetensors"}) | shards | {push.INDEX}
    expected |= {"README.md", "training_record.json", "results.json"}
    assert {path.name for path in push.files_to_push(folder)} == expected
    shutil.copy(folder / min(shards), folder / "model.safetensors")  # transformers loads the single file then
    assert {path.name for path in push.files_to_push(folder)} == (expected - shards - {push.INDEX}) | CHECKPOINT
    save_with_code(tiny.clip_model(), tiny.clip_processor(), tmp_path / "code")
    (tmp_path / "code" / "train.py").write_text("SECRET = 1")
    pushed = {path.name for path in push.files_to_push(tmp_path / "code")}
    assert {"modeling_clip.py", "configuration_clip.py", "modeling_tower.py", "processing_clip.py"} <= pushed
    assert "train.py" not in pushed


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": {"a": "../secret.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}}, []],
)
def test_an_index_that_names_other_files_is_refused(hub, folder, index):
    (folder / "model.safetensors").unlink()
    (folder / push.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json (does not name shards|holds no JSON object)"):
        push_folder(folder, "org/clip", token=WRITER)
    assert not hub.requests


def test_a_card_that_the_hub_refuses_is_one_line(hub, writer, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "README.md" in error_line(writer, "push", folder, "org/clip")
    assert not hub.state()


def test_a_stale_parent_loses_nobodys_work(hub, writer, folder):
    """Somebody commits while the files are uploaded: to a repository that was there, and to one made by the push."""
    for name in ("org/there", "org/new"):
        if name == "org/there":
            writer.result("push_folder", folder, name)
            (folder / "README.md").write_text(CARD + "More.\n")

        def interfere(name: str = name) -> None:
            repo = hub.repos[name]
            repo.add("main", "theirs", repo.refs["main"], {"theirs.txt": File(b"theirs")})

        hub.before_commit = interfere
        assert "412" in error_line(writer, "push", folder, name)
        assert hub.files(name) == {"theirs.txt": b"theirs"}


def test_a_hub_that_is_back_soon_is_waited_for(hub, writer, reader, folder):
    hub.fail("preupload", 1)
    hub.fail("PUT /storage", 1)
    writer.result("push_folder", folder, "org/clip")
    assert [status for _, _, status in hub.requests].count(503) == 2
    assert reader.result("logits", "org/clip") == reader.result("logits", folder)


@pytest.mark.parametrize("where", ["GET /api/models", "/repos/create", "PUT /storage", "/commit/"])
def test_a_hub_that_stays_away_is_one_line_and_nothing_is_left(hub, writer, folder, where):
    """A repository made by the push is gone again."""
    hub.fail(where, 6 if where == "PUT /storage" else 1)  # the client tries an upload six times, these others once
    line = error_line(writer, "push", folder, "org/new")
    assert "503" in line
    assert ("removed again" in line) == (where in ("PUT /storage", "/commit/"))
    assert not hub.state()


def test_a_failed_push_leaves_neither_branch_nor_commit(hub, writer, folder):
    writer.result("push_folder", folder, "org/clip")
    before = hub.state()
    (folder / "README.md").write_text(CARD + "More.\n")
    hub.fail("/commit/", 1)
    line = error_line(writer, "push", folder, "org/clip", "--revision", "v2")
    assert "503" in line
    assert "v2" in line
    assert hub.state() == before


def test_what_cannot_be_removed_is_said(hub, writer, folder):
    hub.fail("/commit/", 1)
    hub.fail("/api/repos/delete", 1)
    assert "could not be removed" in error_line(writer, "push", folder, "org/new")
    assert set(hub.files("org/new")) == {ATTRIBUTES}


def test_without_a_network_it_is_one_line(folder, tmp_path):
    """In a process of its own, as a user calls it; the port was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", "from hf_vlm.cli.main import main; main()", "push", str(folder), "org/clip"]
    env = environment(address, tmp_path / "home", WRITER)
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no connection" in line
    assert not done.stdout


def test_offline_mode_is_one_line(folder):
    with pytest.raises(PushError, match="offline mode") as caught:
        push_folder(folder, "org/clip", token=WRITER)
    assert "\n" not in str(caught.value)


# --- recipes


def recipe(tmp_path: Path, **options: object) -> Path:
    """CLIP's recipe on four images, two steps, every one saved, pushed at the end."""
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "words": caption}) for i, caption in enumerate(tiny.CAPTIONS)]
    for i in range(len(lines)):
        tiny.image(seed=i).save(data / f"{i}.png")
    (data / "metadata.jsonl").write_text("\n".join(lines))
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = {
        "vision_config": {**tiny.layer_sizes(), "patch_size": 16},
        "text_config": {**tiny.layer_sizes(), **tiny.TOKENS},
        "tokenizer": str(tmp_path / "tokenizer"),
        "image_size": tiny.IMAGE_SIZE,
        "projection_dim": 16,
        "max_text_length": tiny.MAX_LENGTH,
        "sources": [{"path": str(data), "columns": {"image": "image", "caption": "words"}}],
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_steps": 1,
        "bf16": False,
        "report_to": "none",
        "push_to_hub": True,
        "hub_model_id": "org/run",
        "hub_private_repo": True,
        **options,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "recipe.yaml"


def test_a_recipe_pushes_one_commit_at_its_end(hub, writer, tmp_path):
    """Model, processor, card and record; neither pickles nor the checkpoints of the run."""
    writer.result("recipe", "--config", recipe(tmp_path, hub_token=WRITER))
    assert hub.repos["org/run"].private
    assert len(hub.repos["org/run"].commits) == 2
    files = hub.files("org/run")
    assert set(files) == {ATTRIBUTES, *CHECKPOINT, "README.md", "training_record.json"}
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert not any(WRITER.encode() in data for data in files.values())


def test_a_wrong_token_ends_a_recipe_before_it_begins(hub, writer, tmp_path):
    answer = writer("recipe", "--config", recipe(tmp_path, hub_token=WRONG))
    assert answer["text"].startswith("Invalid user token")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not hub.state()


def test_pushing_while_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hub_strategy"):
        ContrastiveTrainingArguments(str(tmp_path), bf16=False, push_to_hub=True, hub_strategy="every_save")
    options = ContrastiveTrainingArguments(str(tmp_path), bf16=False, report_to="none")
    trainer = ContrastiveTrainer(tiny.clip_model(), options, data_collator=ContrastiveCollator(tiny.clip_processor()))
    with pytest.raises(ValueError, match="push_folder"):
        trainer.push_to_hub()


# --- last: everything that the processes above have said


def test_no_token_in_any_output(workers):
    said = [text for worker in workers for text in (*worker.answers, worker.said.read_text())]
    assert any("HTTP Error 503" in text for text in said)  # the streams are those that the client writes to
    for token in ACCOUNTS:
        assert not any(token in text for text in said)
