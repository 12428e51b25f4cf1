"""Conversations: readers of the published formats, scenes, and the batches made of them."""

import io
import json
import re
from collections import Counter

import datasets
import pytest
import torch
from PIL import Image

from cases import tiny, tiny_llava
from hf_vlm.data import (
    PLAIN_TEMPLATE,
    CaptionConversations,
    ConversationCollator,
    ConversationRows,
    QuestionConversations,
    SceneConversations,
    SceneRows,
    SceneStream,
    load_conversations,
    open_conversations,
)
from hf_vlm.data.batches import conversation_collator
from hf_vlm.data.batches.conversation_collator import assistant_spans, fill_rows
from hf_vlm.data.builtin.scene_conversations import MOST_SPOKEN, detail, spoken
from hf_vlm.data.builtin.scene_text import phrase
from hf_vlm.data.sources.conversations import read_conversation
from hf_vlm.data.sources.images import ImageError, load_image
from hf_vlm.data.sources.rows import SkipReport
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer

CHATML = (
    "{% for message in messages %}{{ '<start>' + message['role'] + ' ' + message['content'] + '<end>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant ' }}{% endif %}"
)
LLAVA_ROW = {
    "id": "1",
    "image": "coco/1.jpg",
    "conversations": [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And that?"},
        {"from": "gpt", "value": "A dog."},
    ],
}


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_llava_rows_have_the_image_before_the_text_and_stay_in_their_folder(tmp_path):
    row = read_conversation(LLAVA_ROW, "row 1", tmp_path)
    assert [turn["content"] for turn in row["messages"]] == ["<image>\nWhat is this?", "A cat.", "And that?", "A dog."]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
    assert row["images"] == [str(tmp_path / "coco" / "1.jpg")]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_paths_that_lead_out_of_the_folder_are_refused(tmp_path, path):
    with pytest.raises(ValueError, match="row 1: the path leads out of"):
        read_conversation({**LLAVA_ROW, "image": path}, "row 1", tmp_path)
    with pytest.raises(ValueError, match=r"row 1 names the image .* give image_folder"):
        read_conversation({**LLAVA_ROW, "image": path}, "row 1")


@pytest.mark.parametrize(
    "image", [{"path": "/etc/secret.png"}, {"bytes": None, "path": "../b.png"}, {"bytes": "/a.png"}]
)
def test_an_image_as_a_dict_leads_out_no_more_than_a_path(tmp_path, image):
    row = {**LLAVA_ROW, "image": image}
    wrong = "row 1: the path leads out of" if image.get("path") else "row 1: the bytes of the image are '/a.png'"
    with pytest.raises(ValueError, match=wrong):
        read_conversation(row, "row 1", tmp_path)
    stored = {"bytes": b"...", "path": "/etc/secret.png"}
    assert read_conversation({**LLAVA_ROW, "image": stored}, "row 1")["images"] == [stored]
    kept = read_conversation({**LLAVA_ROW, "image": {"path": "a.png"}}, "row 1", tmp_path)
    assert kept["images"] == [str(tmp_path / "a.png")]


def test_parts_that_are_no_text_and_no_image_are_refused():
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "what?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]}
    with pytest.raises(ValueError, match="row 1, turn 0 has a part of type 'image_url'"):
        read_conversation(row, "row 1")


def test_lines_of_json_end_where_lines_end(tmp_path):
    row = {"conversations": [{"from": "human", "value": "a\u2028b"}, {"from": "gpt", "value": "c\x85d"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert load_conversations(tmp_path / "a.jsonl")[0]["messages"] == talk("a\u2028b", "c\x85d")


def test_a_source_says_what_it_is(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([LLAVA_ROW]))
    rows = open_conversations({"path": str(tmp_path / "a.json"), "image_folder": "photos"})
    assert rows[0]["images"] == ["photos/coco/1.jpg"]
    fields = "columns, data_files, image_folder, name, path, revision, split"
    with pytest.raises(ValueError, match=rf"a\.json has 'streaming'; it can have {fields}\."):
        open_conversations({"path": str(tmp_path / "a.json"), "streaming": True})
    talks = datasets.Dataset.from_list([{"messages": talk("who?", name)} for name in ("one", "two")])
    talks.to_parquet(str(tmp_path / "set" / "test-0.parquet"))
    rows = open_conversations({"path": str(tmp_path / "set"), "split": "test"})
    assert [row["messages"][1]["content"] for row in rows] == ["one", "two"]
    with pytest.raises(ValueError, match=f"set has 'weight'; it can have {fields}"):
        open_conversations({"path": str(tmp_path / "set"), "weight": 2})


def test_messages_of_trl_in_parts_and_without_marks():
    parts = [{"type": "image"}, {"type": "text", "text": "a red cat"}]
    row = {"messages": [{"role": "user", "content": parts}, *talk("", "tree")[1:]], "images": [tiny.image()]}
    assert read_conversation(row, "r")["messages"][0]["content"] == "<image>\na red cat"
    unmarked = {"messages": talk("a dog", "tree"), "images": [tiny.image(), tiny.image()]}
    assert read_conversation(unmarked, "r")["messages"][0]["content"] == "<image>\n<image>\na dog"


def test_text_alone_and_a_system_turn():
    row = {"conversations": [{"from": "system", "value": "be kind"}, *LLAVA_ROW["conversations"][2:]]}
    found = read_conversation(row, "r")
    assert found["images"] == []
    assert [turn["role"] for turn in found["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "neither messages nor conversations"),
        ({"messages": talk("a", "b", "c")}, "must alternate"),
        ({"messages": talk("a", "<image>\nb"), "images": [0]}, "cannot contain images"),
        ({"messages": talk("<image>\na", "b")}, "1 <image> in its turns, but 0 images"),
        ({"messages": talk("a", " ")}, "turn 1 has no text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "has the role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"has the role \['user'\]"),
        ({"messages": talk("a", "b")[1:], "images": [0]}, "must alternate"),
        ({"messages": ["a", "b"]}, "turn 0 is 'a'; write a dict with a role and a content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a part of type 'a'"),
        (None, "neither messages nor conversations"),
    ],
)
def test_rows_that_cannot_be_learned_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        ConversationRows([row])[0]


def test_files_of_json_and_jsonl(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([LLAVA_ROW]))
    (tmp_path / "a.jsonl").write_text(json.dumps(LLAVA_ROW) + "\n" + json.dumps(LLAVA_ROW) + "\n")
    assert len(load_conversations(tmp_path / "a.json", tmp_path)) == 1
    assert len(load_conversations(tmp_path / "a.jsonl", tmp_path)) == 2
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_conversations(tmp_path / "b.json")


def test_bad_rows_stop_or_are_left_out_and_counted(tmp_path):
    """The next good row stands in: for a file with images next to it, and for a dataset with images in it."""
    tiny.image().save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    asked = {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "tree"}]}
    rows = [asked | {"image": name} for name in ("good.png", "broken.png", "absent.png")] + [{"image": "good.png"}]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    source = {"path": str(tmp_path / "talk.json"), "image_folder": str(tmp_path)}
    with pytest.raises(ValueError, match=r"Row 3 of .*talk\.json has neither messages nor conversations"):
        open_conversations(source)[3]
    report = SkipReport(max_skipped=1.0)
    found = open_conversations(source, on_error="skip", report=report)
    assert len(found) == len(list(found)) == 4
    assert all(found[index]["images"][0].size == tiny.image().size for index in range(4))
    assert report.count == 3
    assert [error.split(": ")[0].replace(str(tmp_path), "") for error in report.errors] == [
        "/talk.json, row 1 (/broken.png)",
        "/talk.json, row 2 (/absent.png)",
        "Row 3 of /talk.json has neither messages nor conversations",
    ]
    with pytest.raises(ValueError, match="up to 1000 consecutive rows could not be read"):
        ConversationRows(rows[1:3], tmp_path, on_error="skip", report=report)[0]
    for wrong, folder in ((rows[0], None), (asked | {"image": "../good.png"}, tmp_path)):  # of the source, not of a row
        with pytest.raises(ValueError, match=r"give image_folder, and paths that stay within it|leads out of"):
            ConversationRows([wrong, rows[0]], folder, on_error="skip")[0]
    with pytest.raises(ValueError, match="on_error='drop' is unknown"):
        ConversationRows(rows, on_error="drop")


@pytest.mark.parametrize("name", ["image", "images"])
def test_bad_images_within_a_data_set(name, tmp_path):
    """Of whatever kind; and a path, which `datasets` would open, is one that may not leave its folder."""
    text, image = datasets.Value("string"), datasets.Image()
    features = datasets.Features({name: image, "messages": [{"role": text, "content": text}]})
    png = io.BytesIO()
    tiny.image().save(png, "PNG")
    bad = [b"no image", png.getvalue()[:60], None]
    values = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate([*bad, png.getvalue()])]
    values[2] = None
    if name == "images":
        features[name], values = [image], [[value] for value in values]
    messages = [talk("<image> a dog", "tree")] * 4
    datasets.Dataset.from_dict({name: values, "messages": messages}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    report = SkipReport(max_skipped=1.0)
    rows = open_conversations({"path": str(tmp_path)}, on_error="skip", report=report)
    assert [row["images"][0].size for row in (rows[0], rows[0], rows[3])] == [tiny.image().size] * 3
    assert report.count == 3
    with pytest.raises(ImageError, match=r"^1\.png"):
        load_image(open_conversations({"path": str(tmp_path)})[1]["images"][0])
    tiny.image().save(tmp_path / "secret.png")
    values[0] = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    if name == "image":
        values[0] = values[0][0]
    folder = tmp_path / "other"
    datasets.Dataset.from_dict({name: values, "messages": messages}, features=features).to_parquet(folder / "a.parquet")
    with pytest.raises(ValueError, match=r"names the image .*secret\.png': give image_folder"):
        open_conversations({"path": str(folder)})[0]


def scenes(count: int = 60) -> SceneRows:
    return SceneRows(SceneStream("train", 0, 64), count, 16)


@pytest.mark.parametrize("kind", ["conversation", "detail", "reasoning", "short", "caption"])
def test_scene_conversations_are_read_like_any_other(kind):
    rows = SceneConversations(scenes(), kinds={kind: 1.0})
    for number in range(len(rows)):
        row = rows[number]
        assert row == rows[number]
        assert read_conversation(row, "scene")["messages"] == row["messages"]


def test_all_short_questions_about_a_scene_are_one_conversation():
    rows = scenes()
    asked = SceneConversations(rows, kinds={"short": 1.0})
    spoken_to = SceneConversations(rows, kinds={"conversation": 1.0})
    for number in range(len(rows)):
        answers = [turn["content"] for turn in asked[number]["messages"] if turn["role"] == "assistant"]
        known = rows.stream.scene(number)["questions"]
        assert sorted(answers) == sorted(question["answer"] for question in known)
        assert len(spoken_to[number]["messages"]) == 2 * min(len(known), MOST_SPOKEN)


def test_descriptions_in_detail_are_true():
    """Every object in its third of the image, and every relation as given by the boxes."""
    stream, related = scenes().stream, 0
    for number in range(60):
        scene = stream.scene(number)
        first, *others = detail(scene).rstrip(".").split(". ")
        assert f"on {phrase(scene['background'] + ' background')}" in first
        counts = Counter(thing["name"] for thing in scene["objects"])
        assert all(phrase(name, count) in first for name, count in counts.items())
        boxes = {thing["name"]: thing["box"] for thing in scene["objects"]}
        said = Counter()
        for text in others:
            if found := re.fullmatch(r"The (.+) is (to the left of|to the right of|above|below) the (.+)", text):
                (x0, y0, x1, y1), (u0, v0, u1, v1) = boxes[found[1]], boxes[found[3]]
                apart = {"to the left of": u0 - x1, "to the right of": x0 - u1, "above": v0 - y1, "below": y0 - v1}
                assert apart[found[2]] >= 0
                assert counts[found[1]] == counts[found[3]] == 1
                related += 1
            else:
                name, where = re.fullmatch(r"(?:The|One|Another) (.+) is (?:at|on|in) the (.+)", text).groups()
                said[name, where] += 1
        assert said == Counter((thing["name"], third(thing["box"], scene["image"])) for thing in scene["objects"])
    assert related > 20


def third(box: list[int], image: Image.Image) -> str:
    """Where the middle of a box is."""
    column, row = ((box[axis] + box[axis + 2]) / 2 / image.size[axis] for axis in (0, 1))
    rows, columns = ["top", "", "bottom"], ["left", "", "right"]
    return f"{rows[min(int(3 * row), 2)]} {columns[min(int(3 * column), 2)]}".strip() or "centre"


def test_answers_as_sentences_say_what_the_question_asks():
    assert spoken({"question": "Is there a cat in the picture?", "answer": "no"}) == "No, there is no cat in it."
    assert spoken({"question": "Is the background red?", "answer": "yes"}) == "Yes, the background is red."
    asked = {"question": "Is the cat to the left of the dog?", "answer": "no"}
    assert spoken(asked) == "No, the cat is not to the left of the dog."
    asked = {"question": "Is the cat above or below the dog?", "answer": "below"}
    assert spoken(asked) == "The cat is below the dog."
    stream = scenes(200).stream
    for number in range(200):
        for question in stream.scene(number)["questions"]:
            assert spoken(question).endswith(".")


def test_captions_and_questions_as_conversations():
    captions = CaptionConversations(scenes())
    assert captions[3]["messages"][0]["content"] == "<image>"
    assert captions[3]["messages"][1]["content"] in scenes()[3]["caption"]
    questions = [{"question": "a?", "answer": "b", "index": 1}, {"question": "c?", "answer": "d", "index": 1}]
    row = QuestionConversations(questions, [{"image": 0}, {"image": 7}])[0]
    assert row["images"] == [7]
    assert [turn["content"] for turn in row["messages"]][1:] == ["b", "c?", "d"]
    assert row["messages"][0]["content"].startswith("<image>\na?\nAnswer")


def rows() -> list[dict]:
    return [
        {"messages": talk("<image>\nthe red cat", "a dog", "two tree", "house"), "images": [tiny.image()]},
        {"messages": talk("a house", "green"), "images": []},
        {"messages": talk("<image>\nand <image> tree", "blue"), "images": [tiny.image(80, 30), tiny.image(seed=2)]},
    ]


def learned(processor, labels: torch.Tensor) -> str:
    return processor.tokenizer.decode(labels[labels != -100])


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("template", [None, CHATML])
def test_only_what_the_assistant_says_is_learned(template, anyres):
    processor = tiny_llava.llava_processor(anyres)
    batch = ConversationCollator(processor, chat_template=template)(rows())
    assert [learned(processor, row).split() for row in batch["labels"]] == [
        "a dog <end> house <end>".split(),
        "green <end>".split(),
        "blue <end>".split(),
    ]
    images = batch["input_ids"] == processor.image_token_id
    assert not (batch["labels"] == processor.image_token_id).any()
    sizes = [(36, 40), (30, 80), (36, 40)]
    counts = [processor.num_image_tokens(*size) for size in sizes]
    assert images.sum(dim=1).tolist() == [counts[0], 0, counts[1] + counts[2]]
    model = tiny_llava.llava_model(anyres=anyres)
    assert model(**batch).loss > 0


def test_the_plain_template_learns_the_caption_and_its_end():
    processor = tiny_llava.llava_processor()
    row = {"messages": talk("<image>", "a red cat"), "images": [tiny.image()]}
    batch = ConversationCollator(processor, chat_template=PLAIN_TEMPLATE)([row])
    assert learned(processor, batch["labels"][0]) == "a red cat <end>"


@pytest.mark.parametrize("anyres", [False, True])
def test_packed_batches_have_the_loss_and_gradients_of_padded_ones(anyres):
    processor, model = tiny_llava.llava_processor(anyres), tiny_llava.llava_model(anyres=anyres)
    results = []
    for options in ({}, {"packed": True}, {"packed": True, "row_length": 512}):
        batch = ConversationCollator(processor, max_length=400, **options)(rows())
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradients))
        assert ("attention_mask" in batch) == (not options)
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients, results[0][1], atol=1e-5, rtol=1e-4)


def test_rows_are_filled_without_overflow_and_without_loss():
    lengths = [5, 9, 3, 7, 2, 10, 1]
    filled = fill_rows(lengths, 10)
    assert sorted(number for row in filled for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 10 for row in filled)
    assert len(filled) == 4


def test_long_samples_are_cut_at_the_end_but_never_within_an_image(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(conversation_collator.logger, "warning_once", said.append)
    processor = tiny_llava.llava_processor()
    whole = ConversationCollator(processor)(rows()[:1])["input_ids"]
    cut = ConversationCollator(processor, max_length=whole.shape[1] - 3)(rows()[:1])["input_ids"]
    assert torch.equal(cut, whole[:, :-3])
    assert said == [f"Conversations of more than max_length={whole.shape[1] - 3} tokens are truncated."]
    with pytest.raises(ValueError, match=r"sample 0 of the batch: an image of 16 tokens .* exceeds max_length=10"):
        ConversationCollator(processor, max_length=10)(rows()[:1])


@pytest.mark.parametrize("anyres", [False, True])
def test_lengths_are_known_without_opening_the_images(anyres):
    processor = tiny_llava.llava_processor(anyres)
    collator = ConversationCollator(processor)
    side = processor.image_processor.size["height"]
    square = [{**row, "images": [tiny.image(side, side) for _ in row["images"]]} for row in rows()]
    lengths = [len(collator.tokens(row["messages"], row["images"], "a row")[0]) for row in square]
    assert [collator.length({**row, "images": ["not there.png"] * len(row["images"])}) for row in rows()] == lengths
    assert ConversationCollator(processor, max_length=20).length(rows()[2]) == 20


def test_rows_are_grouped_by_length(tmp_path):
    long, short = rows()[0], {"messages": talk("a house", "green"), "images": []}
    mixed = [long if number % 3 else short for number in range(96)]
    collator = ConversationCollator(tiny_llava.llava_processor())
    padding = {}
    for strategy in ("random", "group_by_length"):
        options = {"bf16": "false", "report_to": "none", "per_device_train_batch_size": 4, "seed": 1}
        args = VlmSFTConfig(str(tmp_path), train_sampling_strategy=strategy, **options)
        parts = {"data_collator": collator, "processing_class": collator.processor}
        trainer = VlmSFTTrainer(tiny_llava.llava_model(), args, train_dataset=mixed, **parts)
        padding[strategy] = sum(int((batch["attention_mask"] == 0).sum()) for batch in trainer.get_train_dataloader())
    assert padding["group_by_length"] < padding["random"] / 3


def test_a_template_whose_last_answer_begins_with_a_thought():
    """As Qwen3's: earlier answers are learned as they stand there, the last with its empty thought."""
    thinking = (
        "{% for message in messages %}{{ '<start>' + message['role'] + ' ' }}"
        "{% if loop.last and message['role'] == 'assistant' %}{{ '<think> </think> ' }}{% endif %}"
        "{{ message['content'] + '<end>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>assistant ' }}{% endif %}"
    )
    processor = tiny_llava.llava_processor()

    def render(messages, add_generation_prompt):
        options = {"chat_template": thinking, "add_generation_prompt": add_generation_prompt}
        return processor.apply_chat_template(messages, **options) if messages else ""

    text, spans = assistant_spans(render, talk("who?", "end", "and", "end", "why", "two end"), "row")
    assert [text[start:end] for start, end in spans] == ["end<end>", "end<end>", "<think> </think> two end<end>"]
    assert all(text[:start].endswith("<start>assistant ") for start, _ in spans)


def test_a_template_that_hides_who_speaks_is_refused():
    changing = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="renders turn 1 differently once another follows"):
        ConversationCollator(tiny_llava.llava_processor(), chat_template=changing)(rows()[:1])


@pytest.mark.parametrize(
    ("messages", "images", "marks"),
    [
        (talk("<image>\na cat", "a dog"), 0, 1),
        (talk("<image><image>\na cat", "a dog"), 1, 2),
        (talk("a cat", "a dog", "<image> and", "tree"), 0, 1),
        (talk("<image>\na cat", "a <image> dog"), 1, 2),
        ([{"role": "system", "content": "<image>"}, *talk("<image>\na cat", "a dog")], 1, 2),
        (talk("a cat", "a dog"), 1, 0),  # the image would go to the next row
        (talk("<image>\na cat", "a dog"), 2, 1),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_more_or_fewer_marks_than_images_are_an_error_with_the_row(messages, images, marks, packed):
    """A StopIteration would end the epoch, and the training with it, as if it were finished."""
    bad = {"messages": messages, "images": [tiny.image()] * images}
    collator = ConversationCollator(tiny_llava.llava_processor(), packed=packed)
    expected = f"sample 1 of the batch has {marks} <image> in its turns, but {images} images; make them equal"
    with pytest.raises(ValueError, match=expected):
        collator([rows()[0], bad])


def test_an_image_that_cannot_be_read_is_named_by_its_sample():
    collator = ConversationCollator(tiny_llava.llava_processor())
    for image, place in ((b"no image", "sample 0 of the batch"), ("no.png", r"sample 0 of the batch \(no\.png\)")):
        with pytest.raises(ImageError, match=rf"^{place}: "):
            collator([{**rows()[0], "images": [image]}])


def test_empty_bytes_are_a_bad_row_and_no_path(tmp_path):
    """Not an image that the row names: that is an error of the source, which `skip` does not skip."""
    bad = {"messages": talk("<image>\na cat", "a dog"), "image": {"bytes": b"", "path": "1.png"}}
    good = {**bad, "image": tiny.image()}
    report = SkipReport()
    rows = ConversationRows([good, bad, good], on_error="skip", report=report)
    assert [row["images"][0].size for row in rows] == [tiny.image().size] * 3
    assert "zero bytes" in report.errors[0]
    assert report.reasons == {"unreadable image": 1}
