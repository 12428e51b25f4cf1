"""The language model of a vision-language model: any causal or encoder-decoder LLM of transformers, with its head.

- Inference uses the LLM's own forward and `generate`.
- Training computes logits at supervised positions only, so the scaling and soft-capping that follow the head are
  repeated here. `check_logits` compares them with the LLM's own logits when a model is built.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import cached_file, extract_commit_hash

from .casting import is_packed
from .quantised import PartlyQuantisedModel

# Without the prefix of a head, a weight is found in heads and bodies, and `model.language_model.model` is not mistaken
# for a weight name of transformers' older vision-language models.
for kind in ("VlmBlip2", "VlmInstructBlip", "VlmLlava"):
    for name in (f"{kind}Model", f"{kind}ForConditionalGeneration"):
        register_checkpoint_conversion_mapping(name, [PrefixChange(prefix_to_remove="model")], overwrite=True)


def build_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A newly initialised LLM with its head."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM.from_config(config)
    return AutoModelForCausalLM.from_config(config)


def load_language_model(source: str | PreTrainedModel, kwargs: dict | None = None) -> PreTrainedModel:
    """An LLM loaded from an id or folder, or the given instance; `kwargs` are options of `from_pretrained`.

    Raises:
        ValueError: for a model without a head, or if its logits cannot be reproduced (`check_logits`).
    """
    model = source
    if isinstance(source, str):
        config = AutoConfig.from_pretrained(source, revision=(kwargs or {}).get("revision"))
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto_class.from_pretrained(source, **(kwargs or {}))
    if model.get_output_embeddings() is None:
        raise ValueError(f"A {type(model).__name__} has no language-modelling head: pass a causal or seq2seq LLM.")
    if not model.config.is_encoder_decoder:
        check_logits(model)
    return model


def keep_names(model: PreTrainedModel) -> None:
    """Save a loaded model under the weight names that it was loaded with.

    transformers mistakes `model.language_model.model` for a weight name of its older vision-language models. Loading
    works, but saving would add the prefix a second time.
    """
    model._weight_conversions = []


class AdapterNames(PartlyQuantisedModel):
    """Base class of models with an LLM; loads adapters under the names that they were saved with."""

    def load_adapter(self, *args, **kwargs):
        """transformers' `load_adapter`, which `from_pretrained` of an adapter's folder also calls.

        transformers mistakes `model.language_model.model` for a weight name of its older vision-language models. It
        renames the adapter's weights, does not find them, and leaves the adapter randomly initialised.
        """
        own_names = get_model_conversion_mapping(self, add_legacy=False)
        if self.base_model is not self:  # a head's adapter has the prefix that weights lose above
            own_names = [change for change in own_names if change.scope_prefix is not None]
        info = super().load_adapter(*args, weight_mapping=own_names, **kwargs)
        keep_names(self)
        return info


def adapter_base(source: str | Path, **hub_options) -> str | None:
    """Id or folder of an adapter's base model, from the adapter's config; None for a complete checkpoint."""
    hub_options.pop("trust_remote_code", None)  # reading the config runs no code
    file = find_adapter_config_file(str(source), **hub_options)
    if file is None or Path(file).with_name("config.json").is_file():
        return None
    return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]


def commit_of(source: str, kwargs: dict) -> str | None:
    """The commit hash of an LLM on the Hub; None for a folder, or if the cache contains no commit."""
    if Path(source).exists():
        return None
    try:
        return extract_commit_hash(cached_file(source, "config.json", revision=kwargs.get("revision")), None)
    except OSError:
        return None


def cast_weights(language_model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights to `dtype`, except quantised ones.

    Buffers, which `.to` would cast too, stay: rotary frequencies must be float32.
    """
    for parameter in language_model.parameters():
        if not is_packed(parameter):
            parameter.data = parameter.data.to(dtype)
    language_model.config.dtype = dtype


def hidden_states(language_model: PreTrainedModel, **inputs) -> torch.Tensor:
    """Hidden states of shape `(B, L, H)` before the head; for an encoder-decoder LLM, the encoder's."""
    return reader(language_model)(**inputs).last_hidden_state


def reader(language_model: PreTrainedModel) -> PreTrainedModel:
    """The part of an LLM without its head; of an encoder-decoder LLM, the encoder."""
    return language_model.get_encoder() if language_model.config.is_encoder_decoder else language_model.base_model


def logits_of(language_model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits `(..., vocabulary)` of hidden states `(..., H)`, scaled and soft-capped by the LLM's config."""
    logits = language_model.get_output_embeddings()(states)
    options = language_model.config.get_text_config().to_dict()
    if options.get("logits_scaling") is not None:  # Granite
        logits = logits / options["logits_scaling"]
    if options.get("logit_scale") is not None:  # Cohere
        logits = logits * options["logit_scale"]
    if (cap := options.get("final_logit_softcapping")) is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


@contextmanager
def contiguous_inputs(head: nn.Module) -> Iterator[None]:
    """Make the input of an LLM's head contiguous inside the context.

    A prefill passes the last hidden state of each row as a strided view. With a frozen weight matrix, torch then copies
    the matrix for each row (`should_fold` in its LinearAlgebra.cpp), which dominates the time to the first token.
    """
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def check_logits(language_model: PreTrainedModel) -> None:
    """Compare `logits_of` with the LLM's own logits on a few tokens.

    Raises:
        ValueError: if the logits differ.
    """
    was_training = language_model.training
    language_model.eval()
    input_ids = torch.arange(1, 6, device=language_model.device)[None]
    own = language_model(input_ids=input_ids, use_cache=False).logits
    ours = logits_of(language_model, hidden_states(language_model, input_ids=input_ids, use_cache=False))
    language_model.train(was_training)
    if not torch.allclose(own.float(), ours.float(), rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        kind = language_model.config.model_type
        raise ValueError(f"The logits of a {kind} LLM cannot be reproduced from its hidden states: use another LLM.")


__all__ = [
    "AdapterNames",
    "adapter_base",
    "build_language_model",
    "cast_weights",
    "check_logits",
    "commit_of",
    "contiguous_inputs",
    "hidden_states",
    "keep_names",
    "load_language_model",
    "logits_of",
    "reader",
]
