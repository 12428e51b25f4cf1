"""How LLaVA is asked many questions: what the questions about an image have in common is read once.

The system's words and an image's tokens are most of a short question's prompt. They go through the LLM once an image;
the keys and values are then those of all questions about it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..data.sources.conversations import IMAGE_MARK
from ..models import VlmLlavaForConditionalGeneration, VlmLlavaProcessor


def say(
    model: VlmLlavaForConditionalGeneration,
    processor: VlmLlavaProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    image_of_question: Sequence[int],
    **options: Any,
) -> list[str]:
    """What LLaVA answers to each question.

    Args:
        images: `(I,)`, each asked about at least once.
        questions: `(Q,)`.
        image_of_question: `(Q,)`, the row of `images` that each is about.
        **options: Of `generate`.
    """
    chats = [[{"role": "user", "content": f"{IMAGE_MARK}\n{question}"}] for question in questions]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    first = [image_of_question.index(row) for row in range(len(images))]
    views = processor(images=list(images), text=[texts[row] for row in first]).to(model.device)
    inputs = processor(images=[images[row] for row in image_of_question], text=texts).to(model.device)
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    seen = model.get_image_features(views["pixel_values"], views.get("image_sizes")).pooler_output
    if len(images) < len(questions) and options.get("num_beams", 1) == 1:
        prompts |= shared_beginnings(model, prompts, seen, image_of_question, processor.tokenizer.pad_token_id)
    features = {"image": BaseModelOutputWithPooling(pooler_output=[seen[row] for row in image_of_question])}
    written = model.generate(**prompts, mm_encoder_outputs=features, **options)
    return processor.tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def shared_beginnings(
    model: VlmLlavaForConditionalGeneration,
    prompts: dict[str, torch.Tensor],
    seen: Sequence[torch.Tensor],
    image_of_prompt: Sequence[int],
    pad: int,
) -> dict[str, Any]:
    """Reads what the prompts about each image begin with.

    Args:
        prompts: `input_ids` and `attention_mask` `(Q, L)`, padded on the left.
        seen: `(I,)`, the tokens `(tokens, H)` of each image.
        image_of_prompt: `(Q,)`, the row of `seen` that each prompt is about.
        pad: Token of padding.

    Returns:
        `past_key_values`, and the prompts laid out anew, with padding on the left of both parts. Nothing, where the
        template puts the image after the question, or the LLM keeps more than keys and values of all positions.
    """
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    rows = [row[there].tolist() for row, there in zip(ids, mask, strict=True)]
    beginnings = [
        _common([row[:-1] for row, of in zip(rows, image_of_prompt, strict=True) if of == image])
        for image in range(len(seen))
    ]
    cache = DynamicCache(config=model.config.text_config)
    if not _can_be_shared(cache) or not all(model.config.image_token_id in row for row in beginnings):
        return {}
    begin_ids, begin_mask = _padded_left(beginnings, pad, model.device)
    model(
        input_ids=begin_ids,
        attention_mask=begin_mask,
        position_ids=(begin_mask.cumsum(-1) - 1).clamp(min=0),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(seen))},
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    of_prompt = torch.tensor(image_of_prompt, device=model.device)
    cache.batch_select_indices(of_prompt)
    ends = [row[len(beginnings[image]) :] for row, image in zip(rows, image_of_prompt, strict=True)]
    end_ids, end_mask = _padded_left(ends, pad, model.device)
    return {
        "input_ids": torch.cat([begin_ids[of_prompt], end_ids], dim=1),
        "attention_mask": torch.cat([begin_mask[of_prompt], end_mask], dim=1),
        "past_key_values": cache,
    }


def _can_be_shared(cache: Cache) -> bool:
    """Whether a cache is keys and values of all positions: not of a window, no state of a recurrent layer."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _common(rows: Sequence[list[int]]) -> list[int]:
    """What all rows begin with."""
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return [tokens[0] for tokens in same]


def _padded_left(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


__all__ = ["say", "shared_beginnings"]
