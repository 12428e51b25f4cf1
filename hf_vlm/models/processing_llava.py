"""Processor of LLaVA: pictures to views, conversations to tokens, placeholders for the tokens of each image."""

from functools import cache

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.utils.chat_template_utils import render_jinja_template

from .anyres import anyres_layout
from .image_processing_vlm import VlmImageProcessor
from .modeling_llava import VlmLlavaForConditionalGeneration
from .processing_blip2 import IMAGE_TOKEN, with_image_token
from .towers import count_extra_tokens

# LLaVA-1.5's conversations (Vicuna v1), for tokenizers that bring no template.
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IMAGE_PARTS = ("image", "image_url")


class VlmLlavaProcessor(ProcessorMixin):
    """Prepares images and texts for [`VlmLlavaForConditionalGeneration`].

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: The LLM's with the placeholder `<image>`; it pads to the left.
        patch_size: Side of the tower's patches in pixels.
        num_additional_image_tokens: Tokens of the tower before the patches: a class token, registers.
        vision_feature_select_strategy: As in the config: `"default"` leaves the first of these out.
        chat_template: How conversations become text; the tokenizer's own, or Vicuna's, by default.

    Calling it with `images=` and/or `text=` gives `pixel_values` of shape `(views, 3, height, width)` (with "anyres"
    also `image_sizes` of shape `(images, 2)`) and `input_ids` and `attention_mask` of shape `(texts, longest text)`,
    as torch tensors. Each `<image>` of the texts becomes as many placeholders as the image has tokens.
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
        cls, model: VlmLlavaForConditionalGeneration, tokenizer: str | PreTrainedTokenizerBase, **image_kwargs
    ) -> "VlmLlavaProcessor":
        """Builds the processor that belongs to a model of [`VlmLlavaForConditionalGeneration.from_parts`].

        Args:
            model: The model; its tower says how large images are.
            tokenizer: Hub id, folder or instance of the LLM's tokenizer; `<image>` is added to it.
            **image_kwargs: Options of [`VlmImageProcessor`]; `resize_mode` is `"anyres"` for a model with tiles, else
                `"pad"`, by default.

        Raises:
            ValueError: if the placeholder's id is not the model's.
        """
        config, vision = model.config, model.config.vision_config
        tokenizer = with_image_token(
            AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        )
        grids = config.image_grid_pinpoints
        side = {"height": vision.image_size, "width": vision.image_size}
        image_kwargs = {"resize_mode": "pad" if grids is None else "anyres", "size": side, **image_kwargs}
        if (image_kwargs["resize_mode"] == "anyres") != (grids is not None):
            raise ValueError('resize_mode="anyres" and a model with image_grid_pinpoints go together.')
        processor = cls(
            VlmImageProcessor(image_grid_pinpoints=grids, **image_kwargs),
            tokenizer,
            patch_size=vision.patch_size,
            num_additional_image_tokens=count_extra_tokens(model.model.vision_model),
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
            ValueError: if the texts hold another number of `<image>` than there are images, or are to be cut, which
                could cut an image.
        """
        images = _loaded(images)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            self._check_images(text, images)
            if kwargs.get("truncation") or kwargs.get("text_kwargs", {}).get("truncation"):
                raise ValueError("Cutting texts could cut an image: shorten them before, or leave out truncation.")
            begin = self.tokenizer.bos_token
            if begin and all(one.startswith(begin) for one in text):  # as chat templates may have written it
                kwargs.setdefault("add_special_tokens", False)
        if images is not None:
            images = make_flat_list_of_images(images)
        return super().__call__(images, text, **kwargs)

    def _check_images(self, texts: list[str], images) -> None:
        """Images in nested lists are counted text by text, others in all."""
        found = [one.count(IMAGE_TOKEN) for one in texts]
        if isinstance(images, list) and any(isinstance(one, list) for one in images):
            given = [len(one) if isinstance(one, list) else 1 for one in images]
        else:
            found, given = [sum(found)], [0 if images is None else len(make_flat_list_of_images(images))]
        if found != given:
            times, count = (", ".join(map(str, counts)) for counts in (found, given))
            raise ValueError(f"The texts have {IMAGE_TOKEN} {times} times, but there are {count} images.")

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many tokens an image of this size in pixels becomes."""
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
        """transformers' `apply_chat_template`, which also takes templates that know no images.

        Content in parts (`{"type": "image"}`, `{"type": "text", "text": ...}`) becomes one text, with `<image>` and a
        line break before the rest, as LLaVA was trained; one part of it, for a template that reads parts.
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        chats = conversation if batched else [conversation]
        images = [_images_of(chat) for chat in chats]
        if kwargs.get("tokenize") and any(images):
            options = kwargs.get("processor_kwargs") or {}
            kwargs["processor_kwargs"] = {"images": images if batched else images[0], **options}
        template = chat_template or self.chat_template
        in_parts = isinstance(template, str) and reads_parts(template)
        flat = [
            [
                {**message, "content": [{"type": "text", "text": text}] if in_parts else text}
                for message in chat
                for text in [flat_content(message["content"])]
            ]
            for chat in chats
        ]
        return super().apply_chat_template(flat if batched else flat[0], chat_template, **kwargs)


def flat_content(content: str | list[dict]) -> str:
    """A message's content as one text, with `<image>` and a line break for each image before the rest."""
    if isinstance(content, str):
        return content
    num_images = sum(part["type"] in IMAGE_PARTS for part in content)
    words = "".join(part["text"] for part in content if part["type"] == "text")
    return f"{IMAGE_TOKEN}\n" * num_images + words


@cache
def reads_parts(template: str) -> bool:
    """Whether a template reads content in parts alone, as those of llava-hf do: of a text it shows nothing."""
    text = "a text to look for"
    return not _shows(template, text, text) and _shows(template, [{"type": "text", "text": text}], text)


def _shows(template: str, content: str | list[dict], text: str) -> bool:
    messages = [{"role": "user", "content": content}]
    try:
        shown, _ = render_jinja_template([messages], chat_template=template, bos_token="", eos_token="")
    except (jinja2.TemplateError, TypeError):  # such as a list put behind a text
        return False
    return text in shown[0]


def _images_of(chat: list[dict]) -> list:
    """Pictures, addresses and paths in a conversation; an image may also be named alone, to be given beside it."""
    parts = [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]
    found = []
    for part in parts:
        if part["type"] == "image_url":  # as OpenAI writes it
            part = part["image_url"] if isinstance(part["image_url"], dict) else {"url": part["image_url"]}
        elif part["type"] != "image":
            continue
        found += [part[key] for key in ("image", "url", "path", "base64") if key in part]
    return found


def _loaded(images):
    """Addresses, paths and base64 in any lists as pictures."""
    if isinstance(images, (list, tuple)):
        return [_loaded(one) for one in images]
    return load_image(images) if isinstance(images, str) else images


__all__ = ["VICUNA_TEMPLATE", "VlmLlavaProcessor", "flat_content", "reads_parts"]
