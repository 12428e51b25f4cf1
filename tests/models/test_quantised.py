"""Every family in 8 and 4 bits by bitsandbytes, which runs on a CPU: load, generate, save, load, train a LoRA step."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from cases import tiny, tiny_blip2, tiny_llava
from cases.case import Inputs
from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmClipModel,
    VlmInstructBlipForConditionalGeneration,
    VlmLlavaForConditionalGeneration,
)
from hf_vlm.models.casting import cast_for
from hf_vlm.training.lora import add_lora

pytest.importorskip("bitsandbytes", reason="pip install hf-vlm[quantise]")

Llava = VlmLlavaForConditionalGeneration
KINDS = ["8 bits", "4 bits"]
# bitsandbytes packs weights on a CPU in blocks of 64 inputs and 32 outputs.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
CLOSE = {"8 bits": 0.98, "4 bits": 0.9}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def options(kind: str, **more) -> BitsAndBytesConfig:
    if kind == "8 bits":
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    # Without double quantisation, bitsandbytes 0.50 loses the scales of a model that it saves after use on some CPUs.
    more = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **more}
    return BitsAndBytesConfig(load_in_4bit=True, **more)


def llm(name: str = "llama", **more) -> PreTrainedConfig:
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 128} if name == "t5" else {**WIDE, "head_dim": 32}
    return tiny_blip2.llm_config(name, **{**sizes, **more})


def clip(native: bool) -> VlmClipModel:
    if not native:
        return VlmClipModel(tiny.clip_config(vision=WIDE, text=WIDE, projection_dim=64))
    vision = CLIPVisionConfig(**tiny.layer_sizes(64, image_size=tiny.IMAGE_SIZE, patch_size=8))
    text = CLIPTextConfig(**tiny.layer_sizes(64, heads=2), **tiny.TOKENS)
    return VlmClipModel.from_parts(CLIPVisionModel(vision), CLIPTextModel(text), projection_dim=64)


def blip(head: type[PreTrainedModel]) -> PreTrainedModel:
    return head(tiny.blip_config(vision=WIDE, text=WIDE, projection_dim=64, **head.layout))


def blip2(head: type[PreTrainedModel], name: str | None = None) -> PreTrainedModel:
    more = {} if name is None else {"text_config": llm(name)}
    instruct = head is VlmInstructBlipForConditionalGeneration
    qformer = {**WIDE, "memory_size": 64}
    return head(tiny_blip2.blip2_config(name, WIDE, qformer, instruct, projection_dim=64, **more))


def llava(anyres: bool = False) -> Llava:
    vision = tiny.tower_config(**WIDE)
    return Llava(tiny_llava.llava_config(anyres, vision_config=vision, text_config=llm(vocab_size=64)))


def answers() -> Inputs:
    tokens = tiny.blip_tokens()
    return {**tiny.blip_inputs(), "decoder_input_ids": tokens["input_ids"][:, :4]}


def second_stage(instruct: bool = False) -> Inputs:
    return tiny_blip2.stage2_inputs(padding_side="left", instruct=instruct)


def pair_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**inputs, return_loss=True).loss


def text_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if "decoder_input_ids" in inputs:
        labels, inputs = inputs["decoder_input_ids"], {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    return model(**inputs, labels=labels).loss


def llm_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return model(**tiny_blip2.labelled(model, inputs)).loss


def llava_loss(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    return model(**tiny_llava.with_labels(inputs)).loss


FAMILIES: dict[str, tuple[Callable, Callable, Callable]] = {
    "clip": (lambda: clip(native=False), tiny.clip_inputs, pair_loss),
    "clip, native towers": (lambda: clip(native=True), tiny.clip_inputs, pair_loss),
    "blip, pretraining": (lambda: blip(VlmBlipForPreTraining), tiny.blip_inputs, pair_loss),
    "blip, retrieval": (lambda: blip(VlmBlipForImageTextRetrieval), tiny.blip_inputs, pair_loss),
    "blip, captions": (lambda: blip(VlmBlipForConditionalGeneration), tiny.blip_inputs, text_loss),
    "blip, answers": (lambda: blip(VlmBlipForQuestionAnswering), answers, text_loss),
    "blip2, pretraining": (lambda: blip2(VlmBlip2ForPreTraining), tiny_blip2.stage1_inputs, pair_loss),
    "blip2, retrieval": (lambda: blip2(VlmBlip2ForImageTextRetrieval), tiny_blip2.stage1_inputs, pair_loss),
    "blip2": (lambda: blip2(VlmBlip2ForConditionalGeneration, "llama"), second_stage, llm_loss),
    "blip2, t5": (
        lambda: blip2(VlmBlip2ForConditionalGeneration, "t5"),
        lambda: {**second_stage(), "decoder_input_ids": tiny.tokens()["input_ids"]},
        llm_loss,
    ),
    "instructblip": (
        lambda: blip2(VlmInstructBlipForConditionalGeneration, "llama"),
        lambda: second_stage(instruct=True),
        llm_loss,
    ),
    "llava": (llava, tiny_llava.llava_inputs, llava_loss),
    "llava, anyres": (lambda: llava(anyres=True), lambda: tiny_llava.llava_inputs(True), llava_loss),
}


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Floating-point outputs, with zeros at padded positions, whose states are arbitrary."""
    found = {name: value for name, value in model(**inputs).items() if torch.is_tensor(value)}
    if (mask := inputs.get("attention_mask")) is not None:
        found = {k: v * mask[..., None] if v.shape[:2] == mask.shape and v.ndim == 3 else v for k, v in found.items()}
    return found


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(F.cosine_similarity(found.flatten(), expected.flatten(), dim=0))


def assert_reloaded(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: str) -> None:
    """Equal in 8 bits; in 4 bits, bitsandbytes quantises the scales again when it saves a model after use on a CPU."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]) or (kind == "4 bits" and cosine(value, expected[name]) > 0.999), name


def is_quantised(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


FAST = ("clip", "blip, retrieval", "blip2", "llava")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
def test_a_quantised_model_is_close_saved_loaded_and_adapted(family: str, kind: str, tmp_path: Path) -> None:
    build, make, loss = FAMILIES[family]
    torch.manual_seed(0)
    model, inputs = tiny.randomise(build(), std=0.1), make()
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path / "full")
    quantised = type(model).from_pretrained(tmp_path / "full", quantization_config=options(kind))
    assert sum(is_quantised(module) for module in quantised.modules()) > 8
    found = outputs_of(quantised, inputs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert cosine(value, expected[name]) >= CLOSE[kind], name
    quantised.save_pretrained(tmp_path / "small")
    loaded, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_reloaded(outputs_of(loaded, inputs), found, kind)
    if model.can_generate():
        prompts = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        tokens = [each.generate(**prompts, **GREEDY) for each in (quantised, loaded)]
        assert torch.equal(*tokens)
    # A fresh model, because bitsandbytes packs the weights of a layer that is used in eval mode on a CPU, for good.
    fresh = type(model).from_pretrained(tmp_path / "full", quantization_config=options(kind))
    assert_a_lora_step_trains(fresh, loss, inputs)


def assert_a_lora_step_trains(model: PreTrainedModel, loss: Callable, inputs: Inputs) -> None:
    """Of every quantised layer that an output depends on."""
    layers = [name for name, module in model.named_modules() if is_quantised(module)]
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=layers)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    first = loss(adapted.get_base_model(), inputs)
    first.backward()
    unused = ("vision_model.layers.1", "qformer")  # LLaVA's last layer of the tower; the text branch of a Q-Former
    lacking = [name for name, value in trained.items() if value.grad is None and not any(p in name for p in unused)]
    assert lacking == []
    assert sum(value.grad is not None for value in trained.values()) > len(trained) / 2
    optimizer.step()
    assert loss(adapted.get_base_model(), inputs).isfinite()
    after = dict(adapted.unload().named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def loss_of_quantising(model: PreTrainedModel, inputs: Inputs, kind: str, folder: Path) -> float:
    """Relative to the norm of the logits."""
    model.save_pretrained(folder)
    quantised = type(model).from_pretrained(folder, quantization_config=options(kind))
    found, expected = (outputs_of(each, inputs)["logits"] for each in (quantised, model))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_llava_loses_as_much_as_the_native_model(kind: str, tmp_path: Path) -> None:
    """On transformers' tower, so that both quantise the same matrices."""
    torch.manual_seed(0)
    sizes = {"image_size": tiny.IMAGE_SIZE, "patch_size": 8}
    vision = CLIPVisionConfig(**tiny.layer_sizes(64, **sizes))
    config = LlavaConfig(vision_config=vision, text_config=llm(vocab_size=64), image_token_index=tiny_llava.IMAGE)
    native = tiny.randomise(LlavaForConditionalGeneration(config), std=0.1)
    native_llm = AutoModelForCausalLM.from_config(config.text_config)
    own = Llava.from_parts(native.model.vision_tower, native_llm, tiny_llava.IMAGE)
    weights = native.state_dict()
    own.load_state_dict({name: weights[tiny_llava.native_name(name)] for name in own.state_dict()})
    input_ids = torch.randint(1, 40, (3, 24))
    input_ids[:, 2:18] = tiny_llava.IMAGE
    inputs = {"input_ids": input_ids, "pixel_values": tiny.pixels(3), "attention_mask": torch.ones_like(input_ids)}
    torch.testing.assert_close(outputs_of(own, inputs)["logits"], outputs_of(native, inputs)["logits"])
    ours = loss_of_quantising(own, inputs, kind, tmp_path / "own")
    theirs = loss_of_quantising(native, inputs, kind, tmp_path / "native")
    assert 0.0 < ours <= 1.1 * theirs


def test_a_quantised_module_is_not_trained_in_full(tmp_path: Path) -> None:
    """LoRA's recipes train the projector in full, which must therefore be left out of quantisation."""
    llava().save_pretrained(tmp_path)
    whole = Llava.from_pretrained(tmp_path, quantization_config=options("8 bits"))
    with pytest.raises(ValueError, match=r'llm_int8_skip_modules=\["model.projector", '):
        add_lora(whole, r=2, alpha=4)
    kept = options("4 bits", llm_int8_skip_modules=["model.projector", "model.vision_model", "lm_head"])
    adapted = add_lora(Llava.from_pretrained(tmp_path, quantization_config=kept), r=2, alpha=4).train()
    llava_loss(adapted, tiny_llava.llava_inputs()).backward()
    trained = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
    assert any("projector" in name for name in trained)
    assert all(gradient is not None for gradient in trained.values())


@pytest.mark.parametrize("kind", [pytest.param("8 bits", marks=pytest.mark.slow), "4 bits"])
@pytest.mark.parametrize(
    "family",
    ["blip2", "llava", "clip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("blip2, t5", "instructblip"))],
)
def test_a_model_with_a_quantised_part_is_saved_and_loaded(family: str, kind: str, tmp_path: Path) -> None:
    """Only the LLM (or CLIP's image tower) is quantised when it is loaded; loading the whole needs no options."""
    torch.manual_seed(0)
    build, make, _ = FAMILIES[family]
    whole, inputs = tiny.randomise(build(), std=0.1), make()
    body = whole.base_model
    part = body.vision_model if family == "clip" else body.language_model
    part.save_pretrained(tmp_path / "part")
    quantised = type(part).from_pretrained(tmp_path / "part", quantization_config=options(kind))
    if family == "clip":
        model = VlmClipModel.from_parts(quantised, whole.text_model, projection_dim=64)
    elif family == "llava":
        model = Llava.from_parts(body.vision_model, quantised, tiny_blip2.IMAGE_TOKEN_ID)
    else:
        model = type(whole)(copy.deepcopy(whole.config), quantised)
        own = {name: value for name, value in whole.state_dict().items() if "language_model." not in name}
        model.load_state_dict(own, strict=False)
    model.eval()
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path / "whole")
    assert not hasattr(model.config, "quantization_config")
    for loader in {type(model), AutoModel}:
        loaded, info = loader.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        kinds = {name: is_quantised(module) for name, module in model.base_model.named_modules()}
        assert {name: is_quantised(module) for name, module in loaded.base_model.named_modules()} == kinds
        if loader is not AutoModel:
            assert_reloaded(outputs_of(loaded, inputs), expected, kind)


def test_states_are_cast_to_what_a_layer_computes_in() -> None:
    states = torch.zeros(1, 64)
    layer = nn.Linear(64, 64).to(torch.bfloat16)
    assert cast_for(layer, states).dtype == torch.bfloat16
    assert cast_for(nn.Identity(), states).dtype == torch.float32
    layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
    layer.bias = None
    assert cast_for(layer, states).dtype == torch.float32
