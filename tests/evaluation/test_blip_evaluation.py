"""BLIP's evaluation: re-ranking and matching against brute force, writing against one row at a time, blind rows."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cases import tiny
from hf_vlm import (
    VlmBlipForConditionalGeneration,
    VlmBlipForImageTextRetrieval,
    VlmBlipForPreTraining,
    VlmBlipForQuestionAnswering,
    VlmBlipModel,
)
from hf_vlm.cli.main import app
from hf_vlm.evaluation import (
    GREY,
    answer_questions,
    caption_images,
    caption_report,
    choose_answers,
    embed_images,
    embed_texts,
    hard_negative_metrics,
    hard_negative_report,
    match_logits,
    rerank_metrics,
    retrieval_report,
    similarity_metrics,
    vqa_report,
)
from hf_vlm.evaluation import test_sets as evaluate
from hf_vlm.evaluation.tables import by_task, format_reports
from hf_vlm.evaluation.task import EvaluationSettings
from hf_vlm.evaluation.test_sets import evaluate_checkpoint, report_on_scenes

PROCESSOR = tiny.blip_processor()
IMAGES = [tiny.image(seed=seed) for seed in range(7)]
TEXTS = [*tiny.CAPTIONS, "the cat and the dog", "a blue tree on the right of the red house", "two green cat", "house"]
QUIET = EvaluationSettings(progress=False, beams=1, caption_tokens=6, answer_tokens=4, rerank=3)
HEADS = [
    VlmBlipForPreTraining,
    VlmBlipForImageTextRetrieval,
    VlmBlipForConditionalGeneration,
    VlmBlipForQuestionAnswering,
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def calls(module: nn.Module) -> list[int]:
    """A list that grows by the batch size whenever the module runs."""
    found: list[int] = []
    module.register_forward_hook(
        lambda _, args, kwargs, __: found.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    return found


def all_pairs_one_by_one(model: nn.Module) -> torch.Tensor:
    """ITM logits `(images, texts, 2)`, each pair by a forward pass of its own."""
    rows = []
    with torch.no_grad():
        for image in IMAGES:
            pixel_values = PROCESSOR(images=[image])["pixel_values"]
            rows.append([model(pixel_values, **PROCESSOR(text=[text])).itm_logits[0] for text in TEXTS])
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("head", [VlmBlipForPreTraining, VlmBlipForImageTextRetrieval])
@pytest.mark.parametrize(("batch_size", "image_batch_size"), [(128, 16), (3, 2), (1, 1)])
def test_match_logits_equal_single_forwards(head, batch_size, image_batch_size):
    model = tiny.blip_model(head)
    expected = all_pairs_one_by_one(model)
    pairs = torch.cartesian_prod(torch.arange(len(IMAGES)), torch.arange(len(TEXTS)))
    pairs = pairs[torch.randperm(len(pairs))[:40]]
    images, keys = calls(model.model.vision_model), calls(model.model.text_encoder.layers[0].cross_attention.key_value)
    options = {"batch_size": batch_size, "image_batch_size": image_batch_size, "progress": False}
    logits = match_logits(model, PROCESSOR, IMAGES, TEXTS, pairs, **options)
    torch.testing.assert_close(logits, expected[pairs[:, 0], pairs[:, 1]], atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.1
    # Every image went through the tower, and its keys were projected, once.
    assert sum(images) == sum(keys) == len(set(pairs[:, 0].tolist())) == len(IMAGES)


def test_match_logits_in_bfloat16_and_errors():
    model = tiny.blip_model()
    options = {"progress": False, "autocast_dtype": torch.bfloat16}
    pairs = [(0, 1), (3, 2)]
    lower = match_logits(model, PROCESSOR, IMAGES, TEXTS, pairs, **options)
    exact = match_logits(model, PROCESSOR, IMAGES, TEXTS, pairs, progress=False)
    assert 0 < (lower - exact).abs().max() < 0.2
    for pairs, message in (
        ([(0, len(TEXTS))], f"there are {len(TEXTS)} texts"),
        ([(len(IMAGES), 0)], f"Row 0 is about image {len(IMAGES)}, but there are only {len(IMAGES)} images"),
        ([(0, 1, 2)], r"shape \(pairs, 2\)"),
        (torch.empty(0, 2, dtype=torch.long), r"shape \(pairs, 2\)"),
        (torch.zeros(1, 2), "must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            match_logits(model, PROCESSOR, IMAGES, TEXTS, pairs, progress=False)


def captioned() -> tuple[list[list[str]], list[int]]:
    """Captions and ids of `IMAGES`: two images share an id, some have two captions."""
    ids = [0, 1, 2, 2, 4, 5, 6]
    return [[TEXTS[0], TEXTS[5]], [TEXTS[1]], [TEXTS[2]], [TEXTS[2], TEXTS[6]], [TEXTS[3]], [TEXTS[4]], TEXTS[7:]], ids


def test_reranking_all_equals_brute_force():
    model = tiny.blip_model(VlmBlipForImageTextRetrieval)
    captions, ids = captioned()
    report = retrieval_report(model, PROCESSOR, IMAGES, captions, ids, rerank=100, ks=(1, 2, 4), progress=False)
    by_text = {text: image_id for image_id, texts in zip(ids, captions, strict=True) for text in texts}
    scores = all_pairs_one_by_one(model)[..., 1]
    images = embed_images(model, PROCESSOR, IMAGES, progress=False)
    scores += images @ embed_texts(model, PROCESSOR, TEXTS, progress=False).T
    expected = similarity_metrics(scores, [by_text[text] for text in TEXTS], ids, ks=(1, 2, 4), tie_tolerance=1e-5)
    assert report["reranked"] == pytest.approx(expected)
    assert report["num_texts"] == len(TEXTS)
    # The first step's numbers are reported too, and equal the ones without re-ranking.
    plain = retrieval_report(model, PROCESSOR, IMAGES, captions, ids, ks=(1, 2, 4), progress=False)
    assert plain == {key: value for key, value in report.items() if key not in ("rerank", "reranked")}
    assert any(report[key] != value for key, value in report["reranked"].items())


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_only_candidates_are_reranked(k, chunk):
    images, texts = torch.randn(20, 6), torch.randn(50, 6)
    owner = torch.cat([torch.arange(20), torch.randint(20, (30,))])
    matching = torch.randn(20, 50)
    asked: Counter = Counter()

    def score_pairs(pairs: torch.Tensor) -> torch.Tensor:
        asked.update(map(tuple, pairs.tolist()))
        return matching[pairs[:, 0], pairs[:, 1]]

    metrics = rerank_metrics(images, texts, score_pairs, owner, k=k, chunk=chunk)
    cosines = nn.functional.normalize(images) @ nn.functional.normalize(texts).T
    total = cosines + matching
    left_out = [rows < rows.topk(k, dim=1).values[:, -1:] for rows in (cosines, cosines.T)]
    by_image, by_text = total.masked_fill(left_out[0], -torch.inf), total.T.masked_fill(left_out[1], -torch.inf)
    assert metrics == pytest.approx(similarity_metrics(by_image, owner, text_similarity=by_text, tie_tolerance=1e-5))
    assert set(asked.values()) == {1}
    assert len(asked) == int((~left_out[0] | ~left_out[1].T).sum())


def test_a_perfect_matcher_repairs_what_is_among_the_candidates():
    """Closed form: all embeddings equal but for noise, a score that knows the truth: recall at 1 is 1 with k = all."""
    images = torch.ones(6, 4) + 0.3 * torch.randn(6, 4)
    texts = torch.ones(6, 4) + 0.3 * torch.randn(6, 4)

    def truth(pairs: torch.Tensor) -> torch.Tensor:
        return 10.0 * (pairs[:, 0] == pairs[:, 1])

    assert rerank_metrics(images, texts, truth, range(6), k=6)["mean_recall"] == 1.0
    found = (images @ texts.T / images.norm(dim=1)[:, None] / texts.norm(dim=1)).topk(2, dim=1).indices
    share = (found == torch.arange(6)[:, None]).any(dim=1).float().mean().item()
    assert 0 < share < 1
    metrics = rerank_metrics(images, texts, truth, range(6), k=2)
    assert metrics["image_to_text_r1"] == pytest.approx(share)
    with pytest.raises(ValueError, match="at least one candidate"):
        rerank_metrics(images, texts, truth, range(6), k=0)


def hard_negatives() -> list[list[dict[str, str]]]:
    def pair(caption: str, negative: str, kind: str) -> dict[str, str]:
        return {"caption": caption, "negative": negative, "kind": kind}

    colour, thing = pair("a red cat", "a blue cat", "colour"), pair("two dog", "two cat", "object")
    return [[colour, thing], [], [pair("tree", "house", "object")], [colour], [thing, colour], [colour], [thing]]


def test_hard_negatives_by_matching_and_blind():
    model = tiny.blip_model()
    with torch.no_grad():  # embeddings around 0, so that the more similar caption depends on the image
        states = model.model.encode_images(PROCESSOR(images=IMAGES)["pixel_values"])
        model.similarity.vision_proj.bias.copy_(-model.similarity.vision_proj.weight @ states[:, 0].mean(dim=0))
    report = hard_negative_report(model, PROCESSOR, IMAGES, hard_negatives(), matching=True, progress=False)
    assert report["pairs"] == report["itm"]["pairs"] == report["itm_blind"]["pairs"] == 8
    # One pair at a time, the log-odds of a match.
    scores, kinds = {"caption": [], "negative": []}, []
    for image, pairs in zip(IMAGES, hard_negatives(), strict=True):
        pixel_values = PROCESSOR(images=[image])["pixel_values"]
        for pair in pairs:
            kinds.append(pair["kind"])
            for key, found in scores.items():
                with torch.no_grad():
                    logits = model(pixel_values, **PROCESSOR(text=[pair[key]])).itm_logits[0]
                found.append(float(logits.softmax(0)[1]))
    assert report["itm"] == pytest.approx(hard_negative_metrics(scores["caption"], scores["negative"], kinds))
    # With grey images, the images have no influence: all pairs with the same texts are equal.
    others = [tiny.image(seed=seed) for seed in range(10, 17)]
    other = hard_negative_report(model, PROCESSOR, others, hard_negatives(), matching=True, progress=False)
    assert (other["blind"], other["itm_blind"]) == (report["blind"], report["itm_blind"])
    assert {report[key]["accuracy_colour"] for key in ("blind", "itm_blind")} <= {0.0, 1.0}
    assert "itm" not in hard_negative_report(
        tiny.clip_model(), tiny.clip_processor(), IMAGES, hard_negatives(), progress=False
    )


@pytest.mark.parametrize("prompt", [None, "a red"])
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_those_of_one_image_at_a_time(prompt, beams):
    model = tiny.blip_model(VlmBlipForConditionalGeneration).train()
    options = {"num_beams": beams, "max_new_tokens": 7, "progress": False}
    captions = caption_images(model, PROCESSOR, IMAGES, prompt, batch_size=3, **options)
    assert model.training
    model.eval()
    for image, caption in zip(IMAGES, captions, strict=True):
        inputs = PROCESSOR(images=[image]) if prompt is None else PROCESSOR(images=[image], text=[prompt])
        written = model.generate(**inputs, num_beams=beams, max_new_tokens=7)
        whole = PROCESSOR.tokenizer.decode(written[0], skip_special_tokens=True)
        assert whole.removeprefix(prompt or "").strip() == caption
        assert whole.startswith(prompt or "")
    assert len(set(captions)) > 1


def test_caption_report_has_a_blind_row():
    model = tiny.blip_model(VlmBlipForConditionalGeneration)
    options = {"generate_options": {"max_new_tokens": 7}, "progress": False}
    truths = caption_images(model, PROCESSOR, IMAGES, max_new_tokens=7, progress=False)
    report, captions = caption_report(model, PROCESSOR, IMAGES, [[text, "a dog"] for text in truths], **options)
    assert captions == truths
    assert report["images"] == len(IMAGES)
    assert report["rouge_l"] == pytest.approx(1)
    (blind,) = caption_images(model, PROCESSOR, [GREY], max_new_tokens=7, progress=False)
    others = [tiny.image(seed=seed) for seed in range(10, 17)]
    other, _ = caption_report(model, PROCESSOR, others, [[text, "a dog"] for text in truths], **options)
    assert other["blind"] == report["blind"]
    certain, _ = caption_report(model, PROCESSOR, IMAGES, [blind] * len(IMAGES), **options)
    assert certain["blind"]["rouge_l"] == pytest.approx(1)
    with pytest.raises(ValueError, match="No images"):
        caption_images(model, PROCESSOR, [])


QUESTIONS = ["the cat on the left", "a tree", "two dog and a house", "the dog", "red", "a green cat", "a tree"]
ABOUT = [4, 0, 4, 2, 0, 1, 4]


def one_by_one(model: nn.Module, ask) -> list[str]:
    model.eval()
    inputs = [PROCESSOR(images=[IMAGES[i]], text=[text]) for text, i in zip(QUESTIONS, ABOUT, strict=True)]
    return [ask(**single) for single in inputs]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_answers_equal_those_of_one_question_at_a_time(batch_size):
    model = tiny.blip_model(VlmBlipForQuestionAnswering)

    def ask(**inputs: torch.Tensor) -> str:
        return PROCESSOR.tokenizer.decode(model.generate(**inputs, max_new_tokens=5)[0], skip_special_tokens=True)

    expected = one_by_one(model, ask)
    images = calls(model.model.vision_model)
    answers = answer_questions(model, PROCESSOR, IMAGES, QUESTIONS, ABOUT, batch_size, max_new_tokens=5, progress=False)
    assert answers == expected
    assert len(set(answers)) > 1
    assert sum(images) == len(set(ABOUT))
    with pytest.raises(ValueError, match="7 questions but 6 entries in image_of_question"):
        answer_questions(model, PROCESSOR, IMAGES, QUESTIONS, ABOUT[:-1], progress=False)


@pytest.mark.parametrize("num_candidates", [2, 128])
def test_chosen_answers_equal_those_of_one_question_at_a_time(num_candidates):
    model = tiny.blip_model(VlmBlipForQuestionAnswering)
    listed = ["red", "two dog", "a blue house", "tree", "the left", "cat"]
    ids = PROCESSOR(text=listed)

    def ask(**inputs: torch.Tensor) -> str:
        chosen = model.rank_answers(ids["input_ids"], ids["attention_mask"], num_candidates=num_candidates, **inputs)
        return listed[int(chosen)]

    expected = one_by_one(model, ask)
    answers = choose_answers(
        model, PROCESSOR, IMAGES, QUESTIONS, ABOUT, listed, num_candidates=num_candidates, progress=False
    )
    assert answers == expected
    for nothing in ([], "yes"):
        with pytest.raises(ValueError, match="non-empty list"):
            choose_answers(model, PROCESSOR, IMAGES, QUESTIONS, ABOUT, nothing)


def asked(images: int = len(IMAGES)) -> list[list[dict]]:
    colour = {"question": "the red house", "answer": "red", "kind": "colour"}
    count = {"question": "two cat", "answer": ["two", "two", "two", "cat"], "kind": "count"}
    return [[colour, count] if i % 2 else [colour | {"answer": "blue"}] for i in range(images)]


def test_vqa_report_has_blind_and_majority_rows():
    model = tiny.blip_model(VlmBlipForQuestionAnswering)
    options = {"generate_options": {"max_new_tokens": 4}, "progress": False}
    said = [("colour", "Blue"), ("colour", "blue"), ("colour", "red"), *[("where", "left")] * 5, ("count", "two")]
    train = [{"question": "?", "answer": answer, "kind": kind} for kind, answer in said]
    report, answers = vqa_report(model, PROCESSOR, IMAGES, asked(), train_questions=train, **options)
    assert len(answers) == report["questions"] == 10
    # Blue is the answer to the colour of 4 of 7 images. Three of four people said two: each of them sees two others
    # of three agree, the fourth all three.
    assert report["majority"]["vqa_accuracy_question_colour"] == pytest.approx(4 / 7)
    assert report["majority"]["vqa_accuracy_question_count"] == pytest.approx((3 * 2 / 3 + 1) / 4)
    # A kind that does not occur in training gets the answer of all.
    options_of_all = {"train_questions": [{"question": "?", "answer": "two", "kind": "where"}], **options}
    of_all, _ = vqa_report(model, PROCESSOR, IMAGES, asked(), **options_of_all)
    assert of_all["majority"]["vqa_accuracy_question_count"] == pytest.approx(3 / 4)
    assert of_all["majority"]["vqa_accuracy_question_colour"] == 0
    others = [tiny.image(seed=seed) for seed in range(10, 17)]
    other, _ = vqa_report(model, PROCESSOR, others, asked(), **options)
    assert other["blind"] == report["blind"]
    assert "majority" not in other
    # The blind model says one thing to one question: as answers, these are all right.
    (blind,) = answer_questions(model, PROCESSOR, [GREY], ["red"], [0], max_new_tokens=4, progress=False)
    certain = [[{"question": "red", "answer": blind}]] * len(IMAGES)
    assert vqa_report(model, PROCESSOR, IMAGES, certain, **options)[0]["blind"]["exact_match"] == 1
    (chosen,) = {*vqa_report(model, PROCESSOR, IMAGES, asked(), answer_list=["cat"], progress=False)[1]}
    assert chosen == "cat"
    with pytest.raises(ValueError, match="7 images and questions about 6"):
        vqa_report(model, PROCESSOR, IMAGES, asked(6))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder for each head and for the body alone."""
    torch.manual_seed(0)
    folders = {}
    for head in (*HEADS, VlmBlipModel):
        folders[head] = str(tmp_path_factory.mktemp(head.__name__))
        tiny.blip_model(head).save_pretrained(folders[head])
        PROCESSOR.save_pretrained(folders[head])
    return folders


@pytest.mark.parametrize(
    ("head", "tasks"),
    [
        (VlmBlipForPreTraining, "retrieval hard_negatives caption"),
        (VlmBlipForImageTextRetrieval, "retrieval hard_negatives"),
        (VlmBlipForConditionalGeneration, "caption"),
        (VlmBlipForQuestionAnswering, "vqa pope"),
    ],
)
def test_scenes(checkpoints, head, tasks):
    reports = report_on_scenes(checkpoints[head], num_scenes=6, splits=("unseen_style",), settings=QUIET)
    assert list(reports["unseen_style"]) == tasks.split()
    assert json.loads(json.dumps(reports)) == reports
    assert by_task(reports) == {task: {"unseen_style": reports["unseen_style"][task]} for task in tasks.split()}
    table = format_reports(reports)
    for task, rows in {
        "retrieval": ["re-ranked"],
        "hard_negatives": ["by ITM", "blind", "by ITM, blind"],
        "caption": ["blind"],
        "vqa": ["blind", "majority answer"],
        "pope": ["blind", "majority answer"],
    }.items():
        if task in tasks.split():
            assert task.replace("_", " ") in table.splitlines()
            for row in rows:
                assert any(line.startswith(f"unseen_style, {row} ") for line in table.splitlines())


def test_scenes_of_another_size_and_fewer_questions(checkpoints, monkeypatch):
    model, told = checkpoints[VlmBlipForQuestionAnswering], replace(QUIET, max_questions=5)
    found = evaluate_checkpoint(model, "scenes", "test", "", 3, "vqa", settings=told, scene_size=128)
    wanted = report_on_scenes(model, num_scenes=3, task="vqa", size=128, settings=told)
    assert found == wanted
    assert all(report["vqa"]["questions"] == 5 for report in found.values())
    given = []
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *args: given.append(args) or found)
    options = ["--data", "scenes", "--limit", "3", "--questions", "5", "--scene-size", "128", "--scene-aspects", "2"]
    assert CliRunner().invoke(app, ["evaluate", model, *options]).exit_code == 0
    ((*_, settings, size, aspects),) = given
    assert (settings.max_questions, size, aspects) == (5, 128, [2.0])


@pytest.mark.parametrize("option", [["--scene-size", "128"], ["--scene-aspects", "2"]], ids=" ".join)
def test_only_scenes_have_a_size(checkpoints, option):
    result = CliRunner().invoke(app, ["evaluate", checkpoints[VlmBlipForQuestionAnswering], "--data", "emoji", *option])
    assert result.exit_code == 1
    assert "apply to scenes only, not to emoji" in str(result.exception)


@pytest.mark.parametrize(
    ("head", "data", "task", "message"),
    [
        (VlmBlipForPreTraining, "scenes", "vqa", "PreTraining cannot do 'vqa'; it can do retrieval, hard_neg"),
        (
            VlmBlipForQuestionAnswering,
            "emoji",
            None,
            "can do vqa, pope, but emoji only allows retrieval, caption, zero_shot: use other",
        ),
        (
            VlmBlipForPreTraining,
            "emoji",
            "hard_negatives",
            "emoji has no data for 'hard_negatives', only for retrieval",
        ),
        (
            VlmBlipModel,
            "scenes",
            None,
            "is a VlmBlipModel \\(vlm_blip\\), which cannot be evaluated, only VlmClipModel, VlmB",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(checkpoints, head, data, task, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate_checkpoint(checkpoints[head], data, "test", "", 5, task)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs its processor"):
        report_on_scenes(tiny.blip_model())
    with pytest.raises(ValueError, match="A VlmBlipModel cannot be evaluated"):
        report_on_scenes(tiny.blip_model(VlmBlipModel), PROCESSOR)


@pytest.fixture
def own_data(tmp_path):
    """Two splits with images, captions, questions and answers."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        rows = []
        for i, image in enumerate(IMAGES):
            image.save(tmp_path / split / f"{i}.png")
            asked_of = {"asked": f"two {TEXTS[i]}", "said": ["cat", "cat", "dog"]}
            rows.append({"file_name": f"{i}.png", "words": TEXTS[i], **asked_of})
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path)


def test_own_data_on_the_command_line(checkpoints, own_data):
    model, columns = checkpoints[VlmBlipForPreTraining], "image=image,caption=words"
    args = ["evaluate", model, "--data", own_data, "--columns", columns, "--limit", "0", "--beams", "1", "--json"]
    result = CliRunner().invoke(app, args)
    report = json.loads(result.stdout)["test"]
    assert list(report) == ["retrieval", "caption"]
    assert report["retrieval"]["rerank"] == 32
    assert report["caption"]["images"] == len(IMAGES)
    columns = "image=image,question=asked,answer=said"
    args = ["evaluate", checkpoints[VlmBlipForQuestionAnswering], "--data", own_data, "--columns", columns]
    result = CliRunner().invoke(
        app, [*args, "--train-split", "train", "--rank-answers", "--limit", "5", "--task", "vqa"]
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "vqa"
    # Of "cat, cat, dog" the answer cat is right in full for two of the three ways to leave one out.
    (majority,) = [line.split() for line in lines if line.startswith("test, majority answer")]
    assert majority[3] == "5"
    assert majority[5] == "1.000"


def test_own_questions_need_columns_answers_and_a_list(checkpoints, own_data, tmp_path):
    model = checkpoints[VlmBlipForQuestionAnswering]
    columns = "image=image,question=asked,answer=said"
    with pytest.raises(ValueError, match="'answer'"):
        evaluate_checkpoint(model, own_data, "test", "image=image,question=asked", 0, settings=QUIET)
    with pytest.raises(ValueError, match=r"\['caption'\] is unknown; name image, question and answer"):
        evaluate_checkpoint(model, own_data, "test", "image=image,caption=words", 0)
    ranked = EvaluationSettings(rank_answers=True, progress=False)
    with pytest.raises(ValueError, match="there are no training questions: give train_split"):
        evaluate_checkpoint(model, own_data, "test", columns, 0, settings=ranked)
    metadata = tmp_path / "test" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('["cat", "cat", "dog"]', "[]", 1))
    with pytest.raises(ValueError, match=r"split test, row 0 \(.*\): column 'said' holds no answer; give it a text"):
        evaluate_checkpoint(model, own_data, "test", columns, 0, settings=QUIET)
