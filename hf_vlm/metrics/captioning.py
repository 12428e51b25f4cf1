"""Caption metrics: CIDEr, BLEU-1 to 4 and ROUGE-L of one caption per image against several references.

- The values equal those of pycocoevalcap, the program of the COCO caption benchmark, on the same words. The words come
  from `text.ptb_tokenize`, so no Java is needed.
- **CIDEr** (Vedantam et al., 2015) is CIDEr-D without stemming, as in pycocoevalcap: clipped tf-idf, a Gaussian penalty
  on the length difference (in bigrams: one word counts like none), times 10. Document frequencies come from the
  given references. Scores of different test sets are not comparable, and a test set of one image always gives 0.
- **BLEU** (Papineni et al., 2002) is computed over the corpus, with the closest reference length. It uses
  pycocoevalcap's small constants instead of smoothing: without a common 4-gram, BLEU-4 is tiny and not exactly 0.
- **ROUGE-L** (Lin, 2004) combines the best precision and the best recall over an image's references, with beta 1.2.

Shapes: I images, R references in total, S = I + R sentences, captions before references.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from .text import ptb_tokenize

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
BETA = 1.2
# The constants that pycocoevalcap adds to BLEU's counts.
TINY, SMALL = 1e-15, 1e-9


def caption_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Callable[[str], list[str]] = ptb_tokenize,
) -> dict[str, float]:
    """CIDEr, BLEU and ROUGE-L over all images.

    Args:
        predictions: `(I,)`, one caption per image. An empty one scores 0 (ROUGE-L: 1 if a reference is empty too).
        references: `(I,)`, at least one caption with a word per image; repeated captions count repeatedly.
        tokenize: Splits a caption into words; `str.split` for tokenised captions.

    Returns:
        `cider`, in [0, 10] (papers report 100 times the value, so 1.2 is 120); `bleu_1` to `bleu_4` and `rouge_l` in
        [0, 1].

    Raises:
        ValueError: if the lengths differ, there are no images, an image has no reference with a word, or a value is not
            a string.

    Example:

        metrics = caption_metrics(["a red cat", "two dogs"], [["a red cat"], ["two small dogs", "dogs"]])
        print(metrics["cider"], metrics["rouge_l"])
    """
    _check(predictions, references)
    captions = [tokenize(prediction) for prediction in predictions]
    truths = [[tokenize(reference) for reference in row] for row in references]
    for row, texts in enumerate(truths):
        if not any(texts):
            raise ValueError(f"references, row {row}: no word in {list(references[row])!r}: leave the image out")
    corpus = Corpus(captions, truths)
    tables = corpus.overlaps()
    bleu = _bleu(corpus, tables)
    return {
        "cider": float(_cider(corpus, tables).mean()),
        **{f"bleu_{order}": score for order, score in zip(ORDERS, bleu, strict=True)},
        "rouge_l": fmean(map(_rouge_l, captions, truths)),
    }


@dataclass(frozen=True)
class Overlap:
    """N-grams of one length: the sparse matrix (sentence, n-gram) -> count, and the matches of captions and references.

    Attributes:
        sentence, gram, count: `(E,)`, the non-zero entries, sorted by sentence and n-gram.
        idf: `(n-grams,)`, log of the number of images over the number of images whose references have the n-gram.
        in_reference: `(M,)`, indices of the reference entries whose n-gram is also in the caption of the image.
        in_caption: `(M,)`, indices of the matching caption entries.
    """

    sentence: np.ndarray
    gram: np.ndarray
    count: np.ndarray
    idf: np.ndarray
    in_reference: np.ndarray
    in_caption: np.ndarray


class Corpus:
    """All captions and references as word ids.

    Attributes:
        num_images: I.
        references: `(I,)`, number of references per image.
        image: `(S,)`, the image of each sentence; for captions 0, 1, ... I - 1.
        length: `(S,)`, number of words per sentence.
        words: `(total words,)`, word ids, sentence by sentence.
    """

    def __init__(self, captions: list[list[str]], truths: list[list[list[str]]]):
        self.num_images = len(captions)
        sentences = [*captions, *(text for texts in truths for text in texts)]
        sizes = [len(texts) for texts in truths]
        self.references = np.array(sizes)
        self.image = np.concatenate([np.arange(len(captions)), np.repeat(np.arange(len(truths)), sizes)])
        self.length = np.array([len(sentence) for sentence in sentences])
        numbers: dict[str, int] = {}
        self.words = np.array([numbers.setdefault(word, len(numbers)) for text in sentences for word in text])

    def overlaps(self) -> list[Overlap]:
        """The counts of n-grams of each length in `ORDERS`."""
        sentence = np.repeat(np.arange(len(self.length)), self.length)
        grams, result = self.words, []
        for order in ORDERS:
            if order > 1:
                pairs = grams[:-1] * (self.words.max() + 1) + self.words[order - 1 :]
                grams = np.unique(pairs, return_inverse=True)[1]
            first, last = sentence[: len(grams)], sentence[order - 1 :]
            result.append(self._overlap(first[first == last], grams[first == last], len(self.words)))
        return result

    def _overlap(self, sentence: np.ndarray, gram: np.ndarray, num_grams: int) -> Overlap:
        keys, count = np.unique(sentence * num_grams + gram, return_counts=True)
        sentence, gram = np.divmod(keys, num_grams)
        references = np.flatnonzero(sentence >= self.num_images)
        caption_keys = keys[: len(keys) - len(references)]
        in_image = self.image[sentence[references]] * num_grams + gram[references]
        frequency = np.bincount(np.unique(in_image) % num_grams, minlength=num_grams)
        place = np.searchsorted(caption_keys, in_image)
        found = np.isin(in_image, caption_keys)
        idf = np.log(self.num_images) - np.log(np.maximum(frequency, 1))
        return Overlap(sentence, gram, count, idf, references[found], place[found])


def _cider(corpus: Corpus, tables: list[Overlap]) -> np.ndarray:
    """CIDEr of each image, `(I,)`: equation 4 of Vedantam et al. (2015), averaged over n-gram lengths."""
    images, truth = corpus.image[corpus.num_images :], slice(corpus.num_images, None)
    similarity = np.zeros(len(images))
    for table in tables:
        weight = table.count * table.idf[table.gram]
        norm = np.sqrt(np.bincount(table.sentence, weight**2, minlength=len(corpus.image)))
        of_reference = weight[table.in_reference]
        product = np.minimum(weight[table.in_caption], of_reference) * of_reference
        dot = np.bincount(table.sentence[table.in_reference], product, minlength=len(corpus.image))[truth]
        norms = norm[truth] * norm[images]
        similarity += np.divide(dot, norms, out=np.zeros(len(images)), where=norms > 0)
    bigrams = np.maximum(corpus.length - 1, 0)
    similarity *= np.exp(-((bigrams[truth] - bigrams[images]) ** 2) / (2 * SIGMA**2))
    return 10 * np.bincount(images, similarity) / (len(tables) * corpus.references)


def _bleu(corpus: Corpus, tables: list[Overlap]) -> list[float]:
    """Corpus BLEU up to each n-gram length."""
    caption_length = corpus.length[: corpus.num_images]
    lengths = corpus.length[corpus.num_images :]
    distance = np.abs(lengths - caption_length[corpus.image[corpus.num_images :]])
    # The closest length, and the shorter one of two: distance and length are encoded as one number.
    base = lengths.max() + 1
    firsts = np.cumsum(corpus.references) - corpus.references
    closest = np.minimum.reduceat(distance * base + lengths, firsts) % base
    ratio = (caption_length.sum() + TINY) / (closest.sum() + SMALL)
    penalty = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, precision = [], 1.0
    for order, table in zip(ORDERS, tables, strict=True):
        most = np.zeros_like(table.count)
        np.maximum.at(most, table.in_caption, table.count[table.in_reference])
        guesses = np.maximum(caption_length - order + 1, 0).sum()
        precision *= (np.minimum(most, table.count).sum() + TINY) / (guesses + SMALL)
        scores.append(float(precision ** (1 / order) * penalty))
    return scores


def _rouge_l(caption: list[str], truths: list[list[str]]) -> float:
    """ROUGE-L of one image."""
    # An empty text counts as one empty word, so that it matches an empty reference.
    caption, truths = caption or [""], [truth or [""] for truth in truths]
    places: Counter[str] = Counter()
    for place, word in enumerate(caption):
        places[word] |= 1 << place
    common = [_common_subsequence(places, len(caption), truth) for truth in truths]
    precision = max(common) / len(caption)
    recall = max(length / len(truth) for length, truth in zip(common, truths, strict=True))
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(places: Counter[str], length: int, other: list[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö, 2004).

    Args:
        places: Word -> bit mask of its positions in the first text.
        length: Number of words of the first text.
        other: The second text.
    """
    everywhere = (1 << length) - 1
    column = everywhere
    for word in other:
        matched = column & places[word]
        column = ((column + matched) | (column - matched)) & everywhere
    return length - column.bit_count()


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references) or len(predictions) == 0:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} rows of references: must be equal, and at least 1"
        )
    for row, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions, row {row}: {prediction!r} is not a string")
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"references, row {row}: {texts!r} is not a list of at least one string")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"references, row {row}: {text!r} is not a string")


__all__ = ["caption_metrics"]
