"""Tiny configs, models, processors and batches for the tests, made from nothing: no download, no file."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, PreTrainedTokenizerFast

from hf_vlm import (
    VlmBlipConfig,
    VlmBlipForPreTraining,
    VlmBlipProcessor,
    VlmBlipTextConfig,
    VlmClipConfig,
    VlmClipModel,
    VlmClipProcessor,
    VlmImageProcessor,
    VlmTextTowerConfig,
    VlmTowerConfig,
)
from hf_vlm.models.modeling_blip import VlmBlipHead
from hf_vlm.models.modeling_blip_text import VlmBlipPreTrainedModel

WORDS = ["a", "red", "green", "blue", "cat", "dog", "on", "the", "left", "right", "of", "and", "two", "house", "tree"]
VOCABULARY = ["<pad>", "<unk>", ".", *WORDS, "<start>", "<end>"]
PAD, UNK, START, END = 0, 1, len(VOCABULARY) - 2, len(VOCABULARY) - 1
MAX_LENGTH = 12
CAPTIONS = ["a red cat", "two dog on the left of a green house", "tree", "the blue house and the red tree", "a dog"]
IMAGE_SIZE = 32
# BLIP's vocabulary; the last two are what BLIP adds to BERT's.
BLIP_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS, "[DEC]", "[ENC]"]
CLS, SEP, DEC, ENC = (BLIP_VOCABULARY.index(token) for token in ("[CLS]", "[SEP]", "[DEC]", "[ENC]"))
BLIP_LENGTH = 16

TOKENS = {
    "vocab_size": len(VOCABULARY),
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "max_position_embeddings": MAX_LENGTH,
}
# The layouts of a vision transformer that the tower's options describe.
LAYOUTS = {
    "clip": {},
    "blip": {"use_pre_norm": False, "use_patch_bias": True, "final_norm": "sequence", "hidden_act": "gelu"},
    "eva": {
        "use_pre_norm": False,
        "use_patch_bias": True,
        "final_norm": "sequence",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "mean": {"use_class_token": False, "pooling": "mean", "qkv_bias": False},
}


def layer_sizes(width: int = 32, heads: int = 4, layers: int = 2, **options) -> dict:
    """The sizes that every transformer config here shares."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads}
    return {**sizes, "num_hidden_layers": layers, **options}


def tower_config(layout: str = "clip", **options) -> VlmTowerConfig:
    """An image tower for images of 32 x 32 pixels."""
    sizes = layer_sizes(image_size=IMAGE_SIZE, patch_size=8)
    return VlmTowerConfig(**{**sizes, **LAYOUTS[layout], **options})


def text_config(**options) -> VlmTextTowerConfig:
    """A text tower for [`tokenizer`]."""
    return VlmTextTowerConfig(**{**layer_sizes(width=24, heads=2), **TOKENS, **options})


def clip_config(vision: dict | None = None, text: dict | None = None, **options) -> VlmClipConfig:
    """CLIP with both of our towers; `vision` and `text` are options of theirs."""
    towers = {"vision_config": tower_config(**(vision or {})), "text_config": text_config(**(text or {}))}
    return VlmClipConfig(**{**towers, "projection_dim": 16, **options})


def clip_model(std: float = 0.2, **options) -> VlmClipModel:
    """A randomised CLIP in eval mode; for the options, see [`clip_config`]."""
    return randomise(VlmClipModel(clip_config(**options)), std)


def native_clip_config(vision: dict | None = None, text: dict | None = None, **options) -> CLIPConfig:
    """transformers' own CLIP of the same sizes."""
    vision = {**layer_sizes(image_size=IMAGE_SIZE, patch_size=8), **(vision or {})}
    text = {**layer_sizes(width=24, heads=2), **TOKENS, **(text or {})}
    return CLIPConfig(vision_config=vision, text_config=text, **{"projection_dim": 16, **options})


def blip_config(vision: dict | None = None, text: dict | None = None, **options) -> VlmBlipConfig:
    """BLIP without dropout, with images wider than texts; `vision` and `text` are options of the two."""
    tokens = {"vocab_size": len(BLIP_VOCABULARY), "sep_token_id": SEP, "bos_token_id": DEC, "enc_token_id": ENC}
    tokens |= {"max_position_embeddings": BLIP_LENGTH, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    parts = {
        "vision_config": tower_config(**{"layout": "eva", **(vision or {})}),
        "text_config": VlmBlipTextConfig(**{**layer_sizes(width=24, heads=2), **tokens, **(text or {})}),
    }
    return VlmBlipConfig(**{**parts, "projection_dim": 16, "queue_size": 8, **options})


def blip_model(
    head_class: type[VlmBlipPreTrainedModel] = VlmBlipForPreTraining, std: float = 0.2, **options
) -> VlmBlipPreTrainedModel:
    """A randomised BLIP in eval mode: a head in its own layout, or the body; for the options, see [`blip_config`]."""
    layout = head_class.layout if issubclass(head_class, VlmBlipHead) else {}
    return randomise(head_class(blip_config(**{**layout, **options})), std)


def blip_tokenizer(max_length: int = BLIP_LENGTH) -> PreTrainedTokenizerFast:
    """One token a word, between `[CLS]` and `[SEP]`, with `[DEC]` and `[ENC]` added as the last two."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(BLIP_VOCABULARY[:-2])}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="[DEC]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        additional_special_tokens=["[ENC]"],
        model_max_length=max_length,
    )


def blip_processor(size: int = IMAGE_SIZE, **options) -> VlmBlipProcessor:
    """The processor of [`blip_model`]; the options are the image processor's."""
    return VlmBlipProcessor(VlmImageProcessor(size={"height": size, "width": size}, **options), blip_tokenizer())


def blip_tokens(captions: list[str] = CAPTIONS, **options) -> dict[str, torch.Tensor]:
    """Captions as BLIP's `input_ids` and `attention_mask`, padded to the longest."""
    encoded = blip_tokenizer()(captions, return_tensors="pt", **{"padding": True, "truncation": True, **options})
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def blip_inputs(captions: list[str] = CAPTIONS, size: int = IMAGE_SIZE) -> dict[str, torch.Tensor]:
    """A batch of random images with their captions, for BLIP."""
    return {"pixel_values": pixels(len(captions), size), **blip_tokens(captions)}


def tokenizer(max_length: int = MAX_LENGTH, pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token a word, between a start and an end token, as CLIP's. The end token has the largest id."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        pad_token=pad_token,
        model_max_length=max_length,
    )


def clip_processor(size: int = IMAGE_SIZE, **options) -> VlmClipProcessor:
    """The processor of [`clip_model`]; the options are the image processor's."""
    return VlmClipProcessor(VlmImageProcessor(size={"height": size, "width": size}, **options), tokenizer())


def image(width: int = 40, height: int = 36, seed: int = 0) -> Image.Image:
    """A smooth random image, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels(batch: int = 5, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Random `pixel_values`."""
    return torch.randn(batch, 3, size, size)


def tokens(captions: list[str] = CAPTIONS, **options) -> dict[str, torch.Tensor]:
    """Captions as `input_ids` and `attention_mask`, padded to the longest."""
    encoded = tokenizer()(captions, return_tensors="pt", **{"padding": True, "truncation": True, **options})
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def clip_inputs(captions: list[str] = CAPTIONS, size: int = IMAGE_SIZE) -> dict[str, torch.Tensor]:
    """A batch of random images with their captions."""
    return {"pixel_values": pixels(len(captions), size), **tokens(captions)}


@torch.no_grad()
def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Redraws every parameter, norms, biases and learned factors too, and sets eval mode: nothing is left at a value
    (0 or 1) under which a forgotten or misplaced parameter would go unnoticed.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_gain = isinstance(module, nn.LayerNorm) and name == "weight"
            parameter.normal_(mean=1.0 if is_gain or name in ("logit_scale", "temperature") else 0.0, std=std)
    return model.eval()
