"""Processor of LLaVA: images to views, conversations to tokens, placeholders for the tokens of each image."""

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .anyres import anyres_layout
from .chat_templates import PADDING, added_tokens, as_batch, in_form_of, padded, with_image_token
from .image_processing_vlm import VlmImageProcessor, flat_images
from .messages import IMAGE_TOKEN, flat_content, images_of

# LLaVA-1.5's conversations (Vicuna v1), for tokenizers without a chat template.
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ (message['content'] or '') + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + (message['content'] or '') + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + (message['content'] or '') + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class VlmLlavaProcessor(ProcessorMixin):
    """Prepares images and texts for [`VlmLlavaForConditionalGeneration`].

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: The LLM's tokenizer with the placeholder `<image>`; it pads to the left.
        patch_size: Side of the tower's patches in pixels.
        num_additional_image_tokens: Number of tokens that the tower puts before the patches (class token, registers).
        vision_feature_select_strategy: As in the config: `"default"` drops the first of these tokens.
        chat_template: Template that renders conversations; by default the tokenizer's own, or else Vicuna's.

    Calling it with `images=` and/or `text=` gives `pixel_values` of shape `(views, 3, height, width)` (with "anyres"
    also `image_sizes` of shape `(images, 2)`) and `input_ids` and `attention_mask` of shape `(texts, longest text)`,
    as torch tensors. Each `<image>` in the texts becomes one placeholder per token of its image.
    """

    text_kwargs = {"padding": "longest", "return_tensors": "pt", "return_token_type_ids": False}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        patch_size: int = 14,
        num_additional_image_tokens: int = 1,
        vision_feature_select_strategy: str = "default",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.patch_size = patch_size
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        tokenizer.padding_side = "left"  # a tokenizer's files do not keep it
        chat_template = chat_template or tokenizer.chat_template or VICUNA_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_parts(
        cls, model: PreTrainedModel, tokenizer: str | PreTrainedTokenizerBase, **image_kwargs
    ) -> "VlmLlavaProcessor":
        """Build the processor of a model from [`VlmLlavaForConditionalGeneration.from_parts`].

        Args:
            model: The model, whose tower defines the image size.
            tokenizer: Hub id, folder or instance of the LLM's tokenizer; `<image>` is added to it.
            **image_kwargs: Options of [`VlmImageProcessor`]. The default of `resize_mode` is `"anyres"` for a model
                with `image_grid_pinpoints` and `"pad"` for others.

        Raises:
            ValueError: if the placeholder has another id in the model's config.
        """
        config, vision = model.config, model.config.vision_config
        tokenizer = with_image_token(
            AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        )
        grids = config.image_grid_pinpoints
        side = {"height": vision.image_size, "width": vision.image_size}
        image_kwargs = {"resize_mode": "pad" if grids is None else "anyres", "size": side, **image_kwargs}
        if (image_kwargs["resize_mode"] == "anyres") != (grids is not None):
            raise ValueError(
                f"resize_mode is {image_kwargs['resize_mode']!r}, but the model's image_grid_pinpoints is {grids}: "
                'use resize_mode="anyres" if and only if the model has image_grid_pinpoints.'
            )
        processor = cls(
            VlmImageProcessor(image_grid_pinpoints=grids, **image_kwargs),
            tokenizer,
            patch_size=vision.patch_size,
            num_additional_image_tokens=model.base_model.num_additional_image_tokens,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"{IMAGE_TOKEN} is token {processor.image_token_id}, but the model's placeholder is "
                f"{config.image_token_id}: build the model with image_token_id={processor.image_token_id}."
            )
        return processor

    def __call__(self, images=None, text=None, **kwargs):
        """See the class.

        Raises:
            ValueError: if the number of `<image>` in the texts is not the number of images, or if `truncation` to
                `max_length` would cut an image.
        """
        images = None if images is None else self.image_processor.fetch_images(images)
        if text is None:
            return super().__call__(None if images is None else flat_images(images), **kwargs)
        text = [text] if isinstance(text, str) else list(text)
        self._check_images(text, images)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        options = merged["text_kwargs"]
        longest = None
        if options.pop("truncation", False):
            longest = options.get("max_length") or self.tokenizer.model_max_length
        adds_begin = options.pop("add_special_tokens", True)
        unpadded = {name: value for name, value in options.items() if name not in PADDING}
        inputs = super().__call__(
            images if images is None else flat_images(images),
            text,
            text_kwargs={**unpadded, "add_special_tokens": False, "padding": False, "return_tensors": None},
            images_kwargs=merged["images_kwargs"],
        )
        rows = [
            self.begin_tokens(one) + ids if adds_begin else ids
            for one, ids in zip(text, inputs["input_ids"], strict=True)
        ]
        rows = [self._truncated(ids, longest, number) for number, ids in enumerate(rows)]
        inputs.update(padded(self.tokenizer, rows, options))
        if merged["return_mm_token_type_ids"]:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
            inputs.convert_to_tensors(options.get("return_tensors"))
        return inputs

    def _truncated(self, ids: list[int], longest: int | None, number: int) -> list[int]:
        """At most `longest` tokens of a text, cut where the tokenizer truncates; all tokens for None."""
        if longest is None or len(ids) <= longest:
            return ids
        is_left = self.tokenizer.truncation_side == "left"
        kept, cut = (ids[-longest:], ids[:-longest]) if is_left else (ids[:longest], ids[longest:])
        if self.image_token_id in cut:
            raise ValueError(
                f"max_length={longest} would truncate an image of text {number}, which has {len(ids)} tokens: raise "
                "max_length, or leave out truncation."
            )
        return kept

    def _check_images(self, texts: list[str], images) -> None:
        """Compare the number of images with the texts: text by text for nested lists, otherwise in total."""
        found = [one.count(IMAGE_TOKEN) for one in texts]
        if isinstance(images, list) and any(isinstance(one, list) for one in images):
            given = [len(flat_images(one)) for one in images]
        else:
            found, given = [sum(found)], [0 if images is None else len(flat_images(images))]
        if found != given:
            times, count = (", ".join(map(str, counts)) for counts in (found, given))
            raise ValueError(
                f"The texts have {IMAGE_TOKEN} {times} times, but there are {count} images: write one for each."
            )

    def begin_tokens(self, text: str) -> list[int]:
        """The tokens to put before those of a text: the tokenizer's begin token, unless a chat template has written it.

        What the tokenizer puts after a text, such as an end token, is left out: the answer is still to come, and a chat
        template writes the ends of turns.
        """
        if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token):
            return []
        return added_tokens(self.tokenizer)[0]

    def num_image_tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image of this size in pixels."""
        tile = self.image_processor.size["height"]
        if self.image_processor.resize_mode == "anyres":
            return anyres_layout(
                (height, width), self.image_processor.image_grid_pinpoints, tile, self.patch_size
            ).num_tokens
        kept = self.num_additional_image_tokens - int(self.vision_feature_select_strategy == "default")
        return (tile // self.patch_size) ** 2 + kept

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image."""
        sizes = image_inputs.get("image_sizes")
        height, width = (0, 0) if sizes is None else (int(side) for side in sizes[image_idx])
        return IMAGE_TOKEN * self.num_image_tokens(height, width)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """transformers' `apply_chat_template`, which also accepts templates without support for images.

        Content in parts (`{"type": "image"}`, `{"type": "text", "text": ...}`) becomes one text with `<image>` for each
        image, in the order of the parts: `messages.flat_content`. A template that reads parts gets the text as one
        part. A message without content is left as it is.

        Raises:
            ValueError: for a part that is neither text nor image.
        """
        chats, batched = as_batch(conversation)
        flat = in_form_of(self._resolve_chat_template(chat_template), chats, flat_content)
        images = [images_of(chat) for chat in chats]
        if kwargs.get("tokenize") and any(images):
            options = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"images": images if batched else images[0], **options}
        return super().apply_chat_template(flat if batched else flat[0], chat_template, **kwargs)


__all__ = ["VICUNA_TEMPLATE", "VlmLlavaProcessor"]
