"""LLaVA on the Hub: pushed with its code by one process, with an adapter; loaded by id in two others.

One of these has hf_vlm, the other has only the code that came with the checkpoint.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm import VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.models import with_image_token
from hub_processes import ACCOUNTS, CARD, TESTS, WRITER, environment
from loopback_hub import LoopbackHub
from scripts import llava_hub

pytestmark = pytest.mark.slow

MODELS = {
    "own": lambda: tiny_llava.on_tower("own"),
    "own-tiles": lambda: tiny_llava.on_tower("own", anyres=True),
    "clip": lambda: tiny_llava.on_tower("clip", llm="qwen2"),
    "clip-tiles": lambda: tiny_llava.on_tower("clip", anyres=True, llm="llama, tied"),
    "siglip": lambda: tiny_llava.on_tower("siglip"),
}
CODE = {"modeling_llava.py", "processing_llava.py", "configuration_llava.py", "anyres.py", "language_model.py"}

# Without site (-S) an editable install does not put hf_vlm on the path.
READ = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("hf_vlm") is None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
folder, texts, found = sys.argv[2], sys.argv[3].split("|"), {}
loading = {"trust_remote_code": True, "output_loading_info": True}
for repo in sys.argv[4:]:
    for name in (repo, f"{repo}-lora"):
        model, info = AutoModelForImageTextToText.from_pretrained(name, **loading)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        inputs = processor(images=[Image.open(f"{folder}/picture.png")] * 3, text=texts)
        with torch.no_grad():
            found[f"{name} logits"] = model.eval()(**inputs).logits[inputs["attention_mask"].bool()]
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        found[f"{name} tokens"] = model.generate(**inputs, **options).contiguous()
    body, info = AutoModel.from_pretrained(repo, **loading)
    assert type(body).__name__ == "VlmLlavaModel"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found[f"{repo} states"] = body(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
save_file(found, f"{folder}/there.safetensors")
"""


def processor_of(model: VlmLlavaForConditionalGeneration) -> VlmLlavaProcessor:
    return VlmLlavaProcessor.from_parts(model, with_image_token(tiny_blip2.llm_tokenizer()))


def run(hub: LoopbackHub, home: Path, token: str | None, *command: str) -> None:
    """A Python of its own, with a Hugging Face home of its own, that knows this Hub."""
    variables = environment(hub.url, home, token)
    if "-S" in command:
        variables["PYTHONPATH"] = ""
    home.mkdir()
    where = home if "-S" in command else TESTS
    result = subprocess.run(
        [sys.executable, *command], cwd=where, env=variables, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


class Pushed:
    """The folder that three processes leave their answers in, the Hub, and the models that were pushed."""

    def __init__(self, folder: Path, hub: LoopbackHub):
        self.folder, self.hub = folder, hub
        self.picture = tiny.image(100, 40)
        self.picture.save(folder / "picture.png")
        self.models = {name: make() for name, make in MODELS.items()}
        for name, model in self.models.items():
            checkpoint = folder / "checkpoints" / name
            model.save_pretrained(checkpoint)
            processor_of(model).save_pretrained(checkpoint)
            (checkpoint / "README.md").write_text(CARD)
        run(hub, folder / "writer", WRITER, "-m", "scripts.llava_hub", "push", str(folder))
        run(hub, folder / "reader", None, "-m", "scripts.llava_hub", "read", str(folder))
        packages, texts = sysconfig.get_paths()["purelib"], "|".join(llava_hub.TEXTS)
        repos = [f"org/{name}" for name in MODELS]
        run(hub, folder / "stranger", None, "-S", "-c", READ, packages, str(folder), texts, *repos)

    def said(self, file: str, repo: str) -> dict[str, torch.Tensor]:
        """The outputs of a process for a repository."""
        tensors = load_file(self.folder / f"{file}.safetensors")
        return {key.split()[1]: tensor for key, tensor in tensors.items() if key.split()[0] == repo}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(0)
    with LoopbackHub(ACCOUNTS) as hub:
        yield Pushed(tmp_path_factory.mktemp("pushed"), hub)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert torch.equal(found["tokens"], expected["tokens"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_hub_says_what_the_pushed_one_says(name: str, pushed: Pushed) -> None:
    """Its processor comes from there as well."""
    model = pushed.models[name]
    expected = llava_hub.said(model, processor_of(model), pushed.picture)
    assert_same(pushed.said("read", f"org/{name}"), expected)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_the_hub_says_what_the_pushed_one_says(name: str, pushed: Pushed) -> None:
    """By its own id: the base that it names comes from the Hub as well."""
    expected = pushed.said("pushed", f"org/{name}-lora")
    assert_same(pushed.said("read", f"org/{name}-lora"), expected)
    base = pushed.said("read", f"org/{name}")
    assert (base["logits"] - expected["logits"]).abs().max() > 0.01
    assert "model.safetensors" not in pushed.hub.files(f"org/{name}-lora")


@pytest.mark.parametrize("adapter", ["", "-lora"], ids=["model", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_the_package_has_the_same_answers(name: str, adapter: str, pushed: Pushed) -> None:
    """By the code that was pushed; the adapter by that of its base."""
    found = pushed.said("there", f"org/{name}{adapter}")
    assert_same(found, pushed.said("read", f"org/{name}{adapter}"))


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_the_package_has_the_body(name: str, pushed: Pushed) -> None:
    model = pushed.models[name]
    inputs = processor_of(model)(images=[pushed.picture] * 3, text=llava_hub.TEXTS)
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    found = pushed.said("there", f"org/{name}")["states"]
    torch.testing.assert_close(found, states, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_code_is_pushed_and_nothing_else(name: str, pushed: Pushed) -> None:
    files = set(pushed.hub.files(f"org/{name}"))
    assert files >= CODE | {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert not any(file.endswith((".bin", ".pt", ".pth", ".pkl")) for file in files)
