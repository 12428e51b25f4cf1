"""Batched question answering with LLaVA; the prompt prefix shared by an image's questions is encoded once.

System prompt and image tokens are most of the prompt of a short question. They pass through the LLM once per image. All
questions about the image share the resulting key/value cache.
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


def answer_by_chat(
    model: VlmLlavaForConditionalGeneration,
    processor: VlmLlavaProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    image_of_question: Sequence[int],
    **options: Any,
) -> list[str]:
    """LLaVA's answer to each question.

    Args:
        images: `(I,)`, each with at least one question.
        questions: `(Q,)`.
        image_of_question: `(Q,)`, the index in `images` of each question's image.
        **options: Options of `generate`.
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
    """Encodes the common prefix of each image's prompts.

    Args:
        prompts: `input_ids` and `attention_mask` `(Q, L)`, padded on the left.
        seen: `(I,)`, the image tokens `(tokens, H)` of each image.
        image_of_prompt: `(Q,)`, the index in `seen` of each prompt's image.
        pad: Padding token.

    Returns:
        `past_key_values`, and new `input_ids` and `attention_mask` with prefix and rest each padded on the left.
        Empty if the template puts the image after the question, or the LLM's cache is not only keys and values of all
        positions.
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
    """Whether a cache holds keys and values of all positions: no sliding window, no recurrent state."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _common(rows: Sequence[list[int]]) -> list[int]:
    """The longest common prefix of all rows."""
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return [tokens[0] for tokens in same]


def _padded_left(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


__all__ = ["answer_by_chat", "shared_beginnings"]
