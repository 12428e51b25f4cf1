"""BLIP between layouts, heads and image sizes: the same outputs, exactly, or one line that says why not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipProcessor,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from cases import tiny
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipModel,
    VlmBlipProcessor,
)
from hf_vlm.hub.convert import (
    convert_folder,
    from_original,
    from_transformers,
    processor_from_transformers,
    processor_to_transformers,
    to_transformers,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RECORDED = Path(__file__).parents[1] / "data" / "blip_pretrain" / "lavis_state.safetensors"
PRETRAINING, RETRIEVAL = VlmBlipForPreTraining, VlmBlipForImageTextRetrieval
CAPTIONS, ANSWERS = VlmBlipForConditionalGeneration, VlmBlipForQuestionAnswering
HEADS = [PRETRAINING, RETRIEVAL, CAPTIONS, ANSWERS]
NATIVE = {
    CAPTIONS: BlipForConditionalGeneration,
    ANSWERS: BlipForQuestionAnswering,
    RETRIEVAL: BlipForImageTextRetrieval,
}
# 64 wide, as every published BLIP's heads, which sizes read from tensors presume.
WIDE = {"vision": tiny.layer_sizes(width=64, heads=1), "text": tiny.layer_sizes(width=64, heads=1)}


def refusal(error: type[Exception], call: Callable, *args, **kwargs) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def head_inputs(head: type[PreTrainedModel], size: int = tiny.IMAGE_SIZE) -> dict[str, torch.Tensor]:
    inputs = tiny.blip_inputs(size=size)
    return inputs | ({"decoder_input_ids": inputs["input_ids"][:, :4]} if head is ANSWERS else {})


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a head computes where texts are not padding."""
    found = model(**inputs)
    result = {
        name: found[name] for name in ("itm_logits", "image_embeds", "text_embeds") if found.get(name) is not None
    }
    if found.logits is not None:
        mask = inputs.get("decoder_input_ids", inputs["attention_mask"]) > 0
        result["logits"] = found.logits[mask]
    return result


def assert_same_outputs(first: PreTrainedModel, second: PreTrainedModel, size: int = tiny.IMAGE_SIZE) -> None:
    inputs = head_inputs(type(first), size)
    found, expected = outputs(first, inputs), outputs(second, inputs)
    assert found.keys() == expected.keys() != set()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def native(native_class: type[PreTrainedModel], tie: bool = False, **vision) -> PreTrainedModel:
    text = {"vocab_size": len(tiny.BLIP_VOCABULARY), "encoder_hidden_size": 24, "max_position_embeddings": 16}
    text |= {"bos_token_id": tiny.DEC, "eos_token_id": tiny.SEP, "sep_token_id": tiny.SEP, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**tiny.layer_sizes(width=24, heads=2), **text, "tie_word_embeddings": tie},
        vision_config={**tiny.layer_sizes(width=24, heads=2), "image_size": 32, "patch_size": 8, **vision},
        image_text_hidden_size=16,
        tie_word_embeddings=tie,
    )
    return tiny.randomise(native_class(config))


# --- transformers


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("head", NATIVE)
def test_there_and_back(head: type[PreTrainedModel], tie: bool) -> None:
    theirs = native(NATIVE[head], tie)
    ours = from_transformers(theirs)
    assert type(ours) is head
    assert not ours.training
    back = to_transformers(ours)
    assert type(back) is NATIVE[head]
    state, returned = theirs.state_dict(), back.state_dict()
    # The same number in two places; transformers does not keep them equal when all parameters are redrawn.
    bias = "text_decoder.cls.predictions.bias"
    if bias in state:
        state[bias] = state["text_decoder.cls.predictions.decoder.bias"]
    state.pop("logit_scale", None)
    returned.pop("logit_scale", None)
    assert state.keys() == returned.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, returned[name])] == []
    assert back.config.text_config.tie_word_embeddings == (tie and head is not RETRIEVAL)
    again = from_transformers(back)
    assert_same_weights(again, ours)
    assert_same_outputs(again, ours)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("head", NATIVE)
def test_ours_as_native(head: type[PreTrainedModel], tie: bool, tmp_path: Path) -> None:
    """Also from a checkpoint of the pretraining head, which contains this head's weights."""
    options = {"vision": tiny.layer_sizes(width=24, heads=3)}
    pretrained = tiny.blip_model(PRETRAINING, tie_word_embeddings=tie, **options)
    pretrained.save_pretrained(tmp_path)
    models = [tiny.blip_model(head, tie_word_embeddings=tie and head is not RETRIEVAL, **options)]
    models.append(head.from_pretraining(pretrained).eval())
    if head is not ANSWERS:
        models.append(head.from_pretrained(tmp_path))
    for ours in models:
        theirs = to_transformers(ours)
        assert type(theirs) is NATIVE[head]
        assert_same_outputs(from_transformers(theirs), ours)


def test_conversion_copies_in_dtype() -> None:
    theirs = native(BlipForConditionalGeneration).to(torch.bfloat16)
    ours = from_transformers(theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ours.model.vision_model.layers[0].attn.qkv.weight.zero_()
    assert theirs.vision_model.encoder.layers[0].self_attn.qkv.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.blip_model(PRETRAINING), "transformers has no class for VlmBlipForPreTraining"),
        (lambda: tiny.blip_model(CAPTIONS, vision={"layout": "clip"}), "use_patch_bias|use_pre_norm|final_norm"),
        (lambda: tiny.blip_model(RETRIEVAL, vision_pooling="mean"), "vision_pooling"),
        (
            lambda: tiny.blip_model(ANSWERS),
            "the same hidden_size for image tower and text, but this model has 32 and 24",
        ),
    ],
)
def test_refused_to_transformers(make: Callable, message: str) -> None:
    assert re.search(message, refusal(ValueError, to_transformers, make()))


def test_refused_from_transformers() -> None:
    config = native(BlipForImageTextRetrieval).config
    assert "BlipModel cannot be converted" in refusal(ValueError, from_transformers, BlipModel(config))


def test_folders_with_processors(tmp_path: Path) -> None:
    theirs = native(BlipForConditionalGeneration)
    theirs.save_pretrained(tmp_path / "native")
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, tiny.blip_tokenizer()).save_pretrained(tmp_path / "native")
    convert_folder(tmp_path / "native", tmp_path / "ours", to="hf_vlm")
    ours = CAPTIONS.from_pretrained(tmp_path / "ours")
    assert_same_outputs(ours, from_transformers(theirs))
    processor = VlmBlipProcessor.from_pretrained(tmp_path / "ours")
    picture = tiny.image()
    found = processor(images=[picture], text=["a red cat", "tree"])
    native_processor = BlipProcessor.from_pretrained(tmp_path / "native", backend="pil")
    expected = native_processor(images=[picture], text=["a red cat", "tree"], padding=True, return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    convert_folder(tmp_path / "ours", tmp_path / "back", to="native")
    back = BlipForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert_same_outputs(from_transformers(back), ours)
    returned = processor_to_transformers(processor_from_transformers(native_processor))
    assert torch.equal(returned(images=[picture], return_tensors="pt")["pixel_values"], expected["pixel_values"])


# --- the original layout


def original(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = load_file(RECORDED) | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def parts(state: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def small_config(**options):
    """The config of the recorded weights, whose heads are 8 and 6 wide: no shape says so."""
    return tiny.blip_config(
        vision=tiny.layer_sizes(width=24, intermediate_size=96, layer_norm_eps=1e-6),
        text={
            **tiny.layer_sizes(),
            "vocab_size": 94,
            "bos_token_id": 92,
            "enc_token_id": 93,
            "max_position_embeddings": 64,
        },
        **options,
    )


TASKS = {
    PRETRAINING: ("",),
    RETRIEVAL: ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head", "temp"),
    CAPTIONS: ("visual_encoder.", "text_decoder."),
}


@pytest.mark.parametrize("head", TASKS)
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_original_layout_of_every_task(head: type[PreTrainedModel], form: str, tmp_path: Path) -> None:
    """The head shows in the names; of one file, the heads compute the same where they overlap."""
    state = parts(original(), *TASKS[head])
    path = tmp_path / f"weights.{form}"
    if form == "pth":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    config = small_config(**{**head.layout, "tie_word_embeddings": head is not RETRIEVAL})
    model = from_original(path, config=config)
    assert type(model) is head
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    whole = from_original(RECORDED, config=small_config(tie_word_embeddings=True))
    assert_same_outputs(model, head.from_pretraining(whole).eval())


def test_original_layout_of_question_answering() -> None:
    """Encoder and decoder differ, the decoder looks at texts; the sizes come from the shapes."""
    model = tiny.blip_model(ANSWERS, **WIDE)
    state = to_transformers(model).state_dict()
    text = {n: t for n, t in state.items() if n.startswith("text_")}
    text |= visual_of(model)
    found = from_original(text)
    assert type(found) is ANSWERS
    assert found.config.vision_config.image_size == 32
    assert_same_outputs(found, model)
    assert_same_weights(found, model)


def visual_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The image tower in the names of the original code."""
    names = {"layers.": "blocks.", "post_norm.": "norm.", "embeddings.patch_embedding.": "patch_embed.proj."}
    state = {}
    for name, tensor in model.model.vision_model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"visual_encoder.{name}"] = tensor
    state["visual_encoder.cls_token"] = state.pop("visual_encoder.embeddings.class_embedding").view(1, 1, -1)
    state["visual_encoder.pos_embed"] = state.pop("visual_encoder.embeddings.position_embedding.weight")[None]
    return state


def test_original_layout_at_another_image_size() -> None:
    config = small_config(tie_word_embeddings=True)
    model, larger = from_original(original(), config=config), from_original(original(), config=config, image_size=48)
    assert larger.config.vision_config.image_size == larger.model.vision_model.config.image_size == 48
    inputs = tiny.blip_inputs(size=48)
    with torch.no_grad():
        found, expected = larger(**inputs), model(**inputs, interpolate_pos_encoding=True)
    torch.testing.assert_close(found.itm_logits, expected.itm_logits, **CLOSE)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, **CLOSE)


def test_original_layout_that_does_not_fit() -> None:
    config = small_config(tie_word_embeddings=True)
    missing = original(**{"visual_encoder.norm.weight": None})
    assert "missing: model.vision_model.post_norm.weight" in refusal(ValueError, from_original, missing, config=config)
    more = original(**{"text_encoder.pooler.dense.weight": torch.zeros(3)})
    assert "unexpected: " in refusal(ValueError, from_original, more, config=config)
    shape = original(**{"itm_head.weight": torch.zeros(2, 31)})
    assert "wrong shape: itm_head.weight (2, 31)" in refusal(ValueError, from_original, shape, config=config)
    name = "text_decoder.bert.encoder.layer.0.output.dense.weight"
    differs = original(**{name: torch.zeros(32, 64)})
    assert "Text encoder and decoder differ in" in refusal(ValueError, from_original, differs, config=config)
    unshared = small_config(tie_word_embeddings=True, share_encoder_decoder=False)
    assert not from_original(differs, config=unshared).model.text_decoder.layers[0].mlp.fc2.weight.any()


# --- AutoModel on every checkpoint


@pytest.mark.parametrize(("shared", "tie"), [(True, False), (False, True)], ids=["shared", "tied words"])
@pytest.mark.parametrize("source", [*HEADS, "native", "original"], ids=str)
def test_automodel_on_every_checkpoint(source: object, tie: bool, shared: bool, tmp_path: Path) -> None:
    """Nothing is missing, only the head's own layers are left over, and the features are those of the head."""
    if source == "native":
        model = from_transformers(native(BlipForConditionalGeneration, tie))
    elif source == "original":
        model = from_original(original(), config=small_config(tie_word_embeddings=True, share_encoder_decoder=shared))
    else:
        options = {} if source is RETRIEVAL else {"tie_word_embeddings": tie}
        model = tiny.blip_model(source, **options, share_encoder_decoder=shared)
    model.save_pretrained(tmp_path)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(body) is VlmBlipModel
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    own = {name.split(".")[0] for name in info["unexpected_keys"]}
    assert own <= {"similarity", "itm_head", "lm_head"}
    assert_same_weights(body, model.model)
    inputs = tiny.blip_inputs()
    with torch.no_grad():
        found, expected = body(**inputs).last_hidden_state, model.model.eval()(**inputs).last_hidden_state
    assert torch.equal(found, expected)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(again, model)
    if body.text_decoder is not None:
        assert (body.text_decoder.owner is body.text_encoder) == body.shares_parts


def test_auto_classes_name_the_heads(tmp_path: Path) -> None:
    tiny.blip_model(PRETRAINING).save_pretrained(tmp_path / "pretraining")
    tiny.blip_model(ANSWERS).save_pretrained(tmp_path / "answers")
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path / "pretraining")) is PRETRAINING
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "pretraining")) is CAPTIONS
    message = refusal(ValueError, AutoModelForImageTextToText.from_pretrained, tmp_path / "answers")
    assert message == 'VlmBlipForConditionalGeneration needs decoder_memory="image": see from_pretraining.'


# --- from one head to another


@pytest.mark.parametrize(("shared", "tie"), [(True, False), (False, True)], ids=["shared", "tied words"])
@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("source", HEADS)
def test_from_one_head_to_another(source, target, shared: bool, tie: bool) -> None:
    options = {"vision": tiny.layer_sizes(width=24, heads=3), "share_encoder_decoder": shared and source is not ANSWERS}
    if source is not RETRIEVAL:
        options["tie_word_embeddings"] = tie
    model = tiny.blip_model(source, **options)
    lacks_encoder = source is CAPTIONS and target is not CAPTIONS
    lacks_decoder = source is RETRIEVAL and target is not RETRIEVAL
    if lacks_encoder or lacks_decoder:
        part = "text_encoder" if lacks_encoder else "text_decoder"
        message = refusal(ValueError, target.from_pretraining, model)
        assert message.startswith(f"{target.__name__} needs ")
        assert part in message
        return
    found = target.from_pretraining(model).eval()
    given, new = model.state_dict(), found.state_dict()
    for name, tensor in new.items():
        if name in given:
            assert torch.equal(tensor, given[name]), name
    for name, tensor in new.items():
        if name.startswith("model.text_decoder.") and name not in given:
            assert torch.equal(tensor, given[name.replace("text_decoder", "text_encoder")]), name
    storages = {tensor.data_ptr() for tensor in given.values()}
    assert not storages & {tensor.data_ptr() for tensor in new.values()}
    if source is target:
        assert_same_outputs(found, model)


@pytest.mark.parametrize("head", HEADS)
def test_from_pretraining_at_another_image_size(head: type[PreTrainedModel], tmp_path: Path) -> None:
    model = tiny.blip_model(PRETRAINING)
    larger = head.from_pretraining(model, image_size=48, label_smoothing=0.0).eval()
    assert model.config.vision_config.image_size == 32
    assert larger.config.vision_config.image_size == larger.model.vision_model.config.image_size == 48
    assert larger.config.label_smoothing == 0.0
    larger.save_pretrained(tmp_path)
    assert_same_outputs(head.from_pretrained(tmp_path), larger, size=48)
    pixel_values = tiny.pixels(2, 48)
    with torch.no_grad():
        found = larger.model.encode_images(pixel_values)
        expected = model.model.encode_images(pixel_values, interpolate_pos_encoding=True)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_image_sizes_that_cannot_be() -> None:
    message = refusal(ValueError, CAPTIONS.from_pretraining, tiny.blip_model(), image_size=50)
    assert message == "Image side 50 must be a multiple of the patch size 8."
    foreign = SiglipVisionConfig(image_size=32, patch_size=8, **tiny.layer_sizes())
    model = tiny.blip_model(vision_config=foreign, vision_pooling="mean")
    assert CAPTIONS.from_pretraining(model, image_size=32).config.vision_config.image_size == 32
    message = refusal(ValueError, CAPTIONS.from_pretraining, model, image_size=48)
    assert message == "A siglip_vision_model tower takes images of 32 pixels, not of 48."


def test_heads_without_their_part() -> None:
    message = refusal(ValueError, CAPTIONS, tiny.blip_config(use_text_decoder=False))
    assert message == "VlmBlipForConditionalGeneration needs a text decoder, but this checkpoint has none."
    message = refusal(ValueError, PRETRAINING, tiny.blip_config(use_text_encoder=False))
    assert message == "VlmBlipForPreTraining needs a text encoder, but this checkpoint has none."
    for head, memory in ((CAPTIONS, "question"), (PRETRAINING, "question"), (ANSWERS, "image")):
        assert "needs decoder_memory=" in refusal(ValueError, head, tiny.blip_config(decoder_memory=memory))


def test_images_of_another_size_in_the_loss() -> None:
    model, inputs = tiny.blip_model().train(), tiny.blip_inputs(size=48)
    resized = PRETRAINING.from_pretraining(model, image_size=48).train()
    found = model(**inputs, return_loss=True, interpolate_pos_encoding=True, sample_seed=0)
    torch.testing.assert_close(found.loss, resized(**inputs, return_loss=True, sample_seed=0).loss, **CLOSE)
    with pytest.raises(ValueError, match="Images of 48x48 pixels do not fit"):
        model(**inputs, return_loss=True)


def test_captions_by_automodel_and_processor(tmp_path: Path) -> None:
    model, processor = tiny.blip_model(CAPTIONS), tiny.blip_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is CAPTIONS
    inputs = processor(images=[tiny.image(seed=0), tiny.image(seed=1)], text=["a red", "the"])
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    found = loaded.generate(**inputs, max_new_tokens=5)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=5))
    texts = processor.batch_decode(found, skip_special_tokens=True)
    assert texts[0].startswith("a red")
    assert texts[1].startswith("the")
