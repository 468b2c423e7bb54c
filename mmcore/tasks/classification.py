"""How often a classifier's most likely class of a held-out image is the right one."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmcore.data import EvalSet
from mmcore.figures import shown
from mmcore.metrics.zeroshot import top_k_accuracy
from mmcore.ops import require
from mmcore.report.sheets import plot_captions
from mmcore.tasks.speaking import spread
from mmcore.tasks.subject import BATCH_SIZE, Options, Subject, nothing

__all__ = ["Options", "figure", "follow", "report"]


def figure(k: int) -> str:
    """What the accuracy of the `k` most likely classes is called."""
    return f"top-{k} accuracy"


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    found = _classified(subject)
    return {} if found is None else _accuracies(*found[:2])


def report(subject: Subject, options: Any) -> list[Path]:
    """Prints the accuracy of the most likely class, and of the five most likely ones where there are more; draws some
    images with what they are taken for."""
    found = _classified(subject)
    if found is None:
        return nothing(
            options, f"{subject.pairs.name} has no held-out images of classes: give --data, a folder of them"
        )
    scores, labels, positions = found
    values = _accuracies(scores, labels)
    for name, value in values.items():
        print(f"{name} (held-out), {len(labels)} images: {shown(name, value)}")
    classes = _able(subject).classes
    chosen = spread(len(labels))
    says, right = scores.argmax(1)[chosen].tolist(), labels[chosen].tolist()
    title = (
        f"{subject.pairs.name}: held-out images and what they are taken for; {figure(1)} {shown('', values[figure(1)])}"
    )
    path = subject.folder / "classes.png"
    plot_captions(
        [subject.val.raw_image(positions[i]) for i in chosen],
        [classes[i] for i in says],
        [[classes[i]] for i in right],
        path,
        title=title,
        right=[x == y for x, y in zip(says, right, strict=True)],
    )
    return [path]


def _able(subject: Subject) -> Any:
    return subject.recipe.classifies(subject.assets, subject.model, subject.device)


def _accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    num = scores.shape[1]
    ks = tuple(k for k in (1, 5) if k == 1 or k < num)
    return {figure(k): value for k, value in top_k_accuracy(scores, torch.eye(num), labels, ks=ks).items()}


@torch.no_grad()
def _classified(subject: Subject) -> tuple[Tensor, Tensor, list[int]] | None:
    """Logits [N, C] of the readable held-out images, their classes as the model counts them, int64 [N], and which
    images they are of; None where nothing with classes is held out."""
    able, data = _able(subject), subject.pairs
    images: EvalSet | None = data.val
    if images is None or images.labels is None or data.class_names is None:
        return None
    number = _numbers(able.classes, data.class_names, data.name)

    def of(good: list[Image.Image], positions: list[int]) -> tuple[list[int], Tensor]:
        logits = able.logits(able.preprocess(good).to(subject.device))
        return positions, logits.float().cpu()[: len(positions)]

    places, parts = zip(*subject.ranks.over(images, BATCH_SIZE, of), strict=True)
    positions = [i for part in places for i in part]
    return torch.cat(parts), torch.tensor([number[images.labels[i]] for i in positions]), positions


def _numbers(known: tuple[str, ...], names: list[str], data: str) -> list[int]:
    """The model's number of each class of some data: by their order where all names are the same, else by name."""
    if list(known) == names:
        return list(range(len(names)))
    place = {name: i for i, name in enumerate(known)}
    what = "{} must have the classes that the run was trained on, got {!r} besides"
    unknown = [name for name in names if name not in place]
    require("eval", not unknown, what, data, *unknown[:1])
    twice = sorted({name for name in names if known.count(name) > 1})
    what = "{} must have names of classes that tell them apart, or all of the run's in their order, got {!r} twice"
    require("eval", not twice, what, data, *twice[:1])
    return [place[name] for name in names]
