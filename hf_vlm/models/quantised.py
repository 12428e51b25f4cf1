"""Models of which only some parts are quantised, such as an LLM loaded with a `quantization_config`.

transformers describes quantisation in the config of the whole model. Such a model is therefore saved with the config of
its quantised part, which names all other parts as not quantised; `from_pretrained` then loads it without options.
"""

import copy
import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from .casting import is_packed


def quantised_parts(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The parts of a model that were quantised when they were loaded, by name; empty if the whole model was."""
    if "quantization_config" in model.config.to_dict():
        return {}
    parts = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    return {
        name: part
        for name, part in parts.items()
        if part is not model and part.config is not model.config and "quantization_config" in part.config.to_dict()
    }


def unquantised(module: nn.Module, name: str) -> Iterator[str]:
    """Names of the largest modules that have linear layers, none of them quantised."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if layers and not any(is_packed(layer.weight) for layer in layers):
        yield name
    elif layers:
        for child_name, child in module.named_children():
            yield from unquantised(child, f"{name}.{child_name}" if name else child_name)


class PartlyQuantisedModel(PreTrainedModel):
    """A model whose parts may be quantised one by one; `save_pretrained` describes them."""

    def save_pretrained(self, *args, **kwargs):
        """transformers' `save_pretrained`, also for a model with quantised parts.

        Raises:
            ValueError: if the parts were quantised in different ways, or not by bitsandbytes.
        """
        parts = quantised_parts(self)
        if not parts:
            return super().save_pretrained(*args, **kwargs)
        self.config.quantization_config = self._quantization_config(parts)
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            del self.config.quantization_config

    def _quantization_config(self, parts: dict[str, PreTrainedModel]):
        """The quantisation config of the parts, with the names of all modules that are not quantised."""
        configs = {name: copy.deepcopy(part.config.quantization_config) for name, part in parts.items()}
        name, config = next(iter(configs.items()))
        if config.quant_method != QuantizationMethod.BITS_AND_BYTES:
            raise ValueError(
                f"{name} is quantised by {config.quant_method}, and a model of which only a part is cannot be saved: "
                "save an adapter, or quantise the part by bitsandbytes."
            )
        for other in configs.values():
            other.llm_int8_skip_modules = None
            if other.to_dict() != config.to_dict():
                raise ValueError(
                    f"{' and '.join(configs)} are quantised in different ways, so the model cannot be saved: load them "
                    "with the same quantization_config."
                )
        body = self.base_model  # bodies and heads load each other's checkpoints, so the names lack the head's prefix
        names = [*unquantised(body, "")]
        if body is not self:
            names += [
                name
                for child_name, child in self.named_children()
                if child is not body
                for name in unquantised(child, child_name)
            ]
        config.llm_int8_skip_modules = [rf"(?:.*\.)?{re.escape(name)}" for name in names]
        return config


__all__ = ["PartlyQuantisedModel", "quantised_parts", "unquantised"]
