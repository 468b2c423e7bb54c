"""Which of a record's texts are its captions, and how likely each is drawn."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcore.data.broken import BrokenRecord
from mmcore.ops import require

Texts = Sequence[Sequence[str]]
"""Of a record, the captions under each key; none under a key that it has not."""


@dataclass(frozen=True)
class CaptionKeys:
    """Keys of a record, or columns of a table, that hold its captions, each a text or a list of texts.

    Args:
        keys: in the order in which captions are listed.
        weights: how likely a caption is drawn from each, in relation to the others that a record has.
    """

    keys: tuple[str, ...]
    weights: tuple[float, ...]

    def read(self, values: Mapping[str, Any]) -> list[list[str]]:
        """The captions of a record; raises BrokenRecord where it has none, or one is not text."""
        texts = [_texts(values.get(key), key) for key in self.keys]
        BrokenRecord.unless(any(texts), f"no {' or '.join(self.keys)}")
        return texts

    def draw(self, texts: Texts, rng: np.random.Generator) -> str:
        """A key by its weight among those that have captions, then one of its captions; of a single one, no random
        number is drawn."""
        there = [place for place, captions in enumerate(texts) if captions]
        chosen = there[0]
        if len(there) > 1:
            weights = np.array([self.weights[place] for place in there])
            chosen = there[int(rng.choice(len(there), p=weights / weights.sum()))]
        captions = texts[chosen]
        return captions[int(rng.integers(len(captions)))] if len(captions) > 1 else captions[0]


def parse_caption_keys(text: str) -> CaptionKeys:
    """Keys such as 'title' or 'title=0.7,alt=0.3'; raises ValueError where there is no key, one comes twice, or a
    weight is not above 0."""
    keys: list[str] = []
    weights: list[float] = []
    for part in text.split(","):
        key, _, weight = part.partition("=")
        keys.append(key.strip())
        try:
            weights.append(float(weight) if weight else 1.0)
        except ValueError:
            weights.append(math.nan)
    what = "caption_keys must be different names, such as title or title=0.7,alt=0.3, with weights above 0, got {!r}"
    fits = all(keys) and len(set(keys)) == len(keys) and all(0 < w < math.inf for w in weights)
    require("data", fits, what, text)
    return CaptionKeys(tuple(keys), tuple(weights))


def _texts(value: Any, key: str) -> list[str]:
    """A value as captions: none of what is empty, as pandas writes it too."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    values: list[Any] = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
    BrokenRecord.unless(all(x is None or isinstance(x, str) for x in values), f"{key} is not text")
    return [x.strip() for x in values if x and x.strip()]
