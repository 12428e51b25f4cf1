"""Processor of BLIP: images to pixel values, texts to WordPiece tokens padded to the longest of the batch."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from .image_processing_vlm import VlmImageProcessor


class VlmBlipProcessor(ProcessorMixin):
    """Prepares images and texts for BLIP's models.

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: BERT's tokenizer with `[DEC]` and `[ENC]` added; it pads to the right.

    Calling it with `images=` and/or `text=` gives `pixel_values` of shape `(images, 3, height, width)` and `input_ids`
    and `attention_mask` of shape `(texts, longest text)` as torch tensors. Every text begins with `[CLS]` and ends with
    `[SEP]`; the models replace `[CLS]` by `[ENC]` or `[DEC]`. Texts are truncated to the tokenizer's
    `model_max_length`.
    """

    text_kwargs = {"padding": "longest", "truncation": True, "return_tensors": "pt", "return_token_type_ids": False}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(self, image_processor: VlmImageProcessor, tokenizer: PreTrainedTokenizerBase, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_parts(
        cls, text: str | PreTrainedTokenizerBase, max_length: int | None = None, **image_kwargs
    ) -> "VlmBlipProcessor":
        """Builds the processor that belongs to [`VlmBlipForPreTraining.from_parts`].

        Args:
            text: Hub id, folder or instance of a BERT tokenizer; `[DEC]` and `[ENC]` are added to it.
            max_length: Longest text in tokens; the tokenizer's own by default.
            **image_kwargs: Options of [`VlmImageProcessor`], such as `size` and `resize_mode`.
        """
        tokenizer = AutoTokenizer.from_pretrained(text) if isinstance(text, str) else text
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        tokenizer.padding_side = "right"
        if max_length is not None:
            tokenizer.model_max_length = max_length
        return cls(VlmImageProcessor(**image_kwargs), tokenizer)


__all__ = ["VlmBlipProcessor"]
