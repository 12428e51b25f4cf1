"""Convert checkpoints to and from transformers' classes and the original repositories' layouts."""

from .convert import (
    convert_folder,
    from_original,
    from_transformers,
    processor_from_transformers,
    processor_to_transformers,
    to_transformers,
)

__all__ = [
    "convert_folder",
    "from_original",
    "from_transformers",
    "processor_from_transformers",
    "processor_to_transformers",
    "to_transformers",
]
