"""A word of a held-out caption that a model tells from the picture: the class's name, hidden."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmcore.tasks.subject import Options, Subject, nothing

__all__ = ["Options", "follow", "report"]

BATCH_SIZE = 64
FIGURE = "cloze accuracy"

Completes = Callable[[Sequence[Image.Image], Sequence[str], Sequence[str]], list[str]]
"""B images, and what stands before and behind the missing word of B captions, to B words."""


def _hidden(subject: Subject) -> tuple[list[int], list[tuple[str, str, str]]]:
    """Positions of held-out pictures, and of a caption of each that names its class in one word: what stands before,
    the word, what stands behind."""
    names, labels = subject.pairs.class_names, subject.val.labels
    if names is None or labels is None:
        return [], []
    places, texts = [], []
    for i, label in enumerate(labels):
        word = names[label]
        found = (re.search(rf"\b{re.escape(word)}\b", text, re.I) for text in subject.val.captions[i])
        match = next((x for x in found if x is not None), None)
        if match is not None and re.fullmatch(r"\w+", word):
            places.append(i)
            texts.append((match.string[: match.start()], word.lower(), match.string[match.end() :]))
    return places, texts


@torch.no_grad()
def accuracy(subject: Subject) -> tuple[float, int]:
    """The share of hidden words that are told, and how many there are."""
    places, texts = _hidden(subject)
    text_of = dict(zip(places, texts, strict=True))
    complete = subject.recipe.completes(subject.assets, subject.model, subject.device)

    def told(images: list[Image.Image], positions: list[int]) -> list[bool]:
        chosen = [i for i, position in enumerate(positions) if position in text_of]
        parts = [text_of[positions[i]] for i in chosen] or [("", "", "")]
        words = complete([images[i] for i in chosen] or images[:1], [x[0] for x in parts], [x[2] for x in parts])
        return [word == part[1] for word, part in zip(words, parts, strict=True)][: len(chosen)]

    found = [x for part in subject.ranks.over(subject.val, BATCH_SIZE, told) for x in part]
    return sum(found) / max(1, len(found)), len(found)


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains; nothing where there are no classes."""
    if subject.pairs.val is None or not _hidden(subject)[0]:
        return {}
    return {FIGURE: accuracy(subject)[0]}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints the accuracy."""
    if options is None and subject.pairs.val is None:
        return []
    if not _hidden(subject)[0]:
        return nothing(options, f"{subject.pairs.name} has no held-out captions that name a class in one word")
    found, count = accuracy(subject)
    print(f"cloze accuracy (held-out, class words of {count} captions): {100 * found:.1f} %")
    return []
