"""Masked and changed texts, drawn by the random numbers of a sample."""

import numpy as np
import torch
from torch import Tensor

from mmcore.labels import IGNORED
from mmcore.ops import require


def mask_tokens(
    tokens: Tensor,
    is_word: Tensor,
    rate: float,
    rng: np.random.Generator,
    *,
    mask_id: int,
    num_words: int,
    replace: tuple[float, float] = (0.8, 0.1),
    is_inner: Tensor | None = None,
    at_least_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Some of a text's tokens hidden, to be told from the others (BERT, arXiv 1810.04805).

    Args:
        tokens: int64 [T].
        is_word: bool [T], which may be hidden: no padding, no token of a special meaning.
        rate: share of them that is, drawn one by one, in [0, 1].
        mask_id: what stands in the place of a hidden one.
        num_words: a random word is an id below it.
        replace: shares of the hidden that become `mask_id` and a random word; the rest stays as it is.
        is_inner: bool [T], which go on with the word of the one before: words are then drawn and hidden whole.
        at_least_one: where none is drawn, one is, if any may be.

    Returns:
        The tokens, and the labels [T]: what was there, -100 where nothing is hidden.
    """
    op = "mask_tokens"
    require(op, 0 <= rate <= 1, "rate must be in [0, 1], got {}", rate)
    fits = tokens.ndim == 1 and is_word.shape == tokens.shape and is_word.dtype == torch.bool
    require(op, fits, "is_word must be bool {}, got {} {}", list(tokens.shape), is_word.dtype, list(is_word.shape))
    require(op, min(replace) >= 0 and sum(replace) <= 1, "replace must be two shares, got {}", replace)
    drawn = torch.from_numpy(rng.random(len(tokens)))
    kind = torch.from_numpy(rng.random(len(tokens)))
    random = torch.from_numpy(rng.integers(0, num_words, len(tokens)))
    if is_inner is not None:  # an inner piece is drawn as the first of its word
        first = torch.arange(len(tokens)).masked_fill(is_inner, 0).cummax(0).values
        drawn = drawn[first]
    is_hidden = is_word & (drawn < rate)
    if at_least_one and is_word.any() and not is_hidden.any():
        is_hidden = is_word & (drawn == drawn.masked_fill(~is_word, 2).min())
    masked, other = kind < replace[0], (kind >= replace[0]) & (kind < sum(replace))
    found = tokens.masked_fill(is_hidden & masked, mask_id)
    return torch.where(is_hidden & other, random, found), tokens.masked_fill(~is_hidden, IGNORED)


def changed_text(text: str, rng: np.random.Generator, *, deletion: float = 0.1) -> str:
    """Two words of a text in each other's place, or each word left out with probability `deletion`, one at least kept
    (EDA, arXiv 1901.11196; its synonyms need a list of words). A text of one word stays as it is."""
    words = text.split()
    if len(words) < 2:
        return text
    if rng.random() < 0.5:
        i, j = rng.choice(len(words), 2, replace=False)
        words[i], words[j] = words[j], words[i]
        return " ".join(words)
    kept = [word for word, x in zip(words, rng.random(len(words)), strict=True) if x >= deletion]
    return " ".join(kept or [words[int(rng.integers(len(words)))]])
