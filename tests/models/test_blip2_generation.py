"""BLIP-2's second stage and InstructBLIP: losses, generation, the chain of stages, the LLM left out, adapters."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import GenerationConfig

from cases import tiny, tiny_blip2
from hf_vlm import VlmBlip2ForConditionalGeneration, VlmInstructBlipForConditionalGeneration
from hf_vlm.models.language_model import cast_weights, hidden_states, load_language_model, logits_of

DECODERS = ["llama", "llama, tied", "opt", "gemma2", "granite", "qwen2", "cohere"]
Stage2 = VlmBlip2ForConditionalGeneration
Instruct = VlmInstructBlipForConditionalGeneration


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_trl_path_are_the_llms_own_cross_entropy(name: str) -> None:
    model = tiny_blip2.blip2_model(Stage2, name)
    inputs = tiny_blip2.stage2_inputs()
    labels = tiny_blip2.prompt_labels(inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        found = model(**inputs, labels=labels).loss
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        ours = logits_of(model.base_model.get_submodule("language_model"), states)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], logits[real], rtol=1e-4, atol=1e-5)


def test_an_unknown_way_to_make_logits_is_refused() -> None:
    llm = tiny_blip2.llm()
    llm.lm_head.register_forward_hook(lambda module, inputs, output: output)
    load_language_model(llm)
    forward = llm.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    llm.forward = scaled
    with pytest.raises(ValueError, match="cannot be reproduced from its hidden states"):
        load_language_model(llm)
    assert hidden_states(llm, input_ids=torch.ones(1, 3, dtype=torch.long)).shape == (1, 3, 20)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_padding_and_accumulation_change_nothing(name: str) -> None:
    model = tiny_blip2.blip2_model(Stage2, name)
    losses = []
    for side in ("left", "right"):
        batch = tiny_blip2.labelled(model, tiny_blip2.stage2_inputs(padding_side=side))
        torch.manual_seed(1)
        batch["pixel_values"] = tiny.pixels()
        losses.append(model(**batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    labels = batch["labels"] if name == "t5" else batch["labels"][:, 1:]
    count = int((labels != -100).sum())
    parts = [
        model(**{key: value[rows] for key, value in batch.items()}, num_items_in_batch=count).loss.item()
        for rows in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    assert sum(parts) == pytest.approx(losses[1], rel=1e-5)
    nothing = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    nothing.backward()
    assert nothing.item() == 0.0
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch, num_items_in_batch=0).loss.item() == 0.0


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("head", "name"), [(Stage2, "llama"), (Stage2, "opt"), (Stage2, "t5"), (Instruct, "llama")])
def test_batched_generation_is_one_by_one(head: type, name: str, beams: int) -> None:
    model = tiny_blip2.blip2_model(head, name, std=0.4)
    inputs = tiny_blip2.stage2_inputs(instruct=head is Instruct)
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    together = model.generate(**inputs, **options)
    assert len({tuple(row) for row in together.tolist()}) > 1
    for row in range(5):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        for names in (("input_ids", "attention_mask"), ("qformer_input_ids", "qformer_attention_mask")):
            if names[0] in one:
                kept = one[names[1]][0].bool()
                one |= {key: one[key][:, kept] for key in names}
        alone = model.generate(**one, **options)[0].tolist()
        expected = together[row].tolist()
        assert expected[: len(alone)] == alone
        assert set(expected[len(alone) :]) <= {tiny.PAD, tiny.END}  # a beam may be filled up with either


def test_generate_takes_a_generation_config() -> None:
    """As transformers' pipelines pass it."""
    model, inputs = tiny_blip2.blip2_model(Stage2, "llama", std=0.4), tiny_blip2.stage2_inputs()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    by_config = model.generate(**inputs, generation_config=GenerationConfig(**options, pad_token_id=tiny.PAD))
    assert by_config.tolist() == model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_frozen_head_gets_contiguous_states(beams: int) -> None:
    """Of a strided state and a frozen matrix, torch makes a product with a copy of the matrix for every row."""
    model = tiny_blip2.blip2_model(Stage2, "opt")
    head, contiguous = model.get_output_embeddings(), []
    assert not head.weight.requires_grad
    head.register_forward_hook(lambda _, inputs, output: contiguous.append(inputs[0].is_contiguous()))
    model.generate(**tiny_blip2.stage2_inputs(), num_beams=beams, min_new_tokens=3, max_new_tokens=3)
    assert contiguous == [True] * 3
    assert not head._forward_pre_hooks


def test_wrong_prompts_are_refused() -> None:
    model, inputs = tiny_blip2.blip2_model(Stage2, "llama"), tiny_blip2.stage2_inputs()
    with pytest.raises(ValueError, match="Prompts are padded on the right"):
        model.generate(**tiny_blip2.stage2_inputs(padding_side="right"))
    for token in (tiny.UNK, tiny_blip2.IMAGE_TOKEN_ID):
        wrong = inputs["input_ids"].clone()
        wrong[
            0, -1 if token == tiny_blip2.IMAGE_TOKEN_ID else (wrong[0] == tiny_blip2.IMAGE_TOKEN_ID).int().argmax()
        ] = token
        with pytest.raises(ValueError, match="put the image token once for each image into the text"):
            model(**{**inputs, "input_ids": wrong})
    with pytest.raises(ValueError, match="leave out qformer_input_ids"):
        model(**tiny_blip2.stage2_inputs(instruct=True))
    with pytest.raises(ValueError, match="pass qformer_input_ids"):
        tiny_blip2.blip2_model(Instruct, "llama")(**inputs)


@pytest.mark.parametrize("by_folder", [False, True], ids=["instances", "folders"])
def test_the_chain_of_stages_keeps_all_weights(by_folder: bool, tmp_path: Path) -> None:
    first, llm = tiny_blip2.blip2_model(), tiny_blip2.llm("llama, tied")
    cast_weights(llm, torch.bfloat16)
    llm.generation_config.eos_token_id = [tiny.END, 5]
    weights = {name: t.clone() for name, t in llm.state_dict().items()}

    def given(model: torch.nn.Module, name: str) -> object:
        if by_folder:
            model.save_pretrained(tmp_path / name)
        return str(tmp_path / name) if by_folder else model

    options = {"dtype": torch.bfloat16} if by_folder else None
    second = Stage2.from_parts(given(first, "one"), given(llm, "llm"), tiny_blip2.IMAGE_TOKEN_ID, options)
    third = Instruct.from_blip2(given(second, "two"))
    for model in (second, third):
        own = model.base_model.state_dict()
        for name, tensor in first.base_model.state_dict().items():
            assert torch.equal(own[name], tensor), name
        body = model.base_model.get_submodule("language_model")
        assert {name: t.dtype for name, t in body.state_dict().items()} == {n: t.dtype for n, t in weights.items()}
        assert all(torch.equal(body.state_dict()[name], tensor) for name, tensor in weights.items())
        assert body.lm_head.weight is body.model.embed_tokens.weight
        assert model.generation_config.eos_token_id == [tiny.END, 5]
        assert model.base_model.vision_norm.weight.dtype == torch.float32
        buffers = {name: buffer.dtype for name, buffer in body.named_buffers()}
        assert set(buffers.values()) == {torch.float32}, buffers  # rotary frequencies
    loss = third.train()(**tiny_blip2.labelled(third, tiny_blip2.stage2_inputs(instruct=True))).loss
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in third.parameters())


def test_instructions_need_a_text_branch_and_an_llm() -> None:
    with pytest.raises(ValueError, match="has no text branch"):
        Instruct.from_blip2(tiny_blip2.blip2_model(Stage2, "llama", qformer={"use_text": False}))
    with pytest.raises(ValueError, match="has no LLM"):
        Instruct.from_blip2(tiny_blip2.blip2_model())


# --- the LLM left out


@pytest.fixture
def hub_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An LLM as the Hub's cache keeps it, `org/llm` at a commit; its snapshot folder."""
    import huggingface_hub.constants as constants

    commit, cache = "a" * 40, Path(constants.HF_HUB_CACHE) / "models--org--llm"
    folder = cache / "snapshots" / commit
    tiny_blip2.llm().save_pretrained(folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    yield folder
    import shutil

    shutil.rmtree(cache, ignore_errors=True)


def test_llm_left_out_of_a_checkpoint(hub_llm: Path, tmp_path: Path) -> None:
    model = tiny.randomise(Stage2.from_parts(tiny_blip2.blip2_model(), "org/llm", tiny_blip2.IMAGE_TOKEN_ID))
    with pytest.raises(ValueError, match=r"The LLM's weights differ from those of org/llm: save without"):
        model.save_pretrained(tmp_path / "changed", exclude_frozen=True)
    model = Stage2.from_parts(tiny_blip2.blip2_model(), "org/llm", tiny_blip2.IMAGE_TOKEN_ID)
    assert model.config.language_model_source == {"id": "org/llm", "revision": "a" * 40}
    model.save_pretrained(tmp_path / "small", exclude_frozen=True)
    model.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < sizes[1]
    inputs = tiny_blip2.stage2_inputs()
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        for options in ({}, {"language_model": str(hub_llm)}):
            loaded, info = Stage2.from_pretrained(tmp_path / "small", output_loading_info=True, **options)
            assert not info["missing_keys"]
            assert torch.equal(loaded(**inputs).logits, expected)
            assert not loaded.config.excludes_language_model
    hub_llm.rename(hub_llm.with_name("gone"))
    with pytest.raises(ValueError, match=r"org/llm, which cannot be loaded: .* pass a local copy") as caught:
        Stage2.from_pretrained(tmp_path / "small")
    assert "\n" not in str(caught.value)


# --- adapters


@pytest.mark.parametrize("head", [Stage2, Instruct])
def test_adapters_of_the_llm_beside_a_trained_qformer(head: type, tmp_path: Path) -> None:
    model = tiny_blip2.blip2_model(head, "llama")
    inputs = tiny_blip2.labelled(model, tiny_blip2.stage2_inputs(instruct=head is Instruct))
    model.save_pretrained(tmp_path / "base")
    saved = ["qformer", "language_projection", "vision_norm"]
    lora = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=saved)
    adapted = get_peft_model(model, lora).train()
    assert not any(module.training for module in model.base_model.vision_model.modules())
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**inputs).loss.backward()
        optimizer.step()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert {part for part in (*saved, "lora_A", "lora_B") if any(part in n for n in changed)} == {
        *saved,
        "lora_A",
        "lora_B",
    }
    inputs.pop("labels")
    with torch.no_grad():
        expected = adapted.eval()(**inputs).logits
        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(head.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
