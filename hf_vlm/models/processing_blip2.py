"""Processors of BLIP-2 and InstructBLIP: pictures to pixels, texts to tokens, placeholders for the queries."""

from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from .image_processing_vlm import VlmImageProcessor

IMAGE_TOKEN = "<image>"


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer with the placeholder, a padding token, and padding on the left, as generation needs it."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


class VlmBlip2Processor(ProcessorMixin):
    """Prepares images and texts for BLIP-2's models.

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: In the first stage BERT's with `[DEC]` added, which pads to the right; in the second the LLM's with
            the placeholder `<image>`, which pads to the left.
        num_query_tokens: In the second stage, how many placeholders `<image>` becomes; None in the first.

    Calling it with `images=` and/or `text=` gives `pixel_values` of shape `(images, 3, height, width)` and `input_ids`
    and `attention_mask` of shape `(texts, longest text)` as torch tensors. In the second stage each text begins with
    `<image>`, whose placeholders go before the tokenizer's begin token, as the published models were trained.
    """

    text_kwargs = {"padding": "longest", "return_tensors": "pt", "return_token_type_ids": False}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int | None = None,
        **kwargs,
    ):
        self.num_query_tokens = num_query_tokens
        self.image_token = None if num_query_tokens is None else IMAGE_TOKEN
        self.image_token_id = None if num_query_tokens is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if num_query_tokens is not None:
            tokenizer.padding_side = "left"  # a tokenizer's files do not keep it
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_parts(
        cls, text: str | PreTrainedTokenizerBase, max_length: int | None = None, **image_kwargs
    ) -> "VlmBlip2Processor":
        """Builds the processor that belongs to [`VlmBlip2ForPreTraining.from_parts`].

        Args:
            text: Hub id, folder or instance of a BERT tokenizer; `[DEC]` is added to it.
            max_length: Longest text in tokens; the tokenizer's own by default.
            **image_kwargs: Options of [`VlmImageProcessor`], such as `size` and `resize_mode`.
        """
        tokenizer = AutoTokenizer.from_pretrained(text) if isinstance(text, str) else text
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.padding_side = "right"
        if max_length is not None:
            tokenizer.model_max_length = max_length
        return cls(VlmImageProcessor(**image_kwargs), tokenizer)

    @classmethod
    def for_language_model(
        cls, image_processor: VlmImageProcessor, tokenizer: PreTrainedTokenizerBase, num_query_tokens: int
    ) -> "VlmBlip2Processor":
        """Builds the processor that belongs to [`VlmBlip2ForConditionalGeneration.from_parts`].

        Args:
            image_processor: That of the first stage.
            tokenizer: The LLM's; the placeholder is added to it.
            num_query_tokens: How many queries the Q-Former has.
        """
        return cls(image_processor, with_image_token(tokenizer), num_query_tokens)

    def __call__(self, images=None, text=None, **kwargs):
        """See the class.

        Raises:
            ValueError: in the second stage, if texts and images differ in number, or a text does not begin with its
                only `<image>`.
        """
        if self.num_query_tokens is None:
            kwargs.setdefault("truncation", True)  # captions may be cut, prompts may not
        if self.num_query_tokens is None or text is None:
            return super().__call__(images, text, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        wrong = [one for one in texts if one.rfind(IMAGE_TOKEN) != 0]
        num_images = 0 if images is None else len(make_flat_list_of_images(images))
        if wrong or num_images not in (0, len(texts)):
            shown = f"such as {wrong[0]!r}" if wrong else f"{len(texts)} of them for {num_images} images"
            raise ValueError(f"Each text has one image and begins with {IMAGE_TOKEN}, once; got {shown}.")
        pixels = {} if images is None else super().__call__(images, **kwargs)
        return BatchFeature({**self._tokens(texts, **kwargs), **pixels})

    def _tokens(self, texts: list[str], **kwargs) -> BatchFeature:
        """Placeholders, then what the tokenizer makes of each text alone: its begin token comes after the image."""
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        padding = {name: options.pop(name) for name in ("padding", "padding_side", "return_tensors") if name in options}
        read = self.tokenizer([one.removeprefix(IMAGE_TOKEN) for one in texts], **options)["input_ids"]
        rows = [[self.image_token_id] * self.num_query_tokens + ids for ids in read]
        return self.tokenizer.pad({"input_ids": rows}, **padding)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image."""
        return IMAGE_TOKEN * self.num_query_tokens


class VlmInstructBlipProcessor(VlmBlip2Processor):
    """Prepares images and instructions for InstructBLIP.

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: The LLM's with the placeholder `<image>`.
        qformer_tokenizer: BERT's, by which the Q-Former reads the instruction; it pads to the right.
        num_query_tokens: How many placeholders `<image>` becomes.

    Calling it with `images=` and `text=` also gives `qformer_input_ids` and `qformer_attention_mask`, of the texts
    without their `<image>`.
    """

    def __init__(
        self,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int | None = None,
        **kwargs,
    ):
        kwargs["qformer_tokenizer"] = qformer_tokenizer
        super().__init__(image_processor, tokenizer, num_query_tokens, **kwargs)

    def __call__(self, images=None, text=None, **kwargs):
        """See the class."""
        inputs = super().__call__(images, text, **kwargs)
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            read = self.qformer_tokenizer(
                [one.replace(IMAGE_TOKEN, "").strip() for one in texts],
                padding="longest",
                truncation=True,
                return_tensors="pt",
            )
            inputs["qformer_input_ids"] = read["input_ids"]
            inputs["qformer_attention_mask"] = read["attention_mask"]
        return inputs


__all__ = ["VlmBlip2Processor", "VlmInstructBlipProcessor"]
