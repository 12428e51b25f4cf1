"""Questions asked of LLaVA: what those about an image have in common is read once, and no answer is another."""

import pytest
import torch

from cases import tiny, tiny_llava
from hf_vlm.evaluation import answer_questions, chat
from hf_vlm.evaluation.chat import answer_by_chat, shared_beginnings
from hf_vlm.evaluation.prompts import prompting_of

QUESTIONS = ["a red cat", "tree", "two dog on the left of the house", "a", "the blue house", "two", "tree on the cat"]
IMAGE_OF = [1, 0, 1, 0, 2, 1, 0]
GREEDY = {
    "max_new_tokens": 6,
    "do_sample": False,
    "suppress_tokens": [tiny.PAD, tiny.UNK, tiny.START, tiny.END, *range(len(tiny.VOCABULARY), 64)],
}
IMAGE_LAST = "{% for message in messages %}{{ message['content'].split('\\n')[::-1] | join(' ') }}{% endfor %}"


@pytest.fixture(params=[False, True], ids=["one view", "tiles"])
def parts(request):
    """A model, its processor, and three images, which have different numbers of tokens where there are tiles."""
    processor = tiny_llava.llava_processor(request.param)
    processor.chat_template = tiny_llava.CHATML
    images = [tiny.image(width, height, seed=width) for width, height in tiny_llava.SIZES[:3]]
    return tiny_llava.llava_model(anyres=request.param), processor, images


def alone(model, processor, images, number: int, **options) -> str:
    return answer_by_chat(
        model, processor, [images[IMAGE_OF[number]]], [QUESTIONS[number]], [0], **{**GREEDY, **options}
    )[0]


def passes(model) -> list[int]:
    """Fills with the tokens of every pass through the LLM."""
    found: list[int] = []
    layer = model.model.language_model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[0] * inputs[0].shape[1]))
    return found


def test_answers_are_those_of_one_question_alone(parts, monkeypatch):
    model, processor, images = parts
    expected = [alone(*parts, number) for number in range(len(QUESTIONS))]
    assert len(set(expected)) > 1
    tokens = passes(model)
    assert answer_by_chat(model, processor, images, QUESTIONS, IMAGE_OF, **GREEDY) == expected
    shared = sum(tokens)
    tokens.clear()
    monkeypatch.setattr(chat, "shared_beginnings", lambda *_: {})
    assert answer_by_chat(model, processor, images, QUESTIONS, IMAGE_OF, **GREEDY) == expected
    assert shared < 0.8 * sum(tokens)


def test_the_shared_beginning_changes_no_logit(parts):
    """The logits behind each prompt are those of the prompt by itself."""
    model, processor, images = parts
    chats = [[{"role": "user", "content": f"<image>\n{question}"}] for question in QUESTIONS]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(images=[images[row] for row in IMAGE_OF], text=texts)
    seen = [model.get_image_features(**dict(processor(images=[one]))).pooler_output[0] for one in images]
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        made = shared_beginnings(model, prompts, seen, IMAGE_OF, processor.tokenizer.pad_token_id)
        begun = made["past_key_values"].get_seq_length()
        positions = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        ours = model(
            made["input_ids"][:, begun:],
            attention_mask=made["attention_mask"],
            position_ids=positions[:, begun:],
            past_key_values=made["past_key_values"],
        ).logits[:, -1]
        theirs = [
            model(**processor(images=[images[row]], text=[text])).logits[0, -1]
            for row, text in zip(IMAGE_OF, texts, strict=True)
        ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-5)


def test_beams_and_a_template_with_the_image_last_are_asked_without_it(parts):
    model, processor, images = parts
    expected = [alone(*parts, number, num_beams=2) for number in range(len(QUESTIONS))]
    assert answer_by_chat(model, processor, images, QUESTIONS, IMAGE_OF, num_beams=2, **GREEDY) == expected
    processor.chat_template = IMAGE_LAST
    expected = [alone(*parts, number) for number in range(len(QUESTIONS))]
    assert answer_by_chat(model, processor, images, QUESTIONS, IMAGE_OF, **GREEDY) == expected


def test_an_llm_that_keeps_a_window_reads_each_prompt_whole():
    """Its cache forgets, so that two prompts cannot begin with the same; nothing is read for nothing."""
    model, processor = tiny_llava.llava_model(llm="gemma2"), tiny_llava.llava_processor()
    model.config.text_config.sliding_window = 8
    processor.chat_template = tiny_llava.CHATML
    images = [tiny.image(40, 36, seed=seed) for seed in range(3)]
    expected = [alone(model, processor, images, number) for number in range(len(QUESTIONS))]
    assert len(set(expected)) > 1
    tokens = passes(model)
    assert answer_by_chat(model, processor, images, QUESTIONS, IMAGE_OF, **GREEDY) == expected
    assert len(tokens) == GREEDY["max_new_tokens"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_change_no_answer(parts, batch_size):
    """In whatever order questions come, each gets its own answer; an image that none is about is not looked at."""
    model, processor, images = parts
    expected = [alone(*parts, number) for number in range(len(QUESTIONS))]
    answers = answer_questions(
        model,
        processor,
        [None, *images],
        QUESTIONS,
        [row + 1 for row in IMAGE_OF],
        batch_size,
        prompting=prompting_of(model, processor),
        progress=False,
        **GREEDY,
    )
    assert answers == [text.strip() for text in expected]
