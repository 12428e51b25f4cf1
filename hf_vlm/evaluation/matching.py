"""Scores of pairs by a model that looks at image and text together (image-text matching, ITM).

- Works with any model that has `match(memory, input_ids, attention_mask, memory_index)` and `project_memory(states)`:
  BLIP's and BLIP-2's heads for pretraining and retrieval.
- Every image is encoded, and its keys and values projected, once, however many texts it is paired with. Every text is
  tokenised once. Texts of about one length share a batch.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .blocks import image_blocks
from .embed import evaluation_mode

"""Matching scores that differ by no more are tied: so much depends on the batch that a pair was computed in."""


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
    """Logits of no match and match of given pairs.

    Args:
        images: anything with a length and integer indices, such as a column of a data set; read a batch at a time.
        texts: cut where they exceed the length that the processor allows.
        pairs: `(N, 2)`, rows of `images` and of `texts`.
        batch_size: pairs a forward pass of the text encoder.
        image_batch_size: images encoded together; their keys and values of all layers are held at a time.
        progress: show a progress bar.
        autocast_dtype: run the model under autocast to this type, for instance `torch.bfloat16`.

    Returns:
        `(N, 2)`, float32, on the CPU. The difference of the two is the log-odds of a match; the second alone is what
        BLIP re-ranks by.

    Raises:
        ValueError: there are no pairs, they have another shape, or one names an image or a text that is not there.
    """
    pairs = torch.as_tensor(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0 or pairs.is_floating_point():
        raise ValueError(f"pairs must be integers of shape (pairs, 2), got {pairs.dtype} {tuple(pairs.shape)}")
    if not 0 <= int(pairs[:, 1].min()) <= int(pairs[:, 1].max()) < len(texts):
        raise ValueError(f"a pair names a text below 0 or above {len(texts) - 1}: there are {len(texts)} texts")
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
