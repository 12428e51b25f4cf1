"""Evaluation of BLIP-2 and InstructBLIP: every number against one row at a time."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin
from typer.testing import CliRunner

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm import (
    VlmBlip2ForConditionalGeneration,
    VlmBlip2ForImageTextRetrieval,
    VlmBlip2ForPreTraining,
    VlmInstructBlipForConditionalGeneration,
    VlmInstructBlipProcessor,
)
from hf_vlm.cli.main import app
from hf_vlm.data import PROMPT_END, easy_vqa_questions
from hf_vlm.data.builtin.instruction_templates import TRAIN_WORDINGS, UNSEEN_WORDINGS
from hf_vlm.data.sources.conversations import SHORT_ANSWER
from hf_vlm.evaluation import (
    GREY,
    answer_questions,
    caption_report,
    embed_images,
    embed_texts,
    hard_negative_metrics,
    hard_negative_report,
    match_logits,
    rerank_metrics,
    retrieval_metrics,
    retrieval_report,
    similarity_metrics,
    vqa_metrics,
)
from hf_vlm.evaluation.prompts import caption_prompt, prompting_of, question_wording
from hf_vlm.evaluation.tables import format_reports
from hf_vlm.evaluation.task import EvaluationSettings, Evaluator, TestSet
from hf_vlm.evaluation.tasks import run_tasks
from hf_vlm.evaluation.test_sets import (
    AFTER_TRAINING,
    evaluate_checkpoint,
    report_on_easy_vqa,
    report_on_scenes,
    save_scene_report,
)

IMAGES = [tiny.image(seed=seed) for seed in range(7)]
TEXTS = [*tiny.CAPTIONS, "the cat and the dog", "two green cat"]
QUIET = EvaluationSettings(progress=False, beams=1, caption_tokens=6, answer_tokens=4, rerank=3)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1, "eos_token_id": tiny.END}
BLIP2, INSTRUCT = VlmBlip2ForConditionalGeneration, VlmInstructBlipForConditionalGeneration
STAGE1 = [VlmBlip2ForPreTraining, VlmBlip2ForImageTextRetrieval]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def nearest_query(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosines `(I, T)` by a loop over images, texts and the embeddings of an image."""
    rows = [[max(float(torch.cosine_similarity(q, text, dim=0)) for q in image) for text in texts] for image in images]
    return torch.tensor(rows)


@torch.no_grad()
def one_by_one(model: torch.nn.Module, images: list = IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
    """ITC similarities `(images, texts)` and ITM logits `(images, texts, 2)`, each pair by a forward of its own."""
    processor = tiny_blip2.stage1_processor()
    similarities, logits = [], []
    for image in images:
        outputs = [model(**processor(images=[image], text=[text])) for text in TEXTS]
        similarities.append([float((out.image_embeds[0] @ out.text_embeds[0]).max()) for out in outputs])
        logits.append(torch.stack([out.itm_logits[0] for out in outputs]))
    return torch.tensor(similarities), torch.stack(logits)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_the_nearest_query_counts_both_ways(chunk):
    images, texts = 3 * torch.randn(9, 4, 6), torch.randn(14, 6)
    owner = torch.cat([torch.arange(9), torch.randint(9, (5,))])
    expected = similarity_metrics(nearest_query(images, texts), owner, ks=(1, 3), tie_tolerance=1e-6)
    metrics = retrieval_metrics(images.numpy(), texts.numpy(), owner, ks=(1, 3), chunk=chunk)
    assert metrics == pytest.approx(expected)
    # Neither the mean nor the first of the queries would do.
    for other in (images.mean(1), images[:, 0]):
        assert retrieval_metrics(other, texts, owner, ks=(1, 3))["text_to_image_mrr"] != metrics["text_to_image_mrr"]


def test_one_query_is_as_none():
    images, texts = torch.randn(9, 6), torch.randn(9, 6)
    ids = list(range(9))
    assert retrieval_metrics(images[:, None], texts, ids) == retrieval_metrics(images, texts, ids)
    for embeds, message in (
        (torch.randn(9, 2, 5), "image_embeds have size 5, text_embeds 6"),
        (torch.randn(9, 0, 6), "at least one row"),
        (torch.full((9, 2, 6), torch.nan), "NaN or infinity in 18 of 18 rows"),
        (torch.randn(9, 2, 6, 1), r"got \(9, 2, 6, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieval_metrics(embeds, texts, ids)


@pytest.mark.parametrize("k", [1, 3, 100])
def test_the_candidates_of_reranking_are_those_of_the_nearest_query(k):
    images, texts, matching = torch.randn(9, 4, 6), torch.randn(9, 6), torch.randn(9, 9)
    cosines = nearest_query(images, texts)

    def kept(scores: torch.Tensor) -> torch.Tensor:
        """Of each row the k best of the first step, with both scores; the rest last."""
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(min(k, 9)).indices, 1.0).bool()
        both = scores + (matching if scores is cosines else matching.T)
        return both.masked_fill(~chosen, -torch.inf)

    expected = similarity_metrics(
        kept(cosines), list(range(9)), text_similarity=kept(cosines.T.clone()), ks=(1, 3), tie_tolerance=1e-5
    )
    score_pairs = lambda pairs: matching[pairs[:, 0], pairs[:, 1]]  # noqa: E731
    metrics = rerank_metrics(images, texts, score_pairs, list(range(9)), k=k, ks=(1, 3), chunk=4)
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize("head", STAGE1)
def test_stage_one_equals_single_forwards(head):
    model, processor = tiny_blip2.blip2_model(head), tiny_blip2.stage1_processor()
    similarities, logits = one_by_one(model)
    images = embed_images(model, processor, IMAGES, batch_size=3, progress=False)
    texts = embed_texts(model, processor, TEXTS, batch_size=3, progress=False)
    assert images.shape == (len(IMAGES), tiny_blip2.QUERIES, 16)
    torch.testing.assert_close(nearest_query(images, texts), similarities, atol=1e-5, rtol=0)
    pairs = torch.cartesian_prod(torch.arange(len(IMAGES)), torch.arange(len(TEXTS)))
    options = {"batch_size": 5, "image_batch_size": 3, "progress": False}
    matched = match_logits(model, processor, IMAGES, TEXTS, pairs, **options)
    torch.testing.assert_close(matched.view_as(logits), logits, atol=1e-4, rtol=1e-4)
    assert matched.std() > 0.05

    report = retrieval_report(model, processor, IMAGES, TEXTS, rerank=100, ks=(1, 3), progress=False)
    ids = list(range(len(IMAGES)))
    expected = similarity_metrics(similarities, ids, ks=(1, 3), tie_tolerance=1e-6)
    assert {key: report[key] for key in expected} == pytest.approx(expected)
    reranked = similarity_metrics(similarities + logits[..., 1], ids, ks=(1, 3), tie_tolerance=1e-5)
    assert report["reranked"] == pytest.approx(reranked)


def test_hard_negatives_equal_single_forwards():
    model, processor = tiny_blip2.blip2_model(), tiny_blip2.stage1_processor()
    chosen = [[(0, 1, "a"), (2, 3, "b")], [], [(4, 5, "a")], [(6, 0, "b")], [(1, 2, "a")], [(3, 5, "b")], [(5, 0, "a")]]
    hard = [[{"caption": TEXTS[t], "negative": TEXTS[f], "kind": kind} for t, f, kind in of] for of in chosen]
    rows = [(i, *pair) for i, of in enumerate(chosen) for pair in of]
    kinds = [kind for *_, kind in rows]
    report = hard_negative_report(model, processor, IMAGES, hard, matching=True, progress=False)

    def expected(scores: torch.Tensor, blind: bool = False) -> dict[str, float]:
        right, wrong = ([scores[0 if blind else row[0], row[side]] for row in rows] for side in (1, 2))
        return hard_negative_metrics(right, wrong, kinds, tie_tolerance=1e-6)

    similarities, logits = one_by_one(model)
    grey_similarities, grey_logits = one_by_one(model, [GREY])
    by_itc = expected(similarities)
    assert {key: report[key] for key in by_itc} == pytest.approx(by_itc)
    assert report["itm"] == pytest.approx(expected(logits[..., 1] - logits[..., 0]))
    assert report["blind"] == pytest.approx(expected(grey_similarities, blind=True))
    assert report["itm_blind"] == pytest.approx(expected(grey_logits[..., 1] - grey_logits[..., 0], blind=True))
    assert len({report["accuracy"], report["itm"]["accuracy"], report["blind"]["accuracy"]}) > 1


@pytest.mark.parametrize("head", STAGE1)
def test_stage_one_on_scenes(head):
    model, processor = tiny_blip2.blip2_model(head), tiny_blip2.stage1_processor()
    reports = report_on_scenes(model, processor, num_scenes=6, splits=("unseen_style",), size=48, settings=QUIET)
    assert list(reports["unseen_style"]) == ["retrieval", "hard_negatives"]
    assert reports["unseen_style"]["retrieval"]["rerank"] == 3
    assert "itm_blind" in reports["unseen_style"]["hard_negatives"]
    assert "unseen_style, re-ranked" in format_reports(reports)


def with_llm(head: type[PreTrainedModel], llm: str = "llama") -> tuple[PreTrainedModel, ProcessorMixin]:
    """A head with a language model, whose Q-Former reads texts of 64 tokens, and its processor."""
    model = tiny_blip2.blip2_model(head, llm, qformer={"max_position_embeddings": 64})
    processor = tiny_blip2.stage2_processor()
    if head is INSTRUCT:
        reader = tiny_blip2.stage1_processor(max_length=64).tokenizer
        parts = (tiny_blip2.image_processor(), processor.tokenizer, reader, tiny_blip2.QUERIES)
        processor = VlmInstructBlipProcessor(*parts)
    return model, processor


def alone(model: PreTrainedModel, processor: ProcessorMixin, image, instruction: str) -> str:
    """What the model writes about one image, from ids laid out here."""
    parts = re.findall(r"\w+|[^\w\s]+", instruction.lower())
    words = [tiny.VOCABULARY.index(word) if word in tiny.VOCABULARY else tiny.UNK for word in parts]
    inputs = {"input_ids": [tiny_blip2.IMAGE_TOKEN_ID] * tiny_blip2.QUERIES + [tiny.START] + words}
    if isinstance(model, INSTRUCT):
        inputs["qformer_input_ids"] = processor.qformer_tokenizer(instruction)["input_ids"]
    pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    written = model.generate(pixel_values, **{name: torch.tensor([ids]) for name, ids in inputs.items()}, **GREEDY)
    return processor.tokenizer.decode(written[0], skip_special_tokens=True).strip()


LLM_HEADS = [(BLIP2, "llama"), (BLIP2, "opt"), (BLIP2, "t5"), (INSTRUCT, "llama"), (INSTRUCT, "t5")]


@pytest.mark.parametrize(("head", "llm"), LLM_HEADS)
@pytest.mark.parametrize("batch_size", [64, 3])
def test_answers_equal_single_generation(head, llm, batch_size):
    model, processor = with_llm(head, llm)
    questions = ["the cat", "a blue tree on the right of the red house", "house", "two green dog and a cat", ""] * 2
    owner = [3, 0, 0, 6, 3, 1, 1, 1, 0, 5]
    expected = [alone(model, processor, IMAGES[i], text) for i, text in zip(owner, questions, strict=True)]
    read: list[int] = []
    model.model.vision_model.register_forward_hook(lambda _, __, output: read.append(len(output.last_hidden_state)))
    options = {"prompting": prompting_of(model, processor), "progress": False, **GREEDY}
    assert answer_questions(model, processor, IMAGES, questions, owner, batch_size, **options) == expected
    assert sum(read) == len(set(owner))  # every image once, and none that nobody asks about
    assert len(set(expected)) > 1


@pytest.mark.parametrize(("head", "prompt"), [(BLIP2, None), (BLIP2, "the picture of a"), (INSTRUCT, "the image")])
def test_captions_equal_single_generation(head, prompt):
    model, processor = with_llm(head)
    expected = [alone(model, processor, image, prompt or "") for image in [*IMAGES, GREY]]
    options = {"generate_options": GREEDY, "progress": False, "batch_size": 3}
    truths = [[text] for text in TEXTS]
    report, captions = caption_report(
        model, processor, IMAGES, truths, prompt=prompt, prompting=prompting_of(model, processor), **options
    )
    assert captions == expected[:-1]
    assert len(set(captions)) > 1
    again = {"prompt": prompt, "prompting": prompting_of(model, processor), **options}
    assert caption_report(model, processor, [GREY], truths[:1], **again)[1] == expected[-1:]
    assert report["images"] == len(IMAGES)


def test_the_words_of_a_prompt_are_those_of_the_training():
    blip2, instruct = with_llm(BLIP2)[0], with_llm(INSTRUCT)[0]
    assert [caption_prompt(blip2, wordings) for wordings in ("train", "unseen")] == [None, None]
    assert caption_prompt(instruct, "train") == TRAIN_WORDINGS["caption"][0]
    assert caption_prompt(instruct, "unseen") == UNSEEN_WORDINGS["caption"][0]
    assert question_wording(blip2, "train") == "Question: {question} Short answer:"
    assert question_wording(instruct, "train") == TRAIN_WORDINGS["vqa"][0] == "{question}"
    for model in (blip2, instruct):
        assert question_wording(model, "unseen") == UNSEEN_WORDINGS["vqa"][0]
    assert question_wording(tiny.blip_model(), "unseen") == "{question}"
    llava = tiny_llava.llava_model()
    assert question_wording(llava, "train") == SHORT_ANSWER
    assert question_wording(llava, "unseen") == SHORT_ANSWER.format(question=UNSEEN_WORDINGS["vqa"][0])
    model, processor = with_llm(INSTRUCT)
    inputs = prompting_of(model, processor).inputs(["a cat"])
    # The language model reads the end of the prompt, which this tokenizer drops; the Q-Former reads the words alone.
    cat = [*processor.tokenizer("a cat" + PROMPT_END)["input_ids"]]
    assert inputs["input_ids"].tolist() == [[tiny_blip2.IMAGE_TOKEN_ID] * tiny_blip2.QUERIES + cat]
    assert inputs["qformer_input_ids"].tolist() == [processor.qformer_tokenizer("a cat")["input_ids"]]
    assert prompting_of(tiny.blip_model(), tiny.blip_processor()) is None


def asked_of_images() -> list[list[dict[str, str]]]:
    """Questions of two kinds about some of `IMAGES`."""
    return [
        [{"question": TEXTS[(i + j) % 7], "answer": TEXTS[i].split()[-1], "kind": "ab"[j]} for j in range(i % 3)]
        for i in range(len(IMAGES))
    ]


@pytest.mark.parametrize(("head", "seen"), [(BLIP2, "Question: {} Short answer:"), (INSTRUCT, "{}")])
def test_both_wordings_are_measured(head, seen):
    model, processor = with_llm(head)
    # So that a few answers are right: what the model says on the first two images.
    asked = asked_of_images()
    asked[1][0]["answer"] = alone(model, processor, IMAGES[1], seen.format(asked[1][0]["question"]))
    evaluator = Evaluator(
        model, processor, EvaluationSettings(progress=False, beams=1, answer_tokens=5, max_questions=4)
    )
    train = [{"question": "", "answer": "cat", "kind": kind} for kind in "ab"]
    reports = run_tasks(
        evaluator, ["vqa", "vqa_unseen_wordings"], TestSet(IMAGES, questions=asked, train_questions=train)
    )
    rows = [(image, one) for image, of in zip(IMAGES, asked, strict=True) for one in of][:4]
    unseen = UNSEEN_WORDINGS["vqa"][0].replace("{question}", "{}")
    for task, wording in (("vqa", seen), ("vqa_unseen_wordings", unseen)):
        for row, images in ((reports[task], [image for image, _ in rows]), (reports[task]["blind"], [GREY] * 4)):
            texts = [wording.format(one["question"]) for _, one in rows]
            written = [alone(model, processor, *pair) for pair in zip(images, texts, strict=True)]
            expected = vqa_metrics(written, [[one["answer"]] for _, one in rows], [one["kind"] for _, one in rows])
            assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert reports["vqa"]["questions"] == 4
    assert reports["vqa"]["exact_match"] > 0
    assert reports["vqa"]["majority"]["exact_match"] == sum(one["answer"] == "cat" for _, one in rows) / 4


def test_a_language_model_ranks_no_answers():
    model, processor = with_llm(BLIP2)
    ranked = Evaluator(model, processor, EvaluationSettings(rank_answers=True, progress=False))
    with pytest.raises(ValueError, match="A VlmBlip2ForConditionalGeneration cannot rank answers"):
        run_tasks(ranked, ["vqa"], TestSet(IMAGES, questions=asked_of_images()))


@pytest.fixture(scope="module")
def instruct_folder(tmp_path_factory):
    """A checkpoint of InstructBLIP."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("instruct")
    for part in with_llm(INSTRUCT):
        part.save_pretrained(folder)
    return str(folder)


def test_scenes_and_easy_vqa_at_the_end_of_a_recipe(tmp_path, capsys):
    quick = replace(AFTER_TRAINING, max_questions=5, caption_tokens=3, answer_tokens=3, progress=False)
    save_scene_report(tmp_path, *with_llm(INSTRUCT), num_scenes=2, size=48, settings=quick)
    results = json.loads((tmp_path / "results.json").read_text())
    asked = ("vqa", "vqa_unseen_wordings")
    assert list(results) == ["caption", *asked, "pope", *(f"easy_{task}" for task in asked)]
    for task, by_set in results.items():
        assert list(by_set) == (
            ["test"] if task.startswith("easy") else ["unseen_style", "unseen_emoji", "unseen_both"]
        )
        for scores in by_set.values():
            assert "blind" in scores
            assert task == "caption" or (scores["questions"] == 5 and "majority" in scores)
    printed = capsys.readouterr().out
    assert "easy vqa unseen wordings\n" in printed
    assert "test, majority answer" in printed


def test_easy_vqa_on_the_command_line(instruct_folder):
    args = ["evaluate", instruct_folder, "--data", "easy_vqa", "--task", "vqa", "--limit", "12", "--json"]
    report = json.loads(CliRunner().invoke(app, args).stdout)["test"]
    assert list(report) == ["easy_vqa"]
    assert report["easy_vqa"]["questions"] == 12
    again = report_on_easy_vqa(*with_llm(BLIP2), 12, settings=QUIET)["test"]["easy_vqa"]
    assert again["majority"] == report["easy_vqa"]["majority"]  # the same questions
    ((answer, _),) = Counter(asked["answer"] for asked in easy_vqa_questions("train")).most_common(1)
    chosen = random.Random(0).sample(easy_vqa_questions("test"), 12)
    assert again["majority"]["exact_match"] == sum(asked["answer"] == answer for asked in chosen) / 12
    with pytest.raises(ValueError, match="can do retrieval, hard_negatives, zero_shot, but easy_vqa only allows vqa"):
        report_on_easy_vqa(tiny_blip2.blip2_model(), tiny_blip2.stage1_processor())


def test_captions_or_questions_of_ones_own(instruct_folder, tmp_path):
    (tmp_path / "test").mkdir()
    rows = []
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / "test" / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "words": TEXTS[i], "asked": TEXTS[-i], "said": "cat"})
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for columns, tasks in (
        ("caption=words", ["caption"]),
        ("question=asked,answer=said", ["vqa", "vqa_unseen_wordings"]),
    ):
        args = (instruct_folder, str(tmp_path), "test", f"image=image,{columns}", 0)
        assert list(evaluate_checkpoint(*args, settings=QUIET)["test"]) == tasks
    with pytest.raises(ValueError, match=r"has no data for 'caption', only for vqa, vqa_unseen_wordings"):
        evaluate_checkpoint(*args, task="caption", settings=QUIET)
