"""Caption metrics against what pycocoevalcap recorded (tests/scripts/record_caption_scores.py), and closed forms."""

import json
import math
import random
from pathlib import Path

import pytest

from hf_vlm.evaluation import caption_metrics, ptb_tokenize

RECORD = json.loads((Path(__file__).parents[1] / "data" / "caption_scores.json").read_text(encoding="utf-8"))
ROWS = RECORD["rows"]
WORDS = "a the red blue big small cat dog tree on of near sits runs".split()


def random_corpus(seed: int, images: int = 12) -> tuple[list[str], list[list[str]]]:
    generator = random.Random(seed)

    def caption() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, 12)))

    references = [[caption() for _ in range(generator.randint(1, 4))] for _ in range(images)]
    return [generator.choice([caption(), *texts]) for texts in references], references


def slow_common_subsequence(first: list[str], second: list[str]) -> int:
    """The textbook's table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def slow_cider(captions: list[list[str]], truths: list[list[list[str]]]) -> float:
    """The definition, with a dictionary for every caption."""

    def grams(words: list[str], order: int) -> dict[tuple[str, ...], int]:
        found = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
        return {gram: found.count(gram) for gram in found}

    total = 0.0
    for caption, texts in zip(captions, truths, strict=True):
        for text in texts:
            penalty = math.exp(-((max(len(caption) - 1, 0) - max(len(text) - 1, 0)) ** 2) / 72)
            for order in (1, 2, 3, 4):
                vectors = []
                for words in (caption, text):
                    counts = grams(words, order)
                    holds = {gram: sum(any(gram in grams(t, order) for t in ts) for ts in truths) for gram in counts}
                    vectors.append(
                        {gram: counts[gram] * math.log(len(truths) / max(holds[gram], 1)) for gram in counts}
                    )
                norm = math.prod(math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors)
                dot = sum(
                    min(value, vectors[1].get(gram, 0)) * vectors[1].get(gram, 0) for gram, value in vectors[0].items()
                )
                total += 10 * penalty * (dot / norm if norm else 0) / (4 * len(texts) * len(truths))
    return total


def test_words_equal_the_java_tokenizer() -> None:
    assert len(ROWS) >= 50
    for row in ROWS:
        assert " ".join(ptb_tokenize(row["prediction"])) == row["prediction_words"]
        assert [" ".join(ptb_tokenize(text)) for text in row["references"]] == row["reference_words"]


@pytest.mark.parametrize("corpus", RECORD["corpora"], ids=lambda corpus: f"{len(corpus['rows'])}rows")
def test_scores_equal_pycocoevalcap(corpus: dict) -> None:
    rows = [ROWS[place] for place in corpus["rows"]]
    words = caption_metrics(
        [row["prediction_words"] for row in rows], [row["reference_words"] for row in rows], tokenize=str.split
    )
    assert words == pytest.approx(corpus["scores"], abs=1e-9, rel=0)
    captions = caption_metrics([row["prediction"] for row in rows], [row["references"] for row in rows])
    assert captions == words
    assert all(type(value) is float for value in words.values())


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dogs' bowls, don't run.", "a man 's dogs bowls do n't run"),
        ("I cannot; it's gonna be 'tis-like", "i can not it 's gon na be 't is like"),
        ("We'd've gone, they're I'm she'll", "we 'd 've gone they 're i 'm she 'll"),
        ("“Quoted” ‘text’ – and — more… ok", "quoted text and more ok"),
        ("(round) [square] {curly}", "-lrb- round -rrb- -lsb- square -rsb- -lcb- curly -rcb-"),
        ("-lrb- round -rrb-", "-lrb- round -rrb-"),
        ("at 10:30 a.m. on Main St. etc. Dog.", "at 10:30 a.m. on main st. etc. dog"),
        ("a mass. In Boston, Mass. now", "a mass in boston mass. now"),
        ("no. 5, and no.", "no. 5 and no"),
        ("1,000 x 3.5 -5 +5 24/7 1/2 ½ 50% $5 £3", "1,000 x 3.5 -5 +5 24/7 1/2 1/2 50 % $ 5 # 3"),
        ("AT&T b&w t-shirt and/or o'clock", "at&t b & w t-shirt and/or o'clock"),
        ("wow! wow!! what?! hmm.... end..", "wow wow !! what ?! hmm end"),
        (
            "<unk> a<b user@example.com http://example.com/a?b=c.",
            "<unk> a < b user@example.com http://example.com/a?b=c",
        ),
        ("Zürich naïve e\u0301t\u0301e हिन्दी ИВАН", "zürich naïve e\u0301t\u0301e हिन्दी иван"),
        ("😀 dog ❤️ soft\u00adhyphen", "dog ❤ softhyphen"),
        (" \t\n ", ""),
        ("...!", ""),
    ],
)
def test_tokenize(caption: str, words: str) -> None:
    assert " ".join(ptb_tokenize(caption)) == words


def test_perfect_captions() -> None:
    captions = ["a red cat sits here", "two big dogs run fast", "some small trees near water"]
    scores = caption_metrics(captions, [[caption] * 3 for caption in captions])
    assert scores["cider"] == pytest.approx(10)
    assert [scores[f"bleu_{order}"] for order in (1, 2, 3, 4)] == pytest.approx([1] * 4)
    assert scores["rouge_l"] == 1
    # Three words have no 4-gram, and words of every image have no weight.
    captions = ["red cat sits", "big dogs run", "small trees grow"]
    assert caption_metrics(captions, [[caption] for caption in captions])["cider"] == pytest.approx(7.5)
    assert caption_metrics(["a cat", "a cat"], [["a cat"], ["a cat"]])["cider"] == 0


def test_nothing_in_common() -> None:
    scores = caption_metrics(["zebra giraffe", ""], [["a red cat", "cat"], ["two dogs", "dogs run"]])
    assert scores == pytest.approx(dict.fromkeys(scores, 0.0), abs=1e-9)


def test_one_image_has_no_rare_words() -> None:
    scores = caption_metrics(["a cat sits on a mat"], [["a cat sits on a mat"]])
    assert scores["cider"] == 0
    assert scores["bleu_4"] == pytest.approx(1)


def test_cider_by_hand() -> None:
    # Two images, so every word of one image alone weighs log 2. One word matches of two and of three; 1 bigram more.
    scores = caption_metrics(["cat runs", "x"], [["cat sits there"], ["dog"]])
    cosine = 1 / (math.sqrt(2) * math.sqrt(3))
    assert scores["cider"] == pytest.approx(10 * cosine * math.exp(-1 / 72) / 4 / 2)
    # A word repeated three times is clipped to its count in the reference, but the vector's norm is not clipped.
    scores = caption_metrics(["cat cat cat", "x"], [["cat"], ["dog"]])
    assert scores["cider"] == pytest.approx(10 * (1 / 3) * math.exp(-4 / 72) / 4 / 2)


def test_bleu_by_hand() -> None:
    # The famous "the the the": clipped at 2 of 7. Closest reference: 7 words.
    scores = caption_metrics(["the " * 7], [["the cat is on the mat now", "there is a cat on the mat"]])
    assert scores["bleu_1"] == pytest.approx(2 / 7)
    # Of two equally close lengths (2 and 4 for 3) the shorter one: no penalty.
    assert caption_metrics(["a b c"], [["a b", "a b c d"]])["bleu_2"] == pytest.approx(1)
    assert caption_metrics(["a b c"], [["a b c d"]])["bleu_1"] == pytest.approx(math.exp(1 - 4 / 3))


def test_rouge_by_hand() -> None:
    # Common subsequence "cat on mat" of 4 and of 6 words.
    precision, recall = 3 / 4, 3 / 6
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    scores = caption_metrics(["cat sleeps on mat"], [["the cat is on a mat"]], tokenize=str.split)
    assert scores["rouge_l"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_the_definitions(seed: int) -> None:
    predictions, references = random_corpus(seed)
    scores = caption_metrics(predictions, references)
    captions, truths = [text.split() for text in predictions], [[text.split() for text in row] for row in references]
    assert scores["cider"] == pytest.approx(slow_cider(captions, truths), abs=1e-9)
    rouge = []
    for caption, texts in zip(captions, truths, strict=True):
        common = [slow_common_subsequence(caption, text) for text in texts]
        precision = max(common) / len(caption)
        recall = max(length / len(text) for length, text in zip(common, texts, strict=True))
        rouge.append(2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0)
    assert scores["rouge_l"] == pytest.approx(sum(rouge) / len(rouge), abs=1e-9)


def test_order_changes_nothing() -> None:
    predictions, references = random_corpus(7, images=20)
    expected = caption_metrics(predictions, references)
    assert 0.5 < expected["cider"] < 9.5
    order = random.Random(0).sample(range(20), 20)
    shuffled = caption_metrics([predictions[i] for i in order], [references[i][::-1] for i in order])
    assert shuffled == pytest.approx(expected, abs=1e-12)
    wrong = caption_metrics(predictions[1:] + predictions[:1], references)
    assert wrong["cider"] < expected["cider"]


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], r"0 predictions and 0 rows of references"),
        (["a"], [["a"], ["b"]], r"1 predictions and 2 rows of references"),
        (["a", "b"], [["a"], []], r"references, row 1: \[\] is not a list of at least one string"),
        (["a", "b"], [["a"], "b"], r"references, row 1: 'b' is not a list"),
        (["a", "b"], [["a"], ["b", None]], r"references, row 1: None is not a string"),
        (["a", None], [["a"], ["b"]], r"predictions, row 1: None is not a string"),
        (["a", "b"], [["a"], ["...", ""]], r"references, row 1: no word in \['...', ''\]: leave the image out"),
    ],
)
def test_bad_input_is_refused(predictions: list, references: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_metrics(predictions, references)
