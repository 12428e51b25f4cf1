"""Messages as texts: parts keep their order, unknown types are refused by name, an absent content stays absent."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm.data.sources.conversations import read_conversation
from hf_vlm.models.messages import count_images, flat_content, images_of, without_images

IMAGE = {"type": "image"}
PROCESSORS = {
    "blip2": tiny_blip2.stage2_processor,
    "instructblip": tiny_blip2.instruct_processor,
    "llava": tiny_llava.llava_processor,
}
IN_PARTS = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} | {% endfor %}"
)
IN_TEXTS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}CALL {{ call }}{% endfor %} | {% endfor %}"
)


def text(words: str | None) -> dict:
    return {"type": "text", "text": words}


ORDERS = [
    ([IMAGE, text("a red cat")], "<image>\na red cat"),  # LLaVA's layout
    ([IMAGE, IMAGE, text("a red cat")], "<image>\n<image>\na red cat"),
    ([text("A: "), IMAGE, text("B: "), IMAGE], "A: <image>B: <image>"),
    ([text("a red "), IMAGE, text("cat")], "a red <image>cat"),
    ([IMAGE, text("one "), IMAGE, text(" two")], "<image>\none <image> two"),
    ([text("x"), IMAGE, IMAGE], "x<image><image>"),
    ([IMAGE], "<image>\n"),
    ([text(""), IMAGE, text("x")], "<image>\nx"),
    ([text(None), text("x"), {"type": "text"}], "x"),
    ([{"type": "image_url", "image_url": {"url": "a.png"}}, text("x")], "<image>\nx"),
    ([text("a <image> in words")], "a <image> in words"),
    ("a <image> b", "a <image> b"),
    ([], ""),
]


@pytest.mark.parametrize(("content", "expected"), ORDERS)
def test_parts_keep_their_order(content, expected: str) -> None:
    assert flat_content(content) == expected
    assert count_images([{"role": "user", "content": content}]) == expected.count("<image>")


@pytest.mark.parametrize(("content", "expected"), ORDERS[:9])
@pytest.mark.parametrize("template", [IN_TEXTS, IN_PARTS], ids=["texts", "parts"])
def test_llava_renders_the_parts_in_their_order(content, expected: str, template: str) -> None:
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "a dog"}]
    found = tiny_llava.llava_processor().apply_chat_template(chat, chat_template=template)
    assert found == f"user: {expected} | assistant: a dog | "


@pytest.mark.parametrize("template", [None, IN_TEXTS, IN_PARTS], ids=["default", "texts", "parts"])
@pytest.mark.parametrize("family", ["blip2", "instructblip"])
def test_blip2_renders_the_words_in_their_order(family: str, template: str | None) -> None:
    """Its image comes first, wherever the conversation has it."""
    chat = [{"role": "user", "content": [text("a red "), IMAGE, text("\ncat")]}]
    found = PROCESSORS[family]().apply_chat_template(chat, chat_template=template)
    assert found == ("<image>a red \ncat\n" if template is None else "<image>user: a red \ncat | ")
    assert without_images([text("a <image>"), IMAGE, text("b")]) == "a b"
    assert without_images("<image>\na <image>b") == "a b"


def test_a_row_is_trained_as_the_processor_asks() -> None:
    for content, expected in [*ORDERS[:5], ORDERS[6]]:
        if content == [IMAGE]:
            continue
        answer = {"role": "assistant", "content": "a dog"}
        images = [tiny.image()] * expected.count("<image>")
        row = read_conversation({"messages": [{"role": "user", "content": content}, answer], "images": images}, "row")
        assert row["messages"][0]["content"] == expected


@pytest.mark.parametrize(
    "part", [{"type": "video"}, {"type": "audio", "url": "a.wav"}, {"text": "x"}, "a text", 5, {"type": ["image"]}]
)
@pytest.mark.parametrize("family", PROCESSORS)
def test_other_parts_are_refused_by_their_type(family: str, part) -> None:
    chat = [{"role": "user", "content": [IMAGE, part, text("what happens?")]}]
    with pytest.raises(ValueError, match="Message 0 has a part of type") as caught:
        PROCESSORS[family]().apply_chat_template(chat)
    assert repr(part.get("type") if isinstance(part, dict) else part) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="row 7, turn 0 has a part of type"):
        read_conversation({"messages": [*chat, {"role": "assistant", "content": "a"}], "images": [0]}, "row 7")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "Message 1 has the content 5: write a text, or a list of parts"),
        ({"type": "text", "text": "a"}, "Message 1 has the content {'type': 'text', 'text': 'a'}: write a text"),
        ([text(5)], "Message 1 has the part {'type': 'text', 'text': 5}: write"),
        (["x" * 999], r"Message 1 has a part of type '(x+)\.\.\. \(921 more characters\)"),
    ],
)
@pytest.mark.parametrize("family", PROCESSORS)
def test_other_contents_are_refused(family: str, content, message: str) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    with pytest.raises(ValueError, match=message):
        PROCESSORS[family]().apply_chat_template(chat)


CALL = {"role": "assistant", "tool_calls": [{"name": "look"}]}
ABSENT = [
    CALL,
    {**CALL, "content": None},
    {"role": "user", "content": [text(None)]},
    {"role": "user", "content": []},
    {"role": "user", "content": ""},
]


@pytest.mark.parametrize("message", ABSENT)
@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("template", [None, IN_TEXTS, IN_PARTS], ids=["default", "texts", "parts"])
def test_absent_contents_are_rendered_as_transformers_does(family: str, message: dict, template: str | None) -> None:
    processor = PROCESSORS[family]()
    chat = [{"role": "user", "content": [text("a cat")]}, message, {"role": "assistant", "content": "a dog"}]
    found = processor.apply_chat_template(chat, chat_template=template)
    assert "None" not in found
    if template is not None:
        content = message.get("content")
        kept = {name: value for name, value in message.items() if value is not None}
        flat = [{**turn, "content": flat_content(turn["content"])} if turn.get("content") else turn for turn in chat]
        flat[1] = {**kept, **({} if content is None else {"content": ""})}
        if template == IN_PARTS:
            flat = [{**turn, "content": [text(turn.get("content", ""))]} for turn in flat]
        expected, _ = render_jinja_template([flat], chat_template=template)
        assert found.removeprefix("<image>") == expected[0]
    assert ("CALL" in found) == (template == IN_TEXTS and "tool_calls" in message)


def test_images_of_parts_without_an_image_are_passed_separately() -> None:
    stored = {"type": "image", "image": None, "url": None, "text": None}  # an Arrow table fills the fields
    chat = [{"role": "user", "content": [stored, text("x"), {**stored, "image": "a.png"}]}, CALL]
    assert images_of(chat) == ["a.png"]
    assert count_images(chat) == 2
    with pytest.raises(ValueError, match="A conversation has 2 images, but VlmBlip2Processor takes one"):
        tiny_blip2.stage2_processor().apply_chat_template(chat)
