"""Processor of CLIP: images to pixel values, captions to tokens padded to the longest of the batch."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from .image_processing_vlm import VlmImageProcessor


class VlmClipProcessor(ProcessorMixin):
    """Prepares images and texts for [`VlmClipModel`].

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: The text tower's tokenizer; it pads to the right.

    Calling it with `images=` and/or `text=` gives `pixel_values` of shape `(images, 3, height, width)` and `input_ids`
    and `attention_mask` of shape `(texts, longest text)` as torch tensors. Texts are truncated to the
    tokenizer's `model_max_length`.
    """

    text_kwargs = {"padding": "longest", "truncation": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(self, image_processor: VlmImageProcessor, tokenizer: PreTrainedTokenizerBase, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_parts(
        cls, text: str | PreTrainedTokenizerBase, max_length: int | None = None, **image_kwargs
    ) -> "VlmClipProcessor":
        """Builds the processor that belongs to [`VlmClipModel.from_parts`].

        Args:
            text: Hub id, folder or instance of the text tower's tokenizer.
            max_length: Longest text in tokens; the tokenizer's own by default.
            **image_kwargs: Options of [`VlmImageProcessor`], such as `size` and `resize_mode`.
        """
        tokenizer = AutoTokenizer.from_pretrained(text) if isinstance(text, str) else text
        tokenizer.padding_side = "right"
        if max_length is not None:
            tokenizer.model_max_length = max_length
        return cls(VlmImageProcessor(**image_kwargs), tokenizer)


__all__ = ["VlmClipProcessor"]
