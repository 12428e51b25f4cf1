"""Warnings of libraries that a user can do nothing about; recipes and the command line hide them."""

import logging
import re
import warnings

LOGGED = (
    "must be `None` or an integer within the vocabulary",  # of a default that the model does not use
    "The tokenizer has new PAD/BOS/EOS tokens",  # the Trainer aligns them itself
    r"LOAD REPORT(?![\s\S]*(MISSING|MISMATCH))",  # a part of a checkpoint is loaded on purpose
    "will be initialized from a multivariate normal distribution",
    "mtime may not be reliable on this filesystem",  # the order of steps is taken instead
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes then computes without this kernel
)
UNHANDLED = ("bitsandbytes.backends.cpu.ops",)  # loggers that write while their package is imported
WARNED = (
    "`is_gradient_checkpointing` is deprecated",  # PEFT asks for it
    "torch.distributed.nn.functional.all_gather is deprecated",
    "Input and output embeddings are no longer tied after merging",  # that is what merging does
)


class HideLogged(logging.Filter):
    """Drops log records whose message matches one of [`LOGGED`]."""

    pattern = re.compile("|".join(LOGGED))

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        return self.pattern.search(record.getMessage()) is None


def hide_warnings() -> None:
    """Hides the warnings of this module's lists for the rest of the process."""
    for message in WARNED:
        warnings.filterwarnings("ignore", message=message)
    hide = HideLogged()
    for name in UNHANDLED:
        logging.getLogger(name).addFilter(hide)
    for name in ("transformers", ""):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(each, HideLogged) for each in handler.filters):
                handler.addFilter(hide)


__all__ = ["hide_warnings"]
