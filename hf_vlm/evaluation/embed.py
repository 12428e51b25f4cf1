"""Embeddings of many images or texts, ready for the metrics and for search.

- Works with any model whose `get_image_features` and `get_text_features` return the projected embedding as
  `pooler_output`: `VlmClipModel`, transformers' own CLIP, and the ITC heads of BLIP and BLIP-2.
- Texts are batched by length, longest first. Padding stays short, and a batch that exceeds memory fails at once. The
  result is in the order of the input.
- The model runs in eval mode. Afterwards every module is back in its previous mode.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..terminal import quoted
from .blocks import read_pixels


def embed_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    batch_size: int = 64,
    *,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """L2-normalised image embeddings.

    Args:
        images: Any sequence of images, such as a dataset column; read one batch at a time.
        batch_size: Images per forward pass.
        progress: Show a progress bar.
        autocast_dtype: Autocast dtype, for instance `torch.bfloat16`; None: no autocast.

    Returns:
        `(len(images), D)`, float32, on the CPU; `(len(images), E, D)` for a model with E embeddings per image.

    Raises:
        ValueError: if there are no images.

    Example:

        images = embed_images(model, processor, [image])
        texts = embed_texts(model, processor, ["a dolphin", "a pizza"])
        print(images @ texts.T)  # (1, 2), cosine similarities
    """
    if len(images) == 0:
        raise ValueError("No images to embed: give at least one.")
    batches = []
    with evaluation_mode(model, autocast_dtype), tqdm(total=len(images), desc="images", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            pixel_values = read_pixels(processor, images, range(start, min(start + batch_size, len(images))))
            features = model.get_image_features(pixel_values=pixel_values.to(model.device, model.dtype))
            batches.append(_unit(features.pooler_output))
            bar.update(len(pixel_values))
    return torch.cat(batches)


def embed_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    batch_size: int = 256,
    *,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """L2-normalised text embeddings, in the order of `texts`.

    Args:
        texts: Truncated to the processor's maximum length.
        batch_size: Texts per forward pass.
        progress: Show a progress bar.
        autocast_dtype: Autocast dtype, for instance `torch.bfloat16`; None: no autocast.

    Returns:
        `(len(texts), D)`, float32, on the CPU.

    Raises:
        ValueError: if there are no texts, or `texts` is a single string.
    """
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"texts must be a non-empty list of strings, got {quoted(texts)}.")
    texts = list(texts)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    batches = []
    with evaluation_mode(model, autocast_dtype), tqdm(total=len(texts), desc="texts", disable=not progress) as bar:
        for start in range(0, len(texts), batch_size):
            batch = [texts[row] for row in order[start : start + batch_size]]
            inputs = processor(text=batch, padding="longest", truncation=True, return_tensors="pt").to(model.device)
            features = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            batches.append(_unit(features.pooler_output))
            bar.update(len(batch))
    return torch.cat(batches)[torch.tensor(order).argsort()]


@contextmanager
def evaluation_mode(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Eval mode, inference mode and autocast; afterwards every module is back in its previous mode."""
    # Per module, because model.train() would also switch frozen towers, which stay in eval mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(model.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1).cpu()


__all__ = ["embed_images", "embed_texts"]
