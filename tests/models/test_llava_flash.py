"""Packed rows with flash attention: transformers' own path to it, with the kernels done by torch on the CPU."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from cases.case import calls_of
from hf_vlm import VlmLlavaForConditionalGeneration
from hf_vlm.training import sft
from hf_vlm.training.sft import check_packing
from scripts import llava_training


def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """`flash_attn_func`: `(batch, length, heads, width)`."""
    q, k, v = (states.transpose(1, 2) for states in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return attended.transpose(1, 2)


def ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """`flash_attn_varlen_func`: `(tokens, heads, width)` of samples one after the other."""
    lengths = cu_seqlens_q.diff().tolist()
    samples = zip(*(states[None].split(lengths, dim=1) for states in (q, k, v)), strict=True)
    return torch.cat([dense(*sample, softmax_scale=softmax_scale, causal=causal) for sample in samples], dim=1)[0]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an attention that goes transformers' way to flash attention."""
    name = "flash_on_cpu"
    AttentionInterface.register(name, flash_attention_forward)
    AttentionMaskInterface.register(name, flash_attention_mask)
    kernels = (dense, ragged, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return name


def step(model: VlmLlavaForConditionalGeneration, inputs: dict) -> dict[str, torch.Tensor]:
    """States, loss and gradients."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"states": output.last_hidden_state.detach(), "loss": output.loss.detach(), **found}


@pytest.mark.parametrize("anyres", [False, True])
def test_several_packed_rows_are_those_of_sdpa(anyres: bool, flash: str) -> None:
    collator = llava_training.collator(anyres, packed=True)
    inputs = collator(llava_training.rows())
    assert len(inputs["input_ids"]) > 1
    model = llava_training.staged("llava-1.5-instruct", anyres=anyres)
    wanted = step(model, inputs)
    model.model.language_model.set_attn_implementation(flash)
    check_packing(model)
    with calls_of(model.model.language_model.base_model) as calls:
        found = step(model, inputs)
    assert len(calls) == 1
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_packing_is_tried_as_the_model_will_run(flash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the precision of the training; and flash attention only where it has kernels."""
    tried = []
    monkeypatch.setattr(sft, "check_packing", lambda model: tried.append(torch.is_autocast_enabled("cpu")))
    model = llava_training.staged("llava-1.5-instruct")
    for bf16 in ("true", "false"):
        llava_training.trainer(tmp_path, model, data_collator=llava_training.collator(packed=True), bf16=bf16)
    llava_training.trainer(tmp_path, model, data_collator=llava_training.collator())
    assert tried == [True, False]
    model.model.language_model.set_attn_implementation(flash)
    llava_training.trainer(tmp_path, model, data_collator=llava_training.collator(packed=True))
    assert tried == [True, False]
