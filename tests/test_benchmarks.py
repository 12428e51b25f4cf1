"""The speed comparisons: one runs from end to end at a tiny size, and what they count is right."""

import json
import multiprocessing
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.blip2_plain import PlainBlip2
from benchmarks.blip_plain import PlainBlip
from benchmarks.harness import Spread, TrainingStep, _serve, matmul_peak, positive, table
from cases import tiny, tiny_blip2

ROOT = Path(__file__).resolve().parents[1]
ROWS, INPUTS, OUTPUTS = 4, 8, 16


@pytest.mark.slow
def test_clip_runs(tmp_path: Path) -> None:
    output = tmp_path / "made" / "clip.json"
    command = [sys.executable, "benchmarks/clip.py", "--size", "tiny", "--repeats", "2", "--precision", "fp32"]
    command += ["--peers", "transformers", "open_clip", "--device", "cpu", "--threads", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    results = {result["contender"]: result for result in report["results"]}
    # open_clip is not among the packages that the tests need; without it, the run says so and goes on.
    assert {*results, *report["missing"]} == {"hf_vlm", "transformers", "open_clip"}
    assert ("not measured" in run.stdout) == ("open_clip" in report["missing"])
    assert "transformers differs by" in run.stdout
    assert report["settings"]["batch"] == 4
    for name, result in results.items():
        seconds, ratio = result["step_seconds"], result["step_ratio"]
        assert 0 < result["forward_backward_seconds"]["low"] < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert (ratio == {"median": 1.0, "low": 1.0, "high": 1.0}) == (name == "hf_vlm")
        assert result["peak_memory_bytes"] > 2**26
        assert name in run.stdout
    assert 0 < results["hf_vlm"]["flops"] < results["transformers"]["flops"]
    assert results["transformers"]["flops"] < results.get("open_clip", {"flops": float("inf")})["flops"]


@pytest.mark.slow
def test_sources_are_read_by_two_checkouts() -> None:
    command = [sys.executable, "benchmarks/sources.py", "--checkouts", ".", ".", "--rows", "8", "--repeats", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {"rows.csv", "rows.tar, stream", "image folder", "questions, rows.jsonl"} <= {
        line[:24].strip() for line in run.stdout.splitlines()
    }


@pytest.mark.slow
def test_blip_runs(tmp_path: Path) -> None:
    output = tmp_path / "blip.json"
    command = [sys.executable, "benchmarks/blip.py", "--size", "tiny", "--repeats", "1", "--device", "cpu"]
    command += ["--threads", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    steps = {(each["image_size"], each["part"], each["contender"]): each for each in report["steps"]}
    assert len(steps) == 8
    for side in (32, 64):
        own, plain = steps[side, "whole step", "hf_vlm"], steps[side, "whole step", "plain"]
        own_text, plain_text = steps[side, "text side", "hf_vlm"], steps[side, "text side", "plain"]
        # The towers differ by the averaged one's last layer alone, so most of what is saved is of the text side.
        assert 0 < own["flops"] - own_text["flops"] < plain["flops"] - plain_text["flops"]
        assert plain["flops"] - own["flops"] < 1.5 * (plain_text["flops"] - own_text["flops"])
        assert plain_text["flops"] > 2 * own_text["flops"]
        assert plain["last_loss"] == pytest.approx(own["last_loss"], rel=0.02)
        assert 0 < own["differences_fp32"]["itm_logits"] < 1e-5
    assert [each["precision"] for each in report["captions"]] == 4 * ["fp32"] + 4 * ["bf16"]
    for each in report["captions"]:
        assert each["images_per_second"]["low"] > 0
        assert each["different_captions"] == each["batch"] == 2
        assert each["same_tokens"] == 1 or each["precision"] == "bf16"


@pytest.mark.slow
def test_blip2_runs(tmp_path: Path) -> None:
    output = tmp_path / "blip2.json"
    command = [sys.executable, "benchmarks/blip2.py", "--small", "--repeats", "1", "--device", "cpu"]
    command += ["--threads", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    stage1 = {each["contender"]: each for each in report["stage1"]}
    own, uncached, once, plain = stage1.values()
    assert [*stage1] == ["hf_vlm", "hf_vlm, no cache", "plain, queries once", "plain"]
    assert own["flops"] < uncached["flops"] < 1.2 * own["flops"] < once["flops"] < plain["flops"]
    stage2 = [(each["precision"], each["contender"]) for each in report["stage2"]]
    names = ["hf_vlm", "transformers, text logits", "transformers"]
    assert stage2 == [(precision, name) for precision in ("fp32", "bf16") for name in names]
    for own, trimmed, native in (report["stage2"][:3], report["stage2"][3:]):
        assert own["flops"] < trimmed["flops"] < native["flops"] < 1.3 * own["flops"]
        assert native["last_loss"] == pytest.approx(own["last_loss"], rel=0.02)
    for each in report["stage1"] + report["stage2"]:
        assert 0 < each["forward_backward_seconds"]["low"] < each["step_seconds"]["low"]
        assert each["difference_fp32"] < 1e-5
        assert (each["peak_memory_bytes"] is None) == (each["contender"].endswith(("queries once", "text logits")))
    assert [each["precision"] for each in report["captions"]] == 4 * ["fp32"] + 4 * ["bf16"]
    for each in report["captions"]:
        assert each["images_per_second"]["low"] > 0
        assert each["different_captions"] == each["batch"] == 2
        assert each["same_tokens"] == 1 or each["precision"] == "bf16"


@pytest.mark.slow
def test_llava_runs(tmp_path: Path) -> None:
    output = tmp_path / "llava.json"
    command = [sys.executable, "benchmarks/llava.py", "--small", "--repeats", "1", "--device", "cpu"]
    command += ["--threads", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    training = {each["contender"]: each for each in report["training"]}
    assert [*training] == ["hf_vlm", "hf_vlm, padded", "transformers, by length", "transformers"]
    own, padded, grouped, native = training.values()
    assert own["supervised"] < own["tokens"] < own["positions"] < padded["positions"] == native["positions"]
    assert grouped["positions"] < native["positions"]
    assert max(padded["flops"], grouped["flops"]) < native["flops"]
    for each in training.values():
        assert (each["tokens"], each["supervised"]) == (own["tokens"], own["supervised"])
        assert 0 < each["forward_backward_seconds"]["low"] < each["step_seconds"]["low"]
        assert each["tokens_per_second"]["median"] == pytest.approx(each["tokens"] / each["step_seconds"]["median"])
        assert each["difference_fp32"] < 1e-5
        assert each["last_loss"] == pytest.approx(own["last_loss"], rel=0.02)
        assert (each["peak_memory_bytes"] is None) == (each["contender"] == "transformers, by length")
    second_turn = ["hf_vlm", "transformers, cache kept", "transformers"]
    for part, names, batch in (("answers", ["hf_vlm", "transformers"], 2), ("second_turn", second_turn, 1)):
        found = [(each["precision"], each["contender"]) for each in report[part]]
        assert found == [(precision, name) for precision in ("fp32", "bf16") for name in names]
        for each in report[part]:
            assert 0 < each["first_seconds"]["low"] < each["seconds"]["low"]
            assert each["different_answers"] == each["batch"] == batch
            assert each["same_tokens"] == 1 or each["precision"] == "bf16"


def test_plain_blip_computes_the_same() -> None:
    model = tiny.blip_model().train()
    plain = PlainBlip(model.config).train()
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    input_ids = torch.randint(5, tiny.DEC, (5, 7))
    attention_mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [4], [6]])).long()
    batch = {"pixel_values": torch.randn(5, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), "sample_seed": 3, "return_loss": True}
    queue = F.normalize(torch.randn(2, 6, 16), dim=-1)
    outputs = {}
    for each, width in ((model, 7), (plain, 12)):
        each.momentum.queue.add(*queue, torch.full((6,), -1))
        texts = (F.pad(tensor, (0, width - 7)) for tensor in (input_ids, attention_mask))
        outputs[width] = each(input_ids=next(texts), attention_mask=next(texts), **batch)
        outputs[width].loss.backward()
    for name in ("loss_itc", "loss_itm", "loss_lm", "itm_logits", "targets_per_image"):
        torch.testing.assert_close(outputs[12][name], outputs[7][name], rtol=1e-4, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            scale = gradients[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-3 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("recomputes_queries", [True, False])
def test_plain_blip2_computes_the_same(recomputes_queries: bool) -> None:
    model = tiny_blip2.blip2_model().train()
    plain = PlainBlip2(model.config).train()
    plain.load_state_dict(model.state_dict())
    plain.recomputes_queries = recomputes_queries
    inputs = tiny_blip2.stage1_inputs()
    outputs = [model(**inputs, sample_seed=3, return_loss=True), plain(**inputs, sample_seed=3)]
    for output in outputs:
        output.loss.backward()
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm", "itm_logits", "logits_per_image"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=1e-4, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            scale = gradients[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-3 * scale + 1e-7, msg=name)


def linear_step() -> TrainingStep:
    """A linear layer without bias on a fixed batch."""
    model, batch = nn.Linear(INPUTS, OUTPUTS, bias=False), torch.randn(ROWS, INPUTS)
    return TrainingStep(model, lambda: model(batch).square().mean(), "cpu", "fp32")


def test_step_trains_and_times() -> None:
    step = linear_step()
    before = step.model.weight.detach().clone()
    times = step.run()
    assert 0 < times.forward_backward < times.step
    assert not torch.equal(step.model.weight, before)
    assert step.float32_loss() < times.loss


def test_step_uses_bfloat16() -> None:
    layer, dtypes = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    TrainingStep(layer, lambda: layer(torch.ones(1, 2)).float().sum(), "cpu", "bf16").run()
    assert dtypes == [torch.bfloat16]


def test_flops_of_linear() -> None:
    # A product for the outputs and one for the gradient of the weights; the batch needs no gradient.
    assert linear_step().flops() == 2 * (2 * ROWS * INPUTS * OUTPUTS)


class Attention(nn.Module):
    """Attention of a parameter with itself, fused or written out."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused
        self.states = nn.Parameter(torch.randn(1, 2, 5, 8))

    def forward(self) -> torch.Tensor:
        query, key, value = self.states, 2 * self.states, 3 * self.states
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value).sum()
        return ((query @ key.transpose(-1, -2)).softmax(dim=-1) @ value).sum()


def test_flops_of_attention() -> None:
    fused, written_out = Attention(fused=True), Attention(fused=False)
    product = 2 * (2 * 5 * 5 * 8)  # 2 heads, 5 x 5 tokens, 8 wide
    assert TrainingStep(written_out, written_out, "cpu", "fp32").flops() == 6 * product
    # The fused kernel computes the scores again in the backward pass.
    assert TrainingStep(fused, fused, "cpu", "fp32").flops() == 7 * product


def without_package() -> TrainingStep:
    """A contender whose package is missing."""
    raise ImportError("No module named 'peer'")


def test_missing_package_is_reported() -> None:
    pipe, child_pipe = multiprocessing.Pipe()
    _serve(child_pipe, torch.get_num_threads(), without_package, ())
    assert pipe.recv() == "No module named 'peer'"


def test_matmul_peak_is_positive() -> None:
    assert matmul_peak("cpu", "fp32", repeats=1) > 1e8


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_counts_are_positive(text: str) -> None:
    assert positive("12") == 12
    with pytest.raises(ArgumentTypeError, match="at least 1"):
        positive(text)


def test_spread() -> None:
    spread = Spread.of(iter([3.0, 1.0, 2.0, 10.0]))
    assert (spread.median, spread.low, spread.high) == (2.5, 1.0, 10.0)
    assert str(spread) == "2.500 (1.000-10.000)"


def test_table_aligns() -> None:
    assert table(["name", "x"], [["a", "1"], ["longer", "23"]]).splitlines() == [
        "name     x",
        "------  --",
        "a        1",
        "longer  23",
    ]
