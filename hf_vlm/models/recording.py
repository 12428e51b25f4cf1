"""Hidden states and attentions of a model's parts, when they are asked for; without a request nothing is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput


class NestedOutput(ModelOutput):
    """An output with outputs of the model's parts in it; as a tuple, those are tuples, too."""

    def to_tuple(self) -> tuple:
        """All values that are not None."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def requested(options: dict) -> dict[str, bool]:
    """`output_hidden_states` and `output_attentions`, where the options of a `forward` ask for them."""
    return {name: True for name in ("output_hidden_states", "output_attentions") if options.get(name)}


def is_recording(config: PreTrainedConfig, options: dict) -> bool:
    """Whether hidden states or attentions are asked for, by the options of a `forward` or by a config."""
    return bool(
        options.get("output_hidden_states", config.output_hidden_states)
        or options.get("output_attentions", config.output_attentions)
    )


def states_of(output: ModelOutput | None) -> dict:
    """The hidden states and attentions of an output, for another one; empty without an output."""
    return {} if output is None else {name: output.get(name) for name in ("hidden_states", "attentions")}


@contextmanager
def recording(options: dict, **parts: nn.Module) -> Iterator[dict[str, ModelOutput]]:
    """The output of each part's first call inside the context, if its hidden states or attentions are asked for.

    Args:
        options: Options of a `forward`. The parts are called with `output_hidden_states` and `output_attentions` of
            them.
        **parts: The parts by the names that their outputs get.

    Example:
        ```python
        >>> with recording(kwargs, vision_outputs=self.vision_model) as outputs:
        ...     states = self.encode_images(pixel_values)
        ```
    """
    outputs: dict[str, ModelOutput] = {}
    handles = []

    def ask(module, args, kwargs):
        return args, {**kwargs, **requested(options)}

    for name, part in parts.items():
        if is_recording(part.config, options):

            def keep(module, args, output, name=name):
                outputs.setdefault(name, output)

            handles += [part.register_forward_pre_hook(ask, with_kwargs=True), part.register_forward_hook(keep)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["NestedOutput", "is_recording", "recording", "requested", "states_of"]
