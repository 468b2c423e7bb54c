"""Whether a model tells a caption's own image from another's."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.tasks.subject import Subject, taken

BATCH_SIZE = 64


@torch.no_grad()
def scores(subject: Subject, image: Tensor, text: Tensor) -> Tensor:
    """[R] float32 on the CPU of pairs of held-out images and captions, each int64 [R]."""
    states, captions = subject.held_out.states, subject.held_out.captions
    assert states is not None
    matches = subject.recipe.matches(subject.assets, subject.model, subject.device)

    def matched(part: range) -> Tensor:
        pairs = list(part) or [0]
        chosen, place = image[pairs].unique(return_inverse=True)
        texts = [captions[i] for i in text[pairs].tolist()]
        found = matches(taken(states, chosen).to(subject.device), place.to(subject.device), texts)
        return found.float().cpu()[: len(part)]

    return torch.cat(subject.ranks.shared(len(image), BATCH_SIZE, matched))


def every_score(subject: Subject) -> tuple[Tensor, Tensor]:
    """Of all held-out images and captions, [I, N] and [N, I]; equal captions are matched once."""
    held_out = subject.held_out
    distinct = list(dict.fromkeys(held_out.captions))
    first = torch.tensor([held_out.captions.index(caption) for caption in distinct])
    num = len(held_out.index)
    found = scores(subject, torch.arange(num).repeat_interleave(len(first)), first.repeat(num)).view(num, -1)
    place = {caption: i for i, caption in enumerate(distinct)}
    each = found[:, [place[caption] for caption in held_out.captions]]
    return each, each.T


def accuracy(subject: Subject, seed: int = 0) -> float:
    """The share of pairs told right from wrong, see `figures`."""
    return figures(subject, seed)["ITM accuracy"]


def figures(subject: Subject, seed: int = 0) -> dict[str, float]:
    """Of each caption with its image, and with one drawn from those that it is wrong for: the share of pairs told right
    from wrong by the sign of their score, and that of captions whose own image has the higher one. Half is chance."""
    held_out, val = subject.held_out, subject.val
    generator = torch.Generator().manual_seed(seed)
    text = torch.arange(len(held_out.captions))
    right = held_out.relevance.images_of_texts(0, len(held_out.captions))
    if val.labels_match and val.labels is not None:
        classes = torch.tensor(val.labels)[held_out.index]
        right = right | (classes[held_out.owner][:, None] == classes)
    wrong = ~right
    has_wrong = wrong.any(1)
    drawn = torch.multinomial(wrong[has_wrong].double(), 1, generator=generator)[:, 0]
    of_right = scores(subject, held_out.owner, text)
    of_wrong = scores(subject, drawn, text[has_wrong])
    told = torch.cat([of_right > 0, of_wrong < 0])
    order = of_right[has_wrong] > of_wrong
    return {name: x.double().mean().item() for name, x in (("ITM accuracy", told), ("ITM order", order))}


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    return {} if subject.pairs.val is None else figures(subject)


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints the accuracy."""
    if options is not None or subject.pairs.val is not None:
        found = figures(subject)
        above = f"the caption's own image above another's: {100 * found['ITM order']:.1f} %"
        print(f"ITM accuracy (held-out): {100 * found['ITM accuracy']:.1f} %; {above}")
    return []
