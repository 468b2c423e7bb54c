"""Captions against people's: BLEU and CIDEr as COCO's caption evaluation computes them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from mmcore.metrics.ptb import caption_tokens
from mmcore.ops import require

Ngram = tuple[str, ...]
_ORDERS = range(1, 5)
_SIGMA = 6.0
# COCO's guards against a division by zero; part of the value
_SMALL, _TINY = 1e-9, 1e-15


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-n = min(1, e^(1 - r / c)) (p_1 ... p_n)^(1 / n) over the corpus, p_k the clipped precision of k-grams.

    c is the candidates' length and r that of the references, for each candidate the one closest to it (of two
    equally close, the shorter). As COCO does, lengths and counts are smoothed by 1e-9 and 1e-15.

    Args:
        candidates: [N], one caption an image, as text.
        references: [N], people's captions of each image, at least one.

    Returns:
        "BLEU-1" to "BLEU-4", each in [0, 1].

    Reference: pycocoevalcap 1.2, after `caption_tokens`. Paper: doi 10.3115/1073083.1073135.
    """
    correct, total = [0] * len(_ORDERS), [0] * len(_ORDERS)
    length, reference_length = 0, 0
    for candidate, people in _tokenized("bleu", candidates, references):
        counts = _ngrams(candidate)
        most: Counter[Ngram] = Counter()
        for reference in people:
            most |= _ngrams(reference)
        for ngram, count in (counts & most).items():
            correct[len(ngram) - 1] += count
        for ngram, count in counts.items():
            total[len(ngram) - 1] += count
        length += len(candidate)
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in people)[1]
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    out, product = {}, 1.0
    for n, right, of in zip(_ORDERS, correct, total):
        product *= (right + _TINY) / (of + _SMALL)
        out[f"BLEU-{n}"] = brevity * product ** (1 / n)
    return out


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr = 10 mean over n = 1..4 and references of e^(-d^2 / 72) min(g_n(c), g_n(r)) . g_n(r) / |g_n(c)| |g_n(r)|.

    g_n holds the counts of n-grams times log(images / images whose references have the n-gram), and d is the
    difference of lengths; then the mean over images. This is the paper's CIDEr-D (clipped, sigma = 6) without
    stemming, the number that COCO's evaluation and the field print as CIDEr. The document frequencies are those of
    the references given: scores of different sets of images do not compare, and one image alone scores 0.

    `candidates` and `references` are as in `bleu`, and so is what is refused. The result is in [0, 10]; the field's
    tables give it times 100.

    Reference: pycocoevalcap 1.2, after `caption_tokens`. Paper: arXiv:1411.5726.
    """
    corpus = list(_tokenized("cider", candidates, references))
    images_with = Counter(ngram for _, people in corpus for ngram in set().union(*map(_ngrams, people)))
    idf = {ngram: math.log(len(corpus)) - math.log(images) for ngram, images in images_with.items()}
    unseen = math.log(len(corpus))
    total = 0.0
    for candidate, people in corpus:
        vectors = _weighted(candidate, idf, unseen)
        for reference in people:
            delta = len(candidate) - len(reference)
            cosines = map(_clipped_cosine, vectors, _weighted(reference, idf, unseen))
            total += math.exp(-(delta**2) / (2 * _SIGMA**2)) * sum(cosines) / len(_ORDERS) / len(people)
    return 10 * total / len(corpus)


def _weighted(tokens: list[str], idf: dict[Ngram, float], unseen: float) -> list[dict[Ngram, float]]:
    """Counts of n-grams times their inverse document frequency, one dict an order."""
    out: list[dict[Ngram, float]] = [{} for _ in _ORDERS]
    for ngram, count in _ngrams(tokens).items():
        out[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
    return out


def _clipped_cosine(candidate: dict[Ngram, float], reference: dict[Ngram, float]) -> float:
    """min(c, r) . r / |c| |r|, and 0 where either is 0."""
    dot = sum(min(weight, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0) for ngram, weight in candidate.items())
    norms = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    return dot / norms if norms else 0.0


def _ngrams(tokens: list[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in _ORDERS for i in range(len(tokens) - n + 1))


def _tokenized(
    caller: str, candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Each candidate's tokens and those of its references; ValueError unless both are what `caller` wants."""
    _check_strings(caller, "candidates", candidates)
    sizes = len(candidates), len(references)
    require(caller, sizes[0] == sizes[1], "references must be {} lists, one a candidate, got {}", *sizes)
    for people in references:
        _check_strings(caller, "references", people)
    for candidate, people in zip(candidates, references):
        yield caption_tokens(candidate), [caption_tokens(reference) for reference in people]


def _check_strings(caller: str, name: str, values: Sequence[str]) -> None:
    listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    are_strings = listed and all(isinstance(value, str) for value in values)
    require(caller, are_strings, "{} must be at least one string in a list, got {!r}", name, values)
