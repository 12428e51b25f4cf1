"""BLIP-2 and InstructBLIP between layouts: the same outputs, exactly, or one line that says why not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from torch import nn
from transformers import (
    AutoModel,
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from cases import tiny, tiny_blip2
from hf_vlm import (
    VlmBlip2Config,
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmBlip2Model,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipModel,
)
from hf_vlm.hub.convert import (
    convert_folder,
    from_original,
    from_transformers,
    processor_from_transformers,
    processor_to_transformers,
    to_transformers,
)
from hf_vlm.hub.convert.blip2 import split_qformer
from hf_vlm.hub.convert.blip2_original import NAMES
from hf_vlm.hub.convert.state_dict import rename

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RECORDED = Path(__file__).parents[1] / "data" / "blip2_stage1" / "lavis_state.safetensors"
BLIP2, INSTRUCT, RETRIEVAL = (
    VlmBlip2ForConditionalGeneration,
    VlmInstructBlipForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
)
NATIVE = {
    BLIP2: Blip2ForConditionalGeneration,
    INSTRUCT: InstructBlipForConditionalGeneration,
    RETRIEVAL: Blip2ForImageTextRetrieval,
}
PLACEHOLDER, QUERIES = tiny_blip2.IMAGE_TOKEN_ID, tiny_blip2.QUERIES
TEXT = {"vocab_size": len(tiny_blip2.BERT_VOCABULARY), "max_position_embeddings": tiny.BLIP_LENGTH}
SIZES: dict[str, dict] = {
    "images wider": {},
    "queries look everywhere": {
        "vision": tiny.layer_sizes(48, heads=3, layers=1, patch_size=16, qkv_bias=False, hidden_act="quick_gelu"),
        "qformer": tiny.layer_sizes(40, heads=5, layers=2, cross_attention_frequency=1, hidden_act="gelu_new"),
    },
    "texts wider": {
        "vision": tiny.layer_sizes(16, heads=1, image_size=48, layer_norm_eps=1e-3),
        "qformer": tiny.layer_sizes(24, heads=3, layers=4, cross_attention_frequency=3, layer_norm_eps=1e-3),
    },
}
HEADS_AND_LLMS = [(BLIP2, "opt"), (BLIP2, "t5"), (INSTRUCT, "llama"), (INSTRUCT, "t5")]


def refusal(call: Callable, *args, **kwargs) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def native(head: type[PreTrainedModel], llm: str | None = None, vision=None, qformer=None, llm_options=None, **options):
    """transformers' class for one of our heads, every parameter redrawn."""
    vision = {**tiny.layer_sizes(32), "image_size": 32, "patch_size": 8, **(vision or {})}
    qformer = {**tiny.layer_sizes(24, heads=2, layers=3), **TEXT, **(qformer or {})}
    if head is RETRIEVAL:
        qformer = {"use_qformer_text_input": True, **qformer}
        options = {"image_text_hidden_size": 16, **options}
    else:
        text = tiny_blip2.llm_config(llm, **{"vocab_size": PLACEHOLDER + 1, **(llm_options or {})})
        options = {"text_config": text.to_dict(), "image_token_index": PLACEHOLDER, **options}
    config_class = InstructBlipConfig if head is INSTRUCT else Blip2Config
    config = config_class(vision_config=vision, qformer_config=qformer, num_query_tokens=QUERIES, **options)
    return tiny.randomise(NATIVE[head](config))


def prompts(lengths: tuple[int, ...] = (3, 6, 4)) -> dict[str, torch.Tensor]:
    """Placeholders and texts of several lengths, padded on the left."""
    longest = QUERIES + 1 + max(lengths)
    ids = torch.full((len(lengths), longest), tiny.PAD)
    for row, length in zip(ids, lengths, strict=True):
        words = torch.randint(3, tiny.START, (length,))
        row[-length - 1 - QUERIES :] = torch.cat([torch.full((QUERIES,), PLACEHOLDER), torch.tensor([1]), words])
    return {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long()}


def batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Images with prompts, and for InstructBLIP with instructions padded on the right."""
    inputs = {"pixel_values": tiny.pixels(3, model.config.vision_config.image_size), **prompts()}
    if isinstance(model, INSTRUCT):
        read = tiny.blip_tokens(["a red cat", "two dog on the left", "tree"])
        inputs |= {f"qformer_{name}": tensor for name, tensor in read.items()}
    return inputs


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model with an LLM computes where texts are not padding."""
    if is_seq2seq(model):
        return model(**inputs, decoder_input_ids=torch.tensor([[0, 5, 9], [0, 7, 3], [0, 4, 4]])).logits
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def is_seq2seq(model: PreTrainedModel) -> bool:
    return model.config.text_config.is_encoder_decoder


def written(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """What a model writes after its prompts, with which transformers' class begins its answer."""
    tokens = model.generate(**inputs, max_new_tokens=7, **options)
    is_native = type(model) in NATIVE.values()
    return tokens[:, inputs["input_ids"].shape[1] :] if is_native and not is_seq2seq(model) else tokens


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


# --- transformers' classes with an LLM


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(("head", "llm"), HEADS_AND_LLMS)
def test_logits_and_tokens(head: type[PreTrainedModel], llm: str, sizes: dict) -> None:
    """Prompts of several lengths together; then one by one, without padding; greedily and by beams."""
    theirs = native(head, llm, **sizes)
    ours = from_transformers(theirs)
    assert type(ours) is head
    assert not ours.training
    assert not any(p.requires_grad for p in ours.model.language_model.parameters())
    inputs = batch(ours)
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), **CLOSE)
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 0.5}):
        found = written(ours, inputs, **options)
        assert torch.equal(found, written(theirs, inputs, **options))
    back = to_transformers(ours)
    assert type(back) is type(theirs)
    assert_same_weights(back, theirs)
    assert_same_weights(from_transformers(back), ours)


@pytest.mark.parametrize(("head", "llm"), [(BLIP2, "llama, tied"), (INSTRUCT, "t5"), (BLIP2, "t5")])
def test_tied_words_and_no_rows_added(head: type[PreTrainedModel], llm: str, tmp_path: Path) -> None:
    theirs = native(head, llm, llm_options={"tie_word_embeddings": True})
    ours = from_transformers(theirs)
    for model in (ours, to_transformers(ours)):
        llm_of = model.model.language_model if model is ours else model.language_model
        assert llm_of.get_output_embeddings().weight is llm_of.get_input_embeddings().weight
    theirs.save_pretrained(tmp_path)
    inputs = batch(ours)
    found = logits(from_transformers(tmp_path), inputs)
    torch.testing.assert_close(found, logits(theirs, inputs), **CLOSE)
    assert found.shape[-1] == PLACEHOLDER + 1


@pytest.mark.parametrize(("head", "llm"), [*HEADS_AND_LLMS, (BLIP2, "llama, tied")])
def test_ours_as_native(head: type[PreTrainedModel], llm: str, tmp_path: Path) -> None:
    """With a placeholder past the vocabulary, which gets rows, and the text branch of the first stage."""
    ours = tiny_blip2.blip2_model(head, llm, vision_norm_eps=1e-6)
    assert ours.model.qformer.config.use_text
    theirs = to_transformers(ours)
    theirs.save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path)
    inputs, size = batch(ours), len(tiny.VOCABULARY)
    found = logits(theirs, inputs)
    assert found.shape[-1] == PLACEHOLDER + 1 > size
    torch.testing.assert_close(found[..., :size], logits(ours, inputs), **CLOSE)
    assert torch.equal(written(theirs, inputs), written(ours, inputs))
    for layer in (theirs.language_model.get_input_embeddings(), theirs.language_model.get_output_embeddings()):
        torch.testing.assert_close(layer.weight[size:], layer.weight[:size].mean(dim=0, keepdim=True))
    again = from_transformers(theirs)
    torch.testing.assert_close(logits(again, inputs)[..., :size], logits(ours, inputs), **CLOSE)
    assert ours.model.language_model.get_input_embeddings().num_embeddings == size


def test_generation_options_come_along() -> None:
    theirs = native(BLIP2, "opt")
    theirs.language_model.generation_config.repetition_penalty = 1.7
    ours = from_transformers(theirs)
    assert ours.generation_config.repetition_penalty == 1.7
    assert ours.generation_config is not theirs.language_model.generation_config
    assert to_transformers(ours).language_model.generation_config.repetition_penalty == 1.7


def test_image_of_another_size() -> None:
    theirs = native(BLIP2, "opt")
    ours, inputs = from_transformers(theirs), prompts()
    inputs |= {"pixel_values": tiny.pixels(3, 48), "interpolate_pos_encoding": True}
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), **CLOSE)


def test_half_precision_around_the_qformer() -> None:
    """transformers keeps the Q-Former in float32; copies keep their dtype but where parts meet."""
    theirs = native(BLIP2, "opt").to(torch.bfloat16)
    theirs.qformer.float()
    theirs.query_tokens.data = theirs.query_tokens.data.float()
    ours = from_transformers(theirs)
    kinds = {"vision_model", "language_model"}
    for name, parameter in ours.model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.split(".")[0] in kinds else torch.float32), name
    inputs = batch(ours)
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=0.1, atol=0.1)
    assert_same_weights(to_transformers(ours), theirs)
    with torch.no_grad():
        ours.model.language_model.get_input_embeddings().weight.zero_()
    assert theirs.language_model.get_input_embeddings().weight.abs().max() > 0


# --- retrieval


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_retrieval(sizes: dict, tmp_path: Path) -> None:
    theirs = native(RETRIEVAL, **sizes)
    ours = from_transformers(theirs)
    assert type(ours) is RETRIEVAL
    tokens = tiny.blip_tokens()
    pixel_values = tiny.pixels(5, theirs.config.vision_config.image_size)
    with torch.no_grad():
        found = ours(pixel_values, **tokens)
        matching = theirs(pixel_values, **tokens, use_image_text_matching_head=True).logits_per_image
        contrast = theirs(pixel_values, **tokens, use_image_text_matching_head=False)
    torch.testing.assert_close(found.itm_logits, matching, **CLOSE)
    torch.testing.assert_close(found.image_embeds, contrast.image_embeds, **CLOSE)
    torch.testing.assert_close(found.text_embeds, contrast.text_embeds, **CLOSE)
    similarity = torch.einsum("iqe,te->itq", found.image_embeds, found.text_embeds).amax(dim=-1)
    torch.testing.assert_close(similarity, contrast.logits_per_image, **CLOSE)
    back = to_transformers(ours)
    assert_same_weights(back, theirs)
    back.save_pretrained(tmp_path)
    assert_same_weights(from_transformers(tmp_path), ours)


def test_pretrained_weights_as_native(tmp_path: Path) -> None:
    """Those of a first stage, once they are those of the head for retrieval."""
    first = tiny_blip2.blip2_model(VlmBlip2ForPreTraining, vision_norm_eps=1e-6)
    assert "load the checkpoint as one of" in refusal(to_transformers, first)
    first.save_pretrained(tmp_path)
    theirs = to_transformers(RETRIEVAL.from_pretrained(tmp_path))
    tokens, pixel_values = tiny.blip_tokens(), tiny.pixels(5)
    with torch.no_grad():
        found = theirs(pixel_values, **tokens, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(found, first(pixel_values, **tokens).itm_logits, **CLOSE)


# --- refusals


def ours_with(head: type[PreTrainedModel] = BLIP2, **options) -> Callable:
    llm = None if head is RETRIEVAL else "opt"
    return lambda: tiny_blip2.blip2_model(head, llm, **{"vision_norm_eps": 1e-6, **options})


def foreign_tower() -> PreTrainedModel:
    vision = SiglipVisionConfig(image_size=32, patch_size=8, **tiny.layer_sizes())
    return BLIP2(tiny_blip2.blip2_config("opt", vision_config=vision))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_tower, "vision_config.model_type='siglip_vision_model'; it requires 'vlm_tower'."),
        (ours_with(vision={"use_pre_norm": True}), "vision_config.use_pre_norm=True; it requires False."),
        (ours_with(vision={"use_patch_bias": False}), "vision_config.use_patch_bias=False; it requires True."),
        (
            ours_with(RETRIEVAL, vision={"use_class_token": False, "pooling": "mean"}),
            "vision_config.use_class_token=False; it requires True.",
        ),
        (ours_with(vision={"num_channels": 4}), "vision_config.num_channels=4; it requires 3."),
        (ours_with(INSTRUCT, vision_norm_eps=1e-5), "vision_norm_eps=1e-05; it requires 1e-06."),
    ],
)
def test_refused_to_transformers(make: Callable, message: str) -> None:
    model = make()
    owner = NATIVE[type(model)].__name__
    assert refusal(to_transformers, model) == f"{owner} does not support {message}"


def test_refused_from_transformers() -> None:
    config = native(BLIP2, "opt").config
    assert "Blip2Model cannot be converted" in refusal(from_transformers, Blip2Model(config))
    without = native(BLIP2, "opt", image_token_index=None)
    assert refusal(from_transformers, without).endswith("set image_token_index in its config.")
    half = native(BLIP2, "opt", qformer={"use_qformer_text_input": True})
    assert "does not support qformer_config.use_qformer_text_input=True" in refusal(from_transformers, half)
    half = native(RETRIEVAL, qformer={"use_qformer_text_input": False})
    assert "does not support qformer_config.use_qformer_text_input=False" in refusal(from_transformers, half)


def test_llm_that_is_of_another_class_there(tmp_path: Path) -> None:
    """transformers makes of BART's config, in BLIP-2, a decoder without its encoder."""
    sizes = {"d_model": 20, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 30, "pad_token_id": 1}
    bart = BartConfig(**sizes, **heads)
    ours = BLIP2(tiny_blip2.blip2_config(text_config=bart, image_token_id=29, vision_norm_eps=1e-6))
    message = refusal(to_transformers, ours)
    assert message.startswith("The LLM is a BartForConditionalGeneration, but its config builds a BartForCausalLM")
    ours.save_pretrained(tmp_path / "ours")
    assert refusal(convert_folder, tmp_path / "ours", tmp_path / "native", to="native") == message
    assert not (tmp_path / "native").exists()


# --- AutoModel


@pytest.mark.parametrize(("head", "llm"), [*HEADS_AND_LLMS, (RETRIEVAL, None)])
def test_automodel_on_every_converted_checkpoint(head: type[PreTrainedModel], llm: str | None, tmp_path: Path) -> None:
    ours = from_transformers(native(head, llm))
    ours.save_pretrained(tmp_path)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(body) is (VlmInstructBlipModel if head is INSTRUCT else VlmBlip2Model)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert {name.split(".")[0] for name in info["unexpected_keys"]} <= {"similarity", "itm_head"}
    assert_same_weights(body, ours.model)
    again, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(again, ours)


# --- processors


def end_tokenizer() -> PreTrainedTokenizerFast:
    """T5's way: an end token, and none at the beginning."""
    tokenizer = tiny_blip2.llm_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tiny.END)]
    )
    return tokenizer


def native_processor(head: type[PreTrainedModel], tokenizer: PreTrainedTokenizerFast):
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    if head is INSTRUCT:
        return InstructBlipProcessor(images, tokenizer, tiny_blip2.bert_tokenizer(), QUERIES)
    return Blip2Processor(images, tokenizer, None if head is RETRIEVAL else QUERIES)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("head", [BLIP2, INSTRUCT, RETRIEVAL])
def test_folders_with_processors(head: type[PreTrainedModel], begins: bool, tmp_path: Path) -> None:
    """The same pixels and tokens, there and back, with a tokenizer that begins texts with a token (OPT) or does not."""
    theirs = native(head, None if head is RETRIEVAL else "t5")
    of_llm = tiny_blip2.llm_tokenizer() if begins else end_tokenizer()
    tokenizer = tiny_blip2.bert_tokenizer() if head is RETRIEVAL else of_llm
    theirs.save_pretrained(tmp_path / "native")
    processor = native_processor(head, tokenizer)
    processor.save_pretrained(tmp_path / "native")
    convert_folder(tmp_path / "native", tmp_path / "ours", to="hf_vlm")
    assert_same_weights(head.from_pretrained(tmp_path / "ours"), from_transformers(theirs))
    convert_folder(tmp_path / "ours", tmp_path / "back", to="native")
    assert_same_weights(NATIVE[head].from_pretrained(tmp_path / "back"), theirs)
    pictures, texts = [tiny.image(seed=0), tiny.image(seed=1)], ["a red cat", "the dog"]
    expected = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    ours = processor_from_transformers(processor)
    read = ours(images=pictures, text=[text if head is RETRIEVAL else f"<image>{text}" for text in texts])
    again = processor_to_transformers(ours)(images=pictures, text=texts, padding=True, return_tensors="pt")
    assert ours.tokenizer is not processor.tokenizer
    assert set(read) == set(again) == set(expected)
    torch.testing.assert_close(read["pixel_values"], expected["pixel_values"])
    for name in set(expected) - {"pixel_values"}:
        assert sorted(read[name].tolist()[0]) == sorted(expected[name].tolist()[0]), name
        assert torch.equal(again[name][0], expected[name][0]), name


def test_processor_without_the_number_of_placeholders_is_refused() -> None:
    theirs = native_processor(RETRIEVAL, end_tokenizer())
    assert refusal(processor_from_transformers, theirs).endswith("set its num_query_tokens.")


# --- the original layout


def original(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = load_file(RECORDED) | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_sizes_are_read_from_the_original_layout() -> None:
    """Heads of the Q-Former are 64 wide, and the tower has 16."""
    qformer = tiny.layer_sizes(64, heads=1, layers=3, memory_size=64)
    model = tiny_blip2.blip2_model(vision=tiny.layer_sizes(64, heads=16), qformer=qformer)
    found = from_original({f"module.{name}": tensor for name, tensor in lavis_names(model).items()})
    assert type(found) is VlmBlip2ForPreTraining
    inputs = tiny.blip_inputs()
    with torch.no_grad():
        one, other = found(**inputs), model(**inputs)
    torch.testing.assert_close(one.itm_logits, other.itm_logits, **CLOSE)
    torch.testing.assert_close(one.image_embeds, other.image_embeds, **CLOSE)
    assert found.config.qformer_config.cross_attention_frequency == 2
    assert found.config.qformer_config.bos_token_id == tiny_blip2.DEC


def lavis_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our weights in the names of LAVIS."""
    state = rename(split_qformer(model.state_dict()), NAMES)
    result = {name: tensor for name, tensor in state.items() if "post_norm" not in name}
    for name in [name for name in result if name.endswith("attn.qkv.bias")]:
        query, _, value = result.pop(name).chunk(3)
        result[name.replace("qkv.bias", "q_bias")], result[name.replace("qkv.bias", "v_bias")] = query, value
    for name in ("cls_token", "pos_embed"):
        tensor = result[f"visual_encoder.{name}"]
        result[f"visual_encoder.{name}"] = tensor.reshape(1, -1, tensor.shape[-1])
    return result


def test_original_layout_that_does_not_fit() -> None:
    tower = {name: None for name in original() if name.startswith("visual_encoder.")}
    assert refusal(from_original, original(**tower)).endswith("add its tensors as visual_encoder.*.")
    assert "not from the first stage" in refusal(from_original, original(**{"itm_head.weight": None}))
    assert "missing: query_tokens" in refusal(from_original, original(query_tokens=None))
    more = original(**{"opt_proj.weight": torch.zeros(3)})
    assert "unexpected: opt_proj.weight" in refusal(from_original, more, config=config_of_recorded())
    shape = original(**{"itm_head.weight": torch.zeros(2, 31)})
    message = refusal(from_original, shape, config=config_of_recorded())
    assert re.search(r"wrong shape: itm_head.weight \(2, 31\)", message)


def config_of_recorded() -> VlmBlip2Config:
    vision = tiny.layer_sizes(24, heads=4, intermediate_size=96, image_size=32, patch_size=8)
    qformer = tiny.layer_sizes(32, memory_size=24, num_query_tokens=6, vocab_size=93, max_position_embeddings=64)
    return VlmBlip2Config(vision_config=vision, qformer_config=qformer, projection_dim=16)
