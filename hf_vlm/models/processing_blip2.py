"""Processors of BLIP-2 and InstructBLIP: images to pixels, texts to tokens, placeholders for the queries.

Only the processor decides the token layout. Training, evaluation and users call the same methods.

- A prompt is the placeholders of its image, the tokenizer's begin token, and the text that a chat template renders.
- The default template ends an instruction with a newline, as in the training of `VlmBlip2ForConditionalGeneration`.
- An answer is the rest of the rendered conversation, and the end token. Prompt and answer are tokenised separately.
- InstructBLIP's Q-Former reads the same rendered text as the LLM.
"""

from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .chat_templates import PADDING, added_tokens, as_batch, in_form_of, padded, with_image_token
from .image_processing_vlm import VlmImageProcessor, flat_images
from .images import shown
from .messages import IMAGE_TOKEN, count_images, flat_content, images_of, without_images

# Instructions end with a newline, answers with the end token; an empty instruction adds nothing.
PROMPT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message['content'] or '' %}"
    "{% if message['role'] == 'assistant' %}{{ content + eos_token }}"
    "{% elif content.strip() %}{{ content.rstrip() + '\\n' }}{% endif %}"
    "{% endfor %}"
)


class VlmBlip2Processor(ProcessorMixin):
    """Prepares images and texts for BLIP-2's models.

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: In the first stage BERT's with `[DEC]` added, which pads to the right; in the second the LLM's with
            the placeholder `<image>`, which pads to the left.
        num_query_tokens: In the second stage, how many placeholders `<image>` becomes; None in the first.
        is_encoder_decoder: Whether the LLM has an encoder. Prompts of a decoder-only LLM lose what the tokenizer adds
            after a text, such as an end token; None keeps it.
        chat_template: Template that renders prompts and answers; [`PROMPT_TEMPLATE`] by default. It can also be set as
            `processor.chat_template` and is then saved.
        follows_chat_template: Whether to follow a `chat_template` that equals the tokenizer's. Otherwise such a
            template is ignored: checkpoints contain it because the LLM's tokenizer has one.

    Calling it with `images=` and/or `text=` gives `pixel_values` of shape `(images, 3, height, width)` and `input_ids`
    and `attention_mask` of shape `(texts, longest text)` as torch tensors. In the second stage each text begins with
    `<image>`, whose placeholders go before the tokenizer's begin token, as the published models were trained.
    `max_length` counts them; `truncation` truncates the words only, and `padding` pads before the placeholders.
    """

    text_kwargs = {"padding": "longest", "return_tensors": "pt", "return_token_type_ids": False}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int | None = None,
        is_encoder_decoder: bool | None = None,
        chat_template: str | None = None,
        follows_chat_template: bool = False,
        **kwargs,
    ):
        self.num_query_tokens = num_query_tokens
        self.is_encoder_decoder = is_encoder_decoder
        self.image_token = None if num_query_tokens is None else IMAGE_TOKEN
        self.image_token_id = None if num_query_tokens is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if num_query_tokens is not None:
            tokenizer.padding_side = "left"  # a tokenizer's files do not keep it
        if not follows_chat_template and chat_template == tokenizer.chat_template:
            chat_template = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

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
        cls,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int,
        is_encoder_decoder: bool | None = None,
    ) -> "VlmBlip2Processor":
        """Builds the processor that belongs to [`VlmBlip2ForConditionalGeneration.from_parts`].

        Args:
            image_processor: The image processor of the first stage.
            tokenizer: The LLM's; the placeholder is added to it.
            num_query_tokens: How many queries the Q-Former has.
            is_encoder_decoder: Whether the LLM has an encoder.
        """
        return cls(image_processor, with_image_token(tokenizer), num_query_tokens, is_encoder_decoder)

    def to_dict(self) -> dict:
        """Fields of `processor_config.json`; those of the second stage only where they differ from their defaults."""
        fields = super().to_dict()
        if self.chat_template is not None:
            fields["follows_chat_template"] = True
        return {name: value for name, value in fields.items() if name != "is_encoder_decoder" or value is not None}

    def __call__(self, images=None, text=None, **kwargs):
        """See the class.

        Raises:
            ValueError: in the second stage, if texts and images differ in number, or a text does not begin with its
                only `<image>`.
        """
        if self.num_query_tokens is None:
            kwargs.setdefault("truncation", True)  # captions may be truncated, prompts may not
        if self.num_query_tokens is None or text is None:
            return super().__call__(images, text, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        wrong = [one for one in texts if one.rfind(IMAGE_TOKEN) != 0]
        images = None if images is None else flat_images(self.image_processor.fetch_images(images))
        if wrong or (images and len(images) != len(texts)):
            found = f"such as {shown(wrong[0])}" if wrong else f"{len(texts)} of them for {len(images)} images"
            raise ValueError(f"Each text has one image and begins with {IMAGE_TOKEN}, once; got {found}.")
        pixels = super().__call__(images, **kwargs) if images else {}
        prompts = [one.removeprefix(IMAGE_TOKEN) for one in texts]
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        unpadded = {name: value for name, value in options.items() if name not in PADDING or name == "max_length"}
        tokens = padded(self.tokenizer, self.prompt_tokens(prompts, **unpadded), options)
        return BatchFeature({**tokens, **self.qformer_tokens(prompts, **options), **pixels})

    def apply_chat_template(
        self, conversation, chat_template=None, tokenize=False, return_dict=False, processor_kwargs=None, **kwargs
    ):
        """transformers' `apply_chat_template` for conversations about one image, with any template.

        The rendered text begins with `<image>`, wherever the conversation has its image.

        Args:
            conversation: One conversation, or a list of them.
            chat_template: Template in place of the processor's.
            tokenize: Whether to call the processor with the texts and the images named in the conversations.
            return_dict: With `tokenize`, whether to return all inputs of the model in place of `input_ids` only.
            processor_kwargs: With `tokenize`, options of that call, such as `images`.
            **kwargs: `add_generation_prompt`, `continue_final_message`, and variables of the template.

        Raises:
            ValueError: for a conversation with several images, or in the first stage, which has no LLM.
        """
        self.num_placeholders()
        chats, batched = as_batch(conversation)
        if (most := max(map(count_images, chats), default=0)) > 1:
            raise ValueError(f"A conversation has {most} images, but {type(self).__name__} takes one.")
        images = [images_of(chat) for chat in chats]
        template = chat_template or PROMPT_TEMPLATE
        if chat_template or self.chat_template:
            template = self._resolve_chat_template(chat_template)
        flat = in_form_of(template, chats, without_images)
        texts = super().apply_chat_template(flat, IMAGE_TOKEN + template, **kwargs)
        if not tokenize:
            return texts if batched else texts[0]
        # Not left to transformers: it turns an empty content into a list before it renders.
        found = {"images": images} if any(images) else {}
        inputs = self(text=texts, **{**found, **(processor_kwargs or {})})
        return inputs if return_dict else inputs["input_ids"]

    def num_placeholders(self) -> int:
        """Number of placeholders of an image.

        Raises:
            ValueError: in the first stage, which has no LLM.
        """
        if self.num_query_tokens is None:
            raise ValueError("A first-stage processor has no placeholder for images: use a second-stage checkpoint.")
        return self.num_query_tokens

    def prompt_texts(self, instructions: Sequence[str]) -> list[str]:
        """Each instruction as the chat template renders it, up to where the answer begins; without its image."""
        if self.chat_template is None:  # PROMPT_TEMPLATE without Jinja, which takes eight times as long as all the rest
            return [f"{text.rstrip()}\n" if text.strip() else "" for text in instructions]
        chats = [[{"role": "user", "content": text}] for text in instructions]
        return self._rendered(chats, add_generation_prompt=True)

    def answer_texts(self, instructions: Sequence[str], answers: Sequence[str]) -> list[str]:
        """The rendered text after each prompt: the answer and the end of its turn, without the end token.

        Raises:
            ValueError: if the template renders a prompt differently once an answer follows.
        """
        if self.chat_template is None:
            return list(answers)
        turns = [
            [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            for text, answer in zip(instructions, answers, strict=True)
        ]
        found = []
        for prompt, whole, answer in zip(self.prompt_texts(instructions), self._rendered(turns), answers, strict=True):
            if not whole.startswith(prompt):
                raise ValueError(
                    f"The chat template renders the prompt {prompt!r} differently once an answer follows: {whole!r}. "
                    "Use a template whose prompts are the beginnings of its conversations."
                )
            before, text, after = whole.removeprefix(prompt).rpartition(answer)
            found.append(before + text + after.rstrip().removesuffix(self.tokenizer.eos_token or ""))
        return found

    def prompt_tokens(
        self,
        texts: Sequence[str],
        is_encoder_decoder: bool | None = None,
        places: Sequence[str] | None = None,
        **options,
    ) -> list[list[int]]:
        """Token ids of rendered prompts: placeholders, begin token, text.

        Args:
            texts: Prompts without their images, such as those of `prompt_texts`.
            is_encoder_decoder: Whether the LLM has an encoder; the processor's own `is_encoder_decoder` by default.
            places: Names of the texts in errors.
            **options: Options of the tokenizer's call. `max_length`, of `truncation`, counts the placeholders.

        Raises:
            ValueError: if a text has an image placeholder, or `max_length` leaves no room for a text.
        """
        if is_encoder_decoder is None:
            is_encoder_decoder = self.is_encoder_decoder
        before, after = added_tokens(self.tokenizer) if options.get("add_special_tokens", True) else ([], [])
        begin = self.tokenizer.bos_token
        if begin and self.tokenizer.bos_token_id in before:  # a template may have written it
            texts = [text.removeprefix(begin) for text in texts]
        ends = after if is_encoder_decoder is False else []
        length = options.pop("max_length", None)
        if options.get("truncation"):
            length = self.tokenizer.model_max_length if length is None else length
            options["max_length"] = length - self.num_placeholders() + len(ends)
            if options["max_length"] <= len(before) + len(after):
                raise ValueError(
                    f"max_length={length} leaves no room for a text after {self.num_placeholders()} placeholders and "
                    "the begin token: raise max_length."
                )
        rows = self.tokenizer(list(texts), **options)["input_ids"]
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if self.image_token_id in row:
                where = f"text {number}" if places is None else places[number]
                said = shown(text)
                raise ValueError(
                    f"{where} has the image placeholder in its text: {said}. Remove it; the image comes first."
                )
        rows = [row[: len(row) - len(ends)] for row in rows]
        placeholders = [self.image_token_id] * self.num_placeholders()
        return [placeholders + row for row in rows]

    def answer_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of answers, such as those of `answer_texts`, each with the end token."""
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*row, self.tokenizer.eos_token_id] for row in rows]

    def qformer_tokens(self, texts: Sequence[str], **options) -> dict[str, torch.Tensor]:
        """Inputs of the Q-Former for rendered prompts; none, since BLIP-2's reads images only."""
        return {}

    def _rendered(self, chats: list[list[dict]], **options) -> list[str]:
        """Texts of conversations without images."""
        return super().apply_chat_template(
            in_form_of(self.chat_template, chats, flat_content), self.chat_template, **options
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image."""
        return IMAGE_TOKEN * self.num_placeholders()


class VlmInstructBlipProcessor(VlmBlip2Processor):
    """Prepares images and instructions for InstructBLIP.

    Args:
        image_processor: A [`VlmImageProcessor`].
        tokenizer: The LLM's with the placeholder `<image>`.
        qformer_tokenizer: BERT's, by which the Q-Former reads the instruction; it pads to the right.
        num_query_tokens: How many placeholders `<image>` becomes.
        is_encoder_decoder, chat_template, follows_chat_template: See [`VlmBlip2Processor`].

    Calling it with `images=` and `text=` also gives `qformer_input_ids` and `qformer_attention_mask`, of the texts
    without their `<image>`.
    """

    def __init__(
        self,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int | None = None,
        is_encoder_decoder: bool | None = None,
        chat_template: str | None = None,
        follows_chat_template: bool = False,
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            num_query_tokens,
            is_encoder_decoder=is_encoder_decoder,
            chat_template=chat_template,
            follows_chat_template=follows_chat_template,
            qformer_tokenizer=qformer_tokenizer,
            **kwargs,
        )

    @classmethod
    def from_blip2(
        cls, processor: VlmBlip2Processor, qformer_tokenizer: PreTrainedTokenizerBase
    ) -> "VlmInstructBlipProcessor":
        """Builds the processor that belongs to [`VlmInstructBlipForConditionalGeneration.from_blip2`].

        Args:
            processor: The processor of BLIP-2's second stage.
            qformer_tokenizer: BERT's tokenizer.
        """
        return cls(
            processor.image_processor,
            processor.tokenizer,
            qformer_tokenizer,
            num_query_tokens=processor.num_query_tokens,
            is_encoder_decoder=processor.is_encoder_decoder,
            chat_template=processor.chat_template,
            follows_chat_template=processor.chat_template is not None,
        )

    def qformer_tokens(self, texts: Sequence[str], **options) -> dict[str, torch.Tensor]:
        """`qformer_input_ids` and `qformer_attention_mask` `(texts, longest text)` of rendered prompts.

        Args:
            texts: The rendered prompts.
            **options: Options of the LLM's tokenizer's call; those of padding and truncation apply.

        Raises:
            ValueError: if a text is longer than the Q-Former reads, unless `truncation` is set.
        """
        tokenizer = self.qformer_tokenizer
        stripped = [text.strip() for text in texts]
        longest = tokenizer.model_max_length
        known = ("padding", "max_length", "pad_to_multiple_of", "truncation", "return_tensors")
        options = {name: options[name] for name in known if name in options}
        options = {"padding": "longest", "return_tensors": "pt", "padding_side": "right", **options}
        if options.get("max_length") is not None:
            options["max_length"] = min(options["max_length"], longest)
        tokens = tokenizer(stripped, **options)
        lengths = [int(sum(mask)) for mask in tokens["attention_mask"]]
        if max(lengths) > longest:
            number = lengths.index(max(lengths))
            raise ValueError(
                f"Instruction {number} of the batch has {lengths[number]} tokens, but the Q-Former reads"
                f" {longest}: shorten it."
            )
        return {f"qformer_{name}": tokens[name] for name in ("input_ids", "attention_mask")}


__all__ = ["PROMPT_TEMPLATE", "VlmBlip2Processor", "VlmInstructBlipProcessor"]
