"""A chat template of one's own, for each family with an LLM: training, evaluation and users get the same tokens."""

from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoProcessor, ProcessorMixin

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm import VlmBlip2Processor, VlmInstructBlipProcessor
from hf_vlm.data import PROMPT_END, ConversationCollator, PromptCollator, prompt_inputs
from hf_vlm.models.processing_blip2 import PROMPT_TEMPLATE

INSTRUCTIONS = ["a red cat", "", "where the green dog ", "  two"]
RESPONSES = ["two dog", "the tree", "on the left", "blue"]
# Thrown away after this test: no file of the package knows it.
THROW_AWAY = (
    "{{ bos_token }}a house {% for message in messages %}"
    "{% if message['role'] == 'user' %}left {{ message['content'] }} right {% else %}{{ message['content'] }} and "
    "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"
)
IN_PARTS = (
    "{% for message in messages %}left {% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %} right {% endfor %}"
)
FAMILIES = {"blip2": tiny_blip2.stage2_processor, "instructblip": tiny_blip2.instruct_processor}


def chat(instruction: str, response: str | None = None, image: bool = True) -> list[dict]:
    asked = [{"type": "image"}] * image + [{"type": "text", "text": instruction}]
    answer = [] if response is None else [{"role": "assistant", "content": response}]
    return [{"role": "user", "content": asked}, *answer]


def trained_rows(processor: ProcessorMixin, is_encoder_decoder: bool = False) -> list[dict]:
    """What a model of the processor is trained with: tokens of each prompt, learned tokens, the Q-Former's tokens."""
    rows = [
        {"image": tiny.image(seed=number), "instruction": instruction, "response": response}
        for number, (instruction, response) in enumerate(zip(INSTRUCTIONS, RESPONSES, strict=True))
    ]
    options = {"with_qformer": isinstance(processor, VlmInstructBlipProcessor)}
    batch = PromptCollator(processor, is_encoder_decoder=is_encoder_decoder, **options)(rows)
    found = []
    for number in range(len(rows)):
        ids = batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist()
        learned = [label for label in batch["labels"][number].tolist() if label != -100]
        row = {"prompt": ids if is_encoder_decoder else ids[: len(ids) - len(learned)], "learned": learned}
        if options["with_qformer"]:
            mask = batch["qformer_attention_mask"][number].bool()
            row["qformer"] = batch["qformer_input_ids"][number][mask].tolist()
        found.append(row)
    return found


def unpadded(inputs: dict, number: int, prefix: str = "") -> list[int]:
    return inputs[f"{prefix}input_ids"][number][inputs[f"{prefix}attention_mask"][number].bool()].tolist()


@pytest.mark.parametrize("template", [None, THROW_AWAY, IN_PARTS], ids=["default", "own", "parts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blip2_is_asked_in_the_tokens_of_its_training(family: str, template: str | None) -> None:
    processor = FAMILIES[family]()
    processor.chat_template = template
    pictures = [tiny.image(seed=number) for number in range(len(INSTRUCTIONS))]
    texts = processor.apply_chat_template([chat(text) for text in INSTRUCTIONS], add_generation_prompt=True)
    own_call = processor(images=pictures, text=texts)
    chats = [chat(text) for text in INSTRUCTIONS]
    for turns, picture in zip(chats, pictures, strict=True):
        turns[0]["content"][0] = {"type": "image", "image": picture}
    in_one = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    evaluated = prompt_inputs(processor, INSTRUCTIONS, with_qformer=family == "instructblip")
    for number, row in enumerate(trained_rows(processor)):
        for inputs in (own_call, in_one, evaluated):
            assert unpadded(inputs, number) == row["prompt"]
            if family == "instructblip":
                assert unpadded(inputs, number, "qformer_") == row["qformer"]
    assert torch.equal(in_one["pixel_values"], own_call["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_what_the_tokenizer_puts_after_a_text_is_read_by_encoders_alone(family: str, is_encoder_decoder: bool) -> None:
    processor = FAMILIES[family]()
    special = [("<start>", tiny.START), ("<end>", tiny.END)]
    around = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    processor.tokenizer.backend_tokenizer.post_processor = around
    processor.is_encoder_decoder = is_encoder_decoder
    inputs = processor(text=[f"<image>{text.rstrip()}{PROMPT_END}" if text else "<image>" for text in INSTRUCTIONS])
    for number, row in enumerate(trained_rows(processor, is_encoder_decoder)):
        assert unpadded(inputs, number) == row["prompt"]
        assert (row["prompt"][-1] == tiny.END) == is_encoder_decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_of_ones_own_is_learned_saved_and_loaded(family: str, tmp_path: Path) -> None:
    processor = FAMILIES[family]()
    plain = trained_rows(processor)
    processor.chat_template = THROW_AWAY
    words = [tiny.VOCABULARY.index(word) for word in "a house left a red cat right".split()]
    rows = trained_rows(processor)
    placeholders = [processor.image_token_id] * tiny_blip2.QUERIES
    assert rows[0]["prompt"] == [*placeholders, tiny.START, *words]
    assert rows[0]["learned"] == [*plain[0]["learned"][:-1], tiny.VOCABULARY.index("and"), tiny.END]
    processor.save_pretrained(tmp_path)
    assert trained_rows(AutoProcessor.from_pretrained(tmp_path)) == rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_llms_own_template_is_followed_only_where_it_is_chosen(family: str, tmp_path: Path) -> None:
    """Checkpoints contain it because the tokenizer has it, and were trained without it."""
    processor = FAMILIES[family]()
    plain = trained_rows(processor)
    processor.tokenizer.chat_template = THROW_AWAY
    processor.save_pretrained(tmp_path / "unasked")
    loaded = AutoProcessor.from_pretrained(tmp_path / "unasked")
    assert loaded.chat_template is None
    assert trained_rows(loaded) == plain
    processor.chat_template = THROW_AWAY
    processor.save_pretrained(tmp_path / "chosen")
    assert AutoProcessor.from_pretrained(tmp_path / "chosen").chat_template == THROW_AWAY


def test_instructblip_keeps_what_blip2_has_learned() -> None:
    before = tiny_blip2.stage2_processor()
    before.chat_template, before.is_encoder_decoder = THROW_AWAY, False
    after = VlmInstructBlipProcessor.from_blip2(before, tiny_blip2.bert_tokenizer())
    assert (after.chat_template, after.is_encoder_decoder) == (THROW_AWAY, False)
    assert after.num_query_tokens == before.num_query_tokens


def test_the_default_template_is_the_layout_of_earlier_checkpoints() -> None:
    processor = tiny_blip2.stage2_processor()
    assert processor.prompt_texts(INSTRUCTIONS) == ["a red cat\n", "", "where the green dog\n", "  two\n"]
    assert processor.answer_texts(INSTRUCTIONS, RESPONSES) == RESPONSES
    with_jinja = tiny_blip2.stage2_processor()
    with_jinja.chat_template = PROMPT_TEMPLATE
    assert with_jinja.prompt_texts(INSTRUCTIONS) == processor.prompt_texts(INSTRUCTIONS)
    assert with_jinja.answer_texts(INSTRUCTIONS, RESPONSES) == RESPONSES
    assert repr(PROMPT_END)[1:-1] in PROMPT_TEMPLATE
    two = [*chat("a red cat", "two dog"), *chat("the tree", image=False)]
    assert processor.apply_chat_template(two) == "<image>a red cat\ntwo dog<end>the tree\n"


def test_wrong_conversations_are_refused() -> None:
    processor = tiny_blip2.stage2_processor()
    two = [{"role": "user", "content": [{"type": "image", "url": "a"}, {"type": "image", "url": "b"}]}]
    with pytest.raises(ValueError, match="A conversation has 2 images, but VlmBlip2Processor takes one"):
        processor.apply_chat_template(two)
    processor.chat_template = "{% if messages|length == 1 %}red{% else %}blue{% endif %}"
    with pytest.raises(ValueError, match="renders the prompt 'red' differently once an answer follows: 'blue'"):
        processor.answer_texts(["a"], ["tree"])
    with pytest.raises(ValueError, match="no placeholder for images"):
        VlmBlip2Processor(tiny_blip2.image_processor(), tiny_blip2.bert_tokenizer()).apply_chat_template(two[:0])


def test_llava_is_asked_in_the_tokens_of_its_training() -> None:
    processor = tiny_llava.llava_processor()
    processor.chat_template = THROW_AWAY
    picture = tiny.image()
    row = {"images": [picture], "messages": [{"role": "user", "content": "<image>\na red cat"}]}
    row["messages"].append({"role": "assistant", "content": "two dog"})
    batch = ConversationCollator(processor)([row])
    text = processor.apply_chat_template(chat("a red cat"), add_generation_prompt=True)
    prompt = processor(images=[picture], text=[text])["input_ids"][0].tolist()
    assert batch["input_ids"][0, : len(prompt)].tolist() == prompt
    learned = [label for label in batch["labels"][0].tolist() if label != -100]
    assert learned == [tiny.VOCABULARY.index(word) for word in ("two", "dog", "and")] + [tiny.END]
