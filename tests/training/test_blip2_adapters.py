"""Adapters of BLIP-2 and InstructBLIP, loaded as users of the Hub load them: by Auto class, by their own, or later."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from cases import tiny_blip2
from hf_vlm import VlmBlip2ForConditionalGeneration, VlmInstructBlipForConditionalGeneration
from hf_vlm.training.lora import add_lora

HEADS = [VlmBlip2ForConditionalGeneration, VlmInstructBlipForConditionalGeneration]


@pytest.fixture(params=HEADS, ids=["blip2", "instructblip"])
def adapter(request, tmp_path):
    """The head, an adapter whose every weight is random, and its folder; the base is in the folder `base`."""
    torch.manual_seed(0)
    base = tiny_blip2.blip2_model(request.param, "llama")
    base.save_pretrained(tmp_path / "base")
    adapted = add_lora(request.param.from_pretrained(tmp_path / "base"), r=2, alpha=4)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    return request.param, adapted, tmp_path / "adapter"


def inputs_of(head: type[PreTrainedModel]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # for the images
    made = tiny_blip2.stage2_inputs(padding_side="left")
    if head is VlmInstructBlipForConditionalGeneration:
        made |= {"qformer_input_ids": torch.tensor([[2, 7, 9, 3]] * len(made["input_ids"]))}
    return made


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, head: type[PreTrainedModel]) -> torch.Tensor:
    made = inputs_of(head)
    return model(**made).logits[made["attention_mask"].bool()]


@pytest.mark.parametrize("way", ["auto", "class", "later"])
def test_an_adapter_is_loaded_with_its_weights(adapter, way):
    head, adapted, folder = adapter
    expected = logits_of(adapted, head)
    assert (expected - logits_of(head.from_pretrained(folder.parent / "base"), head)).abs().max() > 0.1
    if way == "later":
        model = head.from_pretrained(folder.parent / "base")
        info = model.load_adapter(str(folder))
        assert not info.missing_keys
        assert not info.unexpected_keys
    else:
        loader = AutoModelForImageTextToText if way == "auto" else head
        model = loader.from_pretrained(folder)
    assert type(model) is head
    torch.testing.assert_close(logits_of(model.eval(), head), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("way", ["auto", "class"])
def test_an_adapter_in_a_subfolder_is_found(adapter, way):
    """As transformers has it: what is in `adapter_kwargs` is the adapter's, all else also its base's."""
    head, adapted, folder = adapter
    loader = AutoModelForImageTextToText if way == "auto" else head
    model = loader.from_pretrained(folder.parent, adapter_kwargs={"subfolder": folder.name})
    assert type(model) is head
    torch.testing.assert_close(logits_of(model.eval(), head), logits_of(adapted, head), rtol=0.0, atol=0.0)


def test_an_adapter_whose_base_is_stored_without_its_llm_is_refused(adapter):
    head, _, folder = adapter
    config = AutoConfig.from_pretrained(folder.parent / "base")
    config.excludes_language_model = True
    config.save_pretrained(folder.parent / "base")
    with pytest.raises(ValueError, match="stored without its LLM: load the base first"):
        head.from_pretrained(folder)
