"""Images before a language model: what BLIP-2's second stage, InstructBLIP and LLaVA share.

- `place_images` puts image features among the token embeddings and refuses a wrong number of placeholders.
- `language_loss` computes logits at supervised positions only and divides their summed loss.
- `generate_from_embeds` calls the LLM's own `generate`; images are encoded once, whatever the number of beams.

Shapes: B rows, L tokens, H width of the LLM.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .language_model import contiguous_inputs, logits_of
from .losses import language_modeling_loss

Images = Sequence[torch.Tensor] | torch.Tensor  # features (tokens, H) of each image; one tensor if all are as long


def check_placeholders(is_image: torch.Tensor, images: Images) -> None:
    """Check that every run of placeholders ends where an image ends.

    Comparing only the totals would let one row lack a placeholder that another row has in excess.

    Args:
        is_image (`torch.BoolTensor` of shape `(B, L)`): True at placeholders.
        images: Features `(tokens, H)` of each image, in the order of the rows.

    Raises:
        ValueError: if an image is truncated, missing or surplus.
    """
    needed = [len(features) for features in images]
    run_ends = is_image & ~nn.functional.pad(is_image[:, 1:], (0, 1))
    ends = is_image.flatten().cumsum(0)[run_ends.flatten()].tolist()
    image_ends = torch.tensor([0, *needed]).cumsum(0).tolist()
    if image_ends[-1] != (ends or [0])[-1] or not set(image_ends).issuperset(ends):
        found = is_image.sum(dim=1).tolist()
        raise ValueError(
            f"The rows have {found} image placeholders, but the images need {needed}, in this order: put the image "
            "token once for each image into the text, let the processor expand it, and do not truncate the text."
        )


def place_images(embed_tokens: nn.Module, input_ids: torch.Tensor, images: Images, image_token_id: int) -> torch.Tensor:
    """Inputs `(B, L, H)` of the LLM: token embeddings, with image features at the placeholders.

    Args:
        embed_tokens: The LLM's input embeddings.
        input_ids (`torch.LongTensor` of shape `(B, L)`): Token ids; `image_token_id` may lie past the vocabulary.
        images: Features `(tokens, H)` of each image, in the order of the rows. An empty tensor is allowed: it joins
            the graph and fills no placeholder.
        image_token_id: Id of the placeholder.
    """
    is_image = input_ids == image_token_id
    embeds = embed_tokens(input_ids.masked_fill(is_image, 0))
    if not len(images):
        return embeds
    return embeds.masked_scatter(is_image[..., None], torch.cat(list(images)).to(embeds.dtype))


def mean_loss(
    total: torch.Tensor, count: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """A summed loss divided by `num_items_in_batch`, or by `count`; 0 if nothing is supervised."""
    divisor = torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch)
    return total / divisor.clamp(min=1)


def language_loss(
    language_model: PreTrainedModel,
    states: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Next-token loss of a decoder-only LLM; logits are computed at supervised positions only.

    Args:
        language_model: The LLM, with its head.
        states (`torch.FloatTensor` of shape `(B, L, H)`): Its hidden states.
        labels (`torch.LongTensor` of shape `(B, L)`): Target token ids; -100 elsewhere.
        num_items_in_batch: Divisor of the summed loss; by default the number of supervised tokens.
    """
    total, count = language_modeling_loss(states, labels, lambda state: logits_of(language_model, state))
    return mean_loss(total, count, num_items_in_batch)


def prompt_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, is_encoder_decoder: bool = False
) -> torch.Tensor:
    """The attention mask `(B, L)` of prompts to generate from; all ones by default.

    Raises:
        ValueError: if prompts of a decoder-only LLM are padded on the right.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if not is_encoder_decoder and not attention_mask[:, -1].all():
        raise ValueError('Prompts are padded on the right, where the answer goes: use padding_side="left".')
    return attention_mask


def generate_from_embeds(
    language_model: PreTrainedModel,
    generation_config: GenerationConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    /,
    **kwargs,
) -> torch.Tensor:
    """Token ids from the LLM's own `generate`; `kwargs` are its options.

    Args:
        language_model: The LLM, with its head.
        generation_config: The generation config of the model around the LLM, which replaces the LLM's.
        inputs_embeds (`torch.FloatTensor` of shape `(B, L, H)`): Prompts, from `place_images`.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding, on the left.
    """
    language_model.generation_config = generation_config
    with contiguous_inputs(language_model.get_output_embeddings()):
        return language_model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


__all__ = [
    "check_placeholders",
    "generate_from_embeds",
    "language_loss",
    "mean_loss",
    "place_images",
    "prompt_mask",
]
