"""Tiny BLIP-2 and InstructBLIP models, LLMs, tokenizers, processors and batches, made from nothing; see `tiny.py`."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cases import tiny
from hf_vlm import (
    VlmBlip2Config,
    VlmBlip2ForPreTraining,
    VlmBlip2Processor,
    VlmImageProcessor,
    VlmInstructBlipConfig,
    VlmInstructBlipProcessor,
    VlmQFormerConfig,
)

BERT_VOCABULARY = tiny.BLIP_VOCABULARY[:-1]  # the last is [DEC]
DEC = len(BERT_VOCABULARY) - 1
QUERIES = 4
# The placeholder lies past the vocabulary of the LLMs.
IMAGE_TOKEN_ID = len(tiny.VOCABULARY)
LLM_TOKENS = {
    "vocab_size": len(tiny.VOCABULARY),
    "bos_token_id": tiny.START,
    "eos_token_id": tiny.END,
    "pad_token_id": tiny.PAD,
}
DECODER = {"hidden_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
GROUPED = {**DECODER, "num_key_value_heads": 1, "head_dim": 10}
LLMS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", GROUPED),
    "llama, tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "opt": (
        "opt",
        {
            "hidden_size": 20,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "ffn_dim": 40,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 20,
            "dropout": 0.0,
        },
    ),
    "t5": (
        "t5",
        {
            "d_model": 20,
            "d_kv": 10,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": tiny.PAD,
            "dropout_rate": 0.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2": ("gemma2", {**GROUPED, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 10}),
    "granite": ("granite", {**GROUPED, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "qwen2": ("qwen2", GROUPED),
    "cohere": ("cohere", {**DECODER, "logit_scale": 0.25}),
}


def llm_config(name: str = "llama", **options) -> PreTrainedConfig:
    """The config of an LLM of [`LLMS`]; Gemma, Cohere and Llama's tied kind share input and output embeddings."""
    model_type, sizes = LLMS[name]
    return AutoConfig.for_model(model_type, **{**LLM_TOKENS, **sizes, **options})


def llm(name: str = "llama", std: float = 0.2, **options) -> PreTrainedModel:
    """A randomised LLM with its head, in eval mode."""
    config = llm_config(name, **options)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return tiny.randomise(auto_class.from_config(config), std)


def bert(**options) -> BertModel:
    """A randomised BERT of the Q-Former's sizes; `[DEC]` is not in its vocabulary."""
    sizes = {"vocab_size": DEC, "max_position_embeddings": tiny.BLIP_LENGTH}
    return tiny.randomise(BertModel(BertConfig(**{**tiny.layer_sizes(24, heads=2, layers=3), **sizes, **options})))


def qformer_config(**options) -> VlmQFormerConfig:
    """Three layers; the first and the last attend to the image."""
    tokens = {"vocab_size": len(BERT_VOCABULARY), "bos_token_id": DEC, "sep_token_id": tiny.SEP}
    tokens |= {"max_position_embeddings": tiny.BLIP_LENGTH, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    sizes = tiny.layer_sizes(24, heads=2, layers=3, num_query_tokens=QUERIES, memory_size=32)
    return VlmQFormerConfig(**{**sizes, **tokens, **options})


def blip2_config(
    llm: str | None = None, vision: dict | None = None, qformer: dict | None = None, instruct: bool = False, **options
) -> VlmBlip2Config:
    """The first stage, or with the name of an LLM the second; `vision` and `qformer` are options of the two."""
    parts = {"vision_config": tiny.tower_config(**{"layout": "eva", **(vision or {})}), "projection_dim": 16}
    parts |= {"qformer_config": qformer_config(**(qformer or {}))}
    if llm is not None:
        parts |= {"text_config": llm_config(llm), "image_token_id": IMAGE_TOKEN_ID}
    return (VlmInstructBlipConfig if instruct else VlmBlip2Config)(**{**parts, **options})


def blip2_model(
    head_class: type[PreTrainedModel] = VlmBlip2ForPreTraining, llm: str | None = None, std: float = 0.2, **options
) -> PreTrainedModel:
    """A randomised model in eval mode; for the options, see [`blip2_config`]."""
    instruct = issubclass(head_class.config_class, VlmInstructBlipConfig)
    return tiny.randomise(head_class(blip2_config(llm, instruct=instruct, **options)), std)


def bert_tokenizer(max_length: int = tiny.BLIP_LENGTH) -> PreTrainedTokenizerFast:
    """One token a word, between `[CLS]` and `[SEP]`, as BERT's; without `[DEC]`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(BERT_VOCABULARY[:-1])}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", tiny.CLS), ("[SEP]", tiny.SEP)]
    )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names, model_max_length=max_length)


def llm_tokenizer(pad_token: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token a word after a start token, as an LLM's; without the placeholder."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tiny.VOCABULARY)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", tiny.START)])
    names = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>", "pad_token": pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{name: token for name, token in names.items() if token})


def image_processor(size: int = tiny.IMAGE_SIZE) -> VlmImageProcessor:
    return VlmImageProcessor(size={"height": size, "width": size})


def stage1_processor(**options) -> VlmBlip2Processor:
    """That of the first stage."""
    sizes = {"size": {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}}
    return VlmBlip2Processor.from_parts(bert_tokenizer(), **{**sizes, **options})


def stage2_processor(**options) -> VlmBlip2Processor:
    """That of the second stage; the options are those of [`llm_tokenizer`]."""
    return VlmBlip2Processor.for_language_model(image_processor(), llm_tokenizer(**options), QUERIES)


def instruct_processor() -> VlmInstructBlipProcessor:
    """That of InstructBLIP."""
    return VlmInstructBlipProcessor(
        image_processor(), stage2_processor().tokenizer, stage1_processor().tokenizer, QUERIES
    )


def stage1_inputs(captions: list[str] = tiny.CAPTIONS) -> dict[str, torch.Tensor]:
    """Random images with their captions."""
    return {"pixel_values": tiny.pixels(len(captions)), **stage1_processor()(text=captions)}


def stage2_inputs(
    prompts: list[str] = tiny.CAPTIONS, padding_side: str = "left", instruct: bool = False
) -> dict[str, torch.Tensor]:
    """Random images, each before its prompt; with `instruct`, also for the Q-Former."""
    processor = instruct_processor() if instruct else stage2_processor()
    processor.tokenizer.padding_side = padding_side
    pictures = [tiny.image(seed=i) for i in range(len(prompts))]
    inputs = processor(images=pictures, text=[f"<image> {prompt}" for prompt in prompts])
    return {**inputs, "pixel_values": tiny.pixels(len(prompts))}


def prompt_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The prompts themselves, to be learned: no placeholders, start token or padding."""
    unlearned = torch.tensor([IMAGE_TOKEN_ID, tiny.START])
    left_out = (inputs["attention_mask"] == 0) | torch.isin(inputs["input_ids"], unlearned)
    return inputs["input_ids"].masked_fill(left_out, -100)


def answer_labels(answers: list[str] = tiny.CAPTIONS) -> torch.Tensor:
    """Answers `(B, length)` that end with the end token, for an encoder-decoder LLM."""
    encoded = tiny.tokens(answers)
    return encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)[:, 1:]


def labelled(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of the second stage with its labels."""
    is_t5 = model.config.text_config.is_encoder_decoder
    return {**inputs, "labels": answer_labels() if is_t5 else prompt_labels(inputs)}
