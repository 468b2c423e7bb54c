"""Captions of held-out pictures, by BLEU-4, CIDEr and, of classes, by whether they name them."""

import re
from pathlib import Path
from typing import Any

import torch

from mmcore.metrics.captions import bleu, cider
from mmcore.tasks.speaking import MAX_FOLLOWED, Options, Speaker, spread, written
from mmcore.tasks.subject import Subject, nothing

__all__ = ["Options", "follow", "report"]

NAMED = "class named"


def follow(subject: Subject) -> dict[str, float]:
    """Scores of some pictures while a run trains."""
    val = subject.pairs.val
    if val is None or "caption" not in subject.recipe.prompts:
        return {}
    index, texts = Speaker.of(subject, "caption", None).about(val, MAX_FOLLOWED)
    return _scores(texts, [val.captions[i] for i in index]) | _named(subject, index, texts)


def _scores(texts: list[str], people: list[list[str]]) -> dict[str, float]:
    """BLEU-4 in [0, 1] and CIDEr in [0, 10]."""
    return {"BLEU-4": bleu(texts, people)["BLEU-4"], "CIDEr": cider(texts, people)}


def _named(subject: Subject, index: list[int], texts: list[str]) -> dict[str, float]:
    """The share of captions that name the class of their picture and no other; nothing where there are no classes."""
    names, labels = subject.pairs.class_names, subject.val.labels
    if names is None or labels is None:
        return {}
    said = [{name for name in names if re.search(rf"\b{re.escape(name)}\b", text, re.I)} for text in texts]
    right = [found == {names[labels[i]]} for i, found in zip(index, said, strict=True)]
    return {NAMED: sum(right) / max(1, len(right))}


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints BLEU-4 and CIDEr of the captions of held-out pictures; writes them as COCO's evaluation reads them, and a
    sheet of some, into the run's folder."""
    val = subject.pairs.val
    if options is None and "caption" not in subject.recipe.prompts:
        return []
    if val is None:
        return nothing(options, f"{subject.pairs.name} has no held-out captions to compare with")
    speaker = Speaker.of(subject, "caption", options)
    torch.manual_seed(0)
    index, texts = speaker.about(val)
    people = [val.captions[i] for i in index]
    found = _scores(texts, people) | _named(subject, index, texts)
    numbers = ", ".join(f"{name} {100 * score:.1f}" for name, score in found.items())
    print(f"captions (held-out), {speaker.decode}, {len(index)} images: {numbers}")
    names = [str(i) if val.names is None else val.names[i] for i in index]
    ids = [int(name) if name.isdecimal() else name for name in names]
    shown = spread(len(index))
    return written(
        subject.folder / "captions",
        [{"image_id": number, "caption": text} for number, text in zip(ids, texts, strict=True)],
        [val.raw_image(index[i]) for i in shown],
        [texts[i] for i in shown],
        [people[i] for i in shown],
        title=f"{subject.pairs.name}: captions of held-out pictures, {speaker.decode}; {numbers}",
    )
