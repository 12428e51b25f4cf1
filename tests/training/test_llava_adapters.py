"""LLaVA by LoRA: its adapters hold all that was trained, load in every way, and merge; runs of any stage resume."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel

from cases import tiny_llava
from hf_vlm import VlmLlavaForConditionalGeneration, VlmLlavaModel
from hf_vlm.training import STAGES, apply_stage, last_checkpoint
from hf_vlm.training.stages import PARTS
from processes import curve, equal
from scripts import llava_resume, llava_training

TESTS = Path(__file__).parents[1]
Llava = VlmLlavaForConditionalGeneration
LORA = STAGES["llava-1.5-lora"]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def saved_name(name: str) -> str:
    """A trained parameter's name in an adapter's file."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


class Trained:
    """A base model on disk, and three steps of LoRA on it: the model, what changed, and its adapter's folder."""

    def __init__(self, folder: Path, anyres: bool, llm: str = "llama", **options):
        self.anyres, self.base, self.adapter = anyres, folder / "base", folder / "adapter"
        llava_training.model(anyres, llm=llm, **options).save_pretrained(self.base)
        self.model = apply_stage(Llava.from_pretrained(self.base), LORA)
        before = weights(self.model)
        llava_training.trainer(folder / "run", self.model, learning_rate=0.02).train()
        self.changed = {
            name: value for name, value in weights(self.model).items() if not torch.equal(value, before[name])
        }
        self.model.eval()
        self.model.save_pretrained(self.adapter)
        self.inputs = tiny_llava.llava_inputs(anyres)
        self.logits = self.logits_of(self.model)
        assert (self.logits - self.logits_of(Llava.from_pretrained(self.base))).abs().max() > 0.1

    @torch.no_grad()
    def logits_of(self, model: PreTrainedModel | PeftModel) -> torch.Tensor:
        """At every position that is not padding."""
        assert not model.training
        return model(**self.inputs).logits[self.inputs["attention_mask"].bool()]

    def assert_same(self, model: PreTrainedModel | PeftModel, atol: float = 0.0) -> None:
        torch.testing.assert_close(self.logits_of(model), self.logits, rtol=0.0, atol=atol)
        tokens = self.model.get_base_model().generate(**self.inputs, **GREEDY)
        assert torch.equal(model.generate(**self.inputs, **GREEDY), tokens)


@pytest.fixture(scope="module", params=[False, True], ids=["one view", "tiles"])
def lora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(0)
    return Trained(tmp_path_factory.mktemp("lora"), request.param)


# --- saved and loaded


def test_an_adapter_holds_what_training_changed(lora: Trained) -> None:
    """All of it, projector and newline included, and nothing else; loaded, each is the same to the last bit."""
    saved = load_file(lora.adapter / "adapter_model.safetensors")
    assert saved.keys() == {saved_name(name) for name in lora.changed}
    projector = {name.split("projector.")[1] for name in saved if "projector" in name}
    layers = {f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert projector == layers | ({"newline"} if lora.anyres else set())
    # Seven matrices in each of two layers of the LLM, by two.
    assert len(saved) == len(projector) + 28
    loaded = weights(PeftModel.from_pretrained(Llava.from_pretrained(lora.base), lora.adapter))
    assert {name for name, value in lora.changed.items() if not torch.equal(loaded[name], value)} == set()
    assert json.loads((lora.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(lora.base)


def from_folder_of_both(lora: Trained, tmp_path: Path) -> PreTrainedModel:
    shutil.copytree(lora.base, tmp_path / "both")
    shutil.copytree(lora.adapter, tmp_path / "both", dirs_exist_ok=True)
    return AutoModelForImageTextToText.from_pretrained(tmp_path / "both")


def loaded_later(lora: Trained, _: Path) -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_pretrained(lora.base)
    info = model.load_adapter(str(lora.adapter))
    assert not info.missing_keys
    assert not info.unexpected_keys
    return model


WAYS: dict[str, Callable[[Trained, Path], PreTrainedModel | PeftModel]] = {
    "by PEFT": lambda lora, _: PeftModel.from_pretrained(Llava.from_pretrained(lora.base), lora.adapter).eval(),
    "by its folder": lambda lora, _: AutoModelForImageTextToText.from_pretrained(lora.adapter),
    "by its class": lambda lora, _: Llava.from_pretrained(lora.adapter),
    "from the base's folder": from_folder_of_both,
    "later": loaded_later,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_is_loaded(way: str, lora: Trained, tmp_path: Path) -> None:
    lora.assert_same(WAYS[way](lora, tmp_path))


def test_nothing_is_missing_of_a_loaded_adapter(lora: Trained) -> None:
    """Every weight is the trained one, and nothing is unfrozen; saved again, it is the same file."""
    model, info = AutoModelForImageTextToText.from_pretrained(lora.adapter, output_loading_info=True)
    assert type(model) is Llava
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = weights(model)
    for name, value in lora.changed.items():
        assert torch.equal(loaded[name.removeprefix("base_model.model.")], value), name
    assert not any(parameter.requires_grad for parameter in model.model.vision_model.parameters())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_a_loaded_adapter_is_saved_as_it_was(lora: Trained, tmp_path: Path) -> None:
    AutoModelForImageTextToText.from_pretrained(lora.adapter).save_pretrained(tmp_path)
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (lora.adapter, tmp_path))
    assert equal(first, again)
    lora.assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path))


def test_automodel_has_the_body_of_an_adapter(lora: Trained) -> None:
    body, info = AutoModel.from_pretrained(lora.adapter, output_loading_info=True)
    assert type(body) is VlmLlavaModel
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        states, expected = (model(**lora.inputs).last_hidden_state for model in (body, lora.model))
    mask = lora.inputs["attention_mask"].bool()
    torch.testing.assert_close(states[mask], expected[mask], rtol=0.0, atol=0.0)


def test_an_adapter_whose_base_is_gone_says_where_it_was(lora: Trained, tmp_path: Path) -> None:
    """Saved there again, it loads; PEFT needs no such place."""
    away = tmp_path / "away"
    shutil.move(lora.base, away)
    try:
        with pytest.raises(OSError, match=str(lora.base)):
            AutoModelForImageTextToText.from_pretrained(lora.adapter)
        lora.assert_same(PeftModel.from_pretrained(Llava.from_pretrained(away), lora.adapter).eval())
        Llava.from_pretrained(away).save_pretrained(lora.base)
        lora.assert_same(AutoModelForImageTextToText.from_pretrained(lora.adapter))
    finally:
        shutil.rmtree(lora.base, ignore_errors=True)
        shutil.move(away, lora.base)


def test_an_adapter_is_trained_on(lora: Trained, tmp_path: Path) -> None:
    """The same parameters are trained as before."""
    model = PeftModel.from_pretrained(Llava.from_pretrained(lora.base), lora.adapter, is_trainable=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == lora.changed.keys()
    before = weights(model)
    llava_training.trainer(tmp_path, model, max_steps=1, learning_rate=0.02).train()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == lora.changed.keys()


# --- merged


def test_a_merged_model_is_the_adapter_and_any_other_checkpoint(lora: Trained, tmp_path: Path) -> None:
    """Same logits and tokens; the base model's names; the tower and the embeddings are unchanged."""
    loaded = PeftModel.from_pretrained(Llava.from_pretrained(lora.base), lora.adapter)
    merged = loaded.merge_and_unload().eval()
    lora.assert_same(merged, atol=1e-5)
    merged.save_pretrained(tmp_path)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lora.assert_same(model, atol=1e-5)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(body) is VlmLlavaModel
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = (load_file(folder / "model.safetensors") for folder in (lora.base, tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {saved_name(name).removeprefix("base_model.model.").split(".lora_")[0] for name in lora.changed}
    assert {name.removesuffix(".weight") for name in changed} == {name.removesuffix(".weight") for name in trained}


def test_a_merged_copy_does_not_need_the_model_that_was_trained(lora: Trained) -> None:
    """The trainer leaves nothing on the model that its copies would share."""
    merged = copy.deepcopy(lora.model).merge_and_unload()
    trained = weights(lora.model)
    with torch.no_grad():
        for parameter in lora.model.parameters():
            parameter.zero_()
    logits = lora.logits_of(merged)
    lora.model.load_state_dict(trained, strict=False)
    torch.testing.assert_close(logits, lora.logits, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("llm", ["llama, tied", "qwen2", "opt", "gemma2"])
def test_other_llms_and_towers_are_adapted_and_merged(llm: str, tmp_path: Path) -> None:
    lora = Trained(tmp_path, anyres=False, llm=llm, vision_config=tiny_llava.tower("clip").config)
    lora.assert_same(AutoModelForImageTextToText.from_pretrained(lora.adapter))
    merged = PeftModel.from_pretrained(Llava.from_pretrained(lora.base), lora.adapter).merge_and_unload().eval()
    lora.assert_same(merged, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    lora.assert_same(model, atol=1e-5)
    is_tied = llm in ("llama, tied", "gemma2", "opt")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied


# --- stopped and resumed


def states(folder: Path, step: int) -> list:
    """Weights, optimiser, schedule and random states of a checkpoint."""
    checkpoint = folder / f"checkpoint-{step}"
    (file,) = checkpoint.glob("*model.safetensors")
    others = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    return [load_file(file), *(torch.load(path, weights_only=False) for path in others)]


@pytest.mark.parametrize("name", llava_resume.RUNS)
def test_a_stopped_run_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    """From the fourth of six steps, in the second epoch: with dropout and accumulation, to the last bit.

    What is trained is noise when the run is resumed: all of it comes from the checkpoint.
    """
    whole = llava_resume.trainer(tmp_path / "whole", name)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = llava_resume.trainer(tmp_path / "resumed", name)
    assert not equal(weights(resumed.model), weights(whole.model))
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "resumed"))
    assert equal(weights(resumed.model), weights(whole.model))
    assert curve(tmp_path / "resumed" / "checkpoint-6") == curve(tmp_path / "whole" / "checkpoint-6")
    for found, expected in zip(states(tmp_path / "resumed", 6), states(tmp_path / "whole", 6), strict=True):
        assert equal(found, expected)
    earlier, later = states(tmp_path / "whole", 4), states(tmp_path / "whole", 6)
    changed = {key for key in later[0] if not torch.equal(earlier[0][key], later[0][key])}
    assert any("projector.newline" in key for key in changed)
    parts = {part for part in PARTS if any(f".{part}." in key for key in changed)}
    assert parts == set(STAGES[llava_resume.RUNS[name][0]].rates)
    assert not torch.equal(earlier[-1]["cpu"], later[-1]["cpu"])  # dropout and order have drawn numbers


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "scripts.llava_resume", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", llava_resume.DEATHS)
def test_a_killed_run_goes_on_to_the_same_weights(name: str, killed: Path) -> None:
    """With worker processes that read the rows."""
    codes, whole = json.loads((killed / "codes.json").read_text()), name.split(",")[0]
    assert codes[whole] == [0]
    assert codes[name] == [-9, 0]
    assert curve(killed / name / "checkpoint-6") == curve(killed / whole / "checkpoint-6")
    for found, expected in zip(states(killed / name, 6), states(killed / whole, 6), strict=True):
        assert equal(found, expected)
