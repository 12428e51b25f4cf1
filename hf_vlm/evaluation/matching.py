"""Image-text matching (ITM): scores of given image-text pairs by a cross-attention model.

- Works with BLIP's and BLIP-2's heads for pretraining and retrieval.
- Every image is encoded, and its keys and values are projected, once for all its texts. Every text is tokenised once.
- Texts are batched by length.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .blocks import image_blocks
from .embed import evaluation_mode


def match_logits(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    pairs: torch.Tensor | Sequence[tuple[int, int]],
    batch_size: int = 128,
    *,
    image_batch_size: int = 16,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Matching logits (no match, match) of the given pairs.

    Args:
        images: Any sequence of images, such as a dataset column; read one batch at a time.
        texts: Truncated to the processor's maximum length.
        pairs: `(N, 2)`, row in `images` and row in `texts`.
        batch_size: Pairs per forward pass of the text encoder.
        image_batch_size: Images encoded together. Their keys and values of all layers are in memory at the same time.
        progress: Show a progress bar.
        autocast_dtype: Autocast dtype, for instance `torch.bfloat16`; None: no autocast.

    Returns:
        `(N, 2)`, float32, on the CPU. Their difference is the log-odds of a match. BLIP re-ranks by the second logit.

    Raises:
        ValueError: if there are no pairs, their shape is wrong, or an index is out of range.

    Example:

        logits = match_logits(model, processor, [image], ["a dolphin", "a pizza"], [(0, 0), (0, 1)])
        print(logits.softmax(-1)[:, 1])  # probability that each text matches the image
    """
    pairs = torch.as_tensor(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0 or pairs.is_floating_point():
        raise ValueError(f"pairs must be integers of shape (pairs, 2), got {pairs.dtype} {tuple(pairs.shape)}.")
    if not 0 <= int(pairs[:, 1].min()) <= int(pairs[:, 1].max()) < len(texts):
        raise ValueError(f"A pair names a text outside 0 to {len(texts) - 1}: there are {len(texts)} texts.")
    tokenizer = processor.tokenizer
    tokens = [torch.tensor(ids) for ids in tokenizer(list(texts), truncation=True)["input_ids"]]
    lengths = torch.tensor([len(ids) for ids in tokens])
    logits = torch.empty(len(pairs), 2)
    with evaluation_mode(model, autocast_dtype), tqdm(total=len(pairs), desc="pairs", disable=not progress) as bar:
        for block in image_blocks(model, processor, images, pairs[:, 0], image_batch_size):
            memory = model.project_memory(block.states)
            order = lengths[pairs[block.rows, 1]].argsort(descending=True, stable=True)
            for part in order.split(batch_size):
                rows = block.rows[part]
                batch = [tokens[text] for text in pairs[rows, 1].tolist()]
                input_ids = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
                mask = torch.arange(input_ids.shape[1]) < lengths[pairs[rows, 1], None]
                places = block.places[part.to(block.places.device)]
                scores = model.match(memory, input_ids.to(model.device), mask.long().to(model.device), places)
                logits[rows] = scores.float().cpu()
                bar.update(len(rows))
    return logits


__all__ = ["match_logits"]
