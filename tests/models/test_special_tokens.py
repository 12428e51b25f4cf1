"""Begin and end tokens: one begin token for each text, no end token after a prompt, whatever the tokenizer adds."""

import pytest
import torch
from tokenizers import processors
from transformers import ProcessorMixin

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm.data import ConversationCollator
from hf_vlm.models.chat_templates import added_tokens

ADDED = {
    "begin": ("<start> $A", [tiny.START], []),
    "end": ("$A <end>", [], [tiny.END]),
    "both": ("<start> $A <end>", [tiny.START], [tiny.END]),
    "twice": ("<start> $A <end> <end>", [tiny.START], [tiny.END, tiny.END]),
    "neither": ("$A", [], []),
}
FAMILIES = {
    "blip2": tiny_blip2.stage2_processor,
    "instructblip": tiny_blip2.instruct_processor,
    "llava": tiny_llava.llava_processor,
}
PHI3 = (
    "{% for message in messages %}{{ 'a ' + message['role'] + ' ' + message['content'] + ' two\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a assistant ' }}{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {
    "Phi-3": PHI3,  # the end token stands at the end of a conversation only, unless an answer is to come
    "Vicuna": None,
    "ChatML": tiny_llava.CHATML,
    "Mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'left ' + message['content']"
        " + ' right ' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}


def with_post_processor(processor: ProcessorMixin, kind: str) -> ProcessorMixin:
    special = [("<start>", tiny.START), ("<end>", tiny.END)]
    around = processors.TemplateProcessing(single=ADDED[kind][0], special_tokens=special)
    processor.tokenizer.backend_tokenizer.post_processor = around
    return processor


def words(texts: str) -> list[int]:
    return [tiny.VOCABULARY.index(word) for word in texts.split()]


@pytest.mark.parametrize("kind", ADDED)
def test_what_a_tokenizer_adds(kind: str) -> None:
    tokenizer = with_post_processor(tiny_llava.llava_processor(), kind).tokenizer
    assert added_tokens(tokenizer) == ADDED[kind][1:]
    tokenizer.backend_tokenizer.model.unk_token = "."  # a letter that is no token of its own
    assert added_tokens(tokenizer) == ADDED[kind][1:]


@pytest.mark.parametrize("texts", [["<start> a cat", "a cat"], ["a cat", "<start>a cat"], ["<start> a cat"]])
@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_begin_token_and_no_end_token(family: str, kind: str, texts: list[str]) -> None:
    processor = with_post_processor(FAMILIES[family](), kind)
    marks = [] if family == "llava" else [tiny_blip2.IMAGE_TOKEN_ID] * tiny_blip2.QUERIES
    if family != "llava":
        processor.is_encoder_decoder = False
    inputs = processor(text=[f"<image>{one}" if marks else one for one in texts])
    for number, one in enumerate(texts):
        begin = [tiny.START] if "<start>" in one or ADDED[kind][1] else []
        row = inputs["input_ids"][number][inputs["attention_mask"][number].bool()].tolist()
        assert row == [*marks, *begin, *words("a cat")]


@pytest.mark.parametrize("kind", ["begin", "end", "both"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_prompts_end_where_the_template_ends(family: str, template: str, kind: str) -> None:
    processor = with_post_processor(FAMILIES[family](), kind)
    processor.is_encoder_decoder = False
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": tiny.image()}, *({"type": "text", "text": one},)]}]
        for one in ("a cat", "two dog")
    ]
    options = {"chat_template": TEMPLATES[template], "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)
    assert not (inputs["input_ids"][:, -1] == tiny.END).any()
    assert ((inputs["input_ids"] == tiny.START).sum(dim=1) <= (3 if template == "ChatML" else 1)).all()
    for number, chat in enumerate(chats):
        alone = processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
        row = inputs["input_ids"][number][inputs["attention_mask"][number].bool()]
        assert torch.equal(row, alone["input_ids"][0])


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("template", TEMPLATES)
def test_each_answer_is_learned_with_its_end(template: str, kind: str) -> None:
    processor = with_post_processor(tiny_llava.llava_processor(), kind)
    collator = ConversationCollator(processor, chat_template=TEMPLATES[template])
    messages = talk("a red cat", "two dog", "the left", "a house", "on the tree", "blue")
    batch = collator([{"messages": messages, "images": []}])
    ids = batch["input_ids"][0].tolist()
    starts = [i for i, label in enumerate(batch["labels"][0].tolist()) if label != -100]
    spans: list[list[int]] = []
    for i in starts:
        if spans and spans[-1][-1] == i - 1:
            spans[-1].append(i)
        else:
            spans.append([i])
    learned = [[ids[i] for i in span] for span in spans]
    end = words("two") if template == "Phi-3" else [tiny.END]
    last = [*end, tiny.END] if template == "Phi-3" else end
    assert learned == [[*words("two dog"), *end], [*words("a house"), *end], [*words("blue"), *last]]
    assert ids.count(tiny.START) == (6 if template == "ChatML" else bool(ADDED[kind][1]) or template == "Mistral")
    assert collator.length({"messages": messages, "images": []}) == len(ids)
    asked = processor.apply_chat_template(
        messages[:3], chat_template=TEMPLATES[template], add_generation_prompt=True, tokenize=True
    )[0].tolist()
    assert ids[: len(asked)] == asked


def test_answers_that_nothing_ends_are_refused() -> None:
    """The end token of the whole would be the only one: the model would not learn to stop after an earlier answer."""
    plain = (
        "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    collator = ConversationCollator(tiny_llava.llava_processor(), chat_template=plain)
    with pytest.raises(ValueError, match="sample 0 of the batch: the chat template renders turn 1 differently"):
        collator([{"messages": talk("a", "dog", "the", "tree"), "images": []}])
