"""How well frozen features of an image tower tell classes apart: nearest neighbours, and a linear probe."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, EvalSet
from mmcore.data.sources.classes import open_labelled
from mmcore.figures import shown
from mmcore.metrics.probe import knn_accuracy, linear_probe_accuracy
from mmcore.ops import require
from mmcore.tasks.subject import BATCH_SIZE, Subject, nothing

FOLLOWED = 5_000
"""Training images that a run under way is measured with, at most."""
MOST_PROBED = 10**8
"""Images times their features times classes up to which a run under way is measured by a probe too: of ImageNet's
classes one takes minutes."""
NEIGHBOURS = 20


@dataclass(frozen=True)
class Options:
    """Measure on classes that the tower did not learn from."""

    data: str | None = None
    """Folder with a folder of images for each class, such as ImageNet's val, that is measured on; None = what the run
    held out."""
    train_data: str | None = None
    """Folder of the same classes that neighbours and probe are taken from; None = what the run was trained on."""
    most: int = 50_000
    """Images of them at most, drawn at random."""
    k: int | None = None
    """Neighbours that vote; None = 20, or all training images where they are fewer."""
    temperature: float = 0.07
    """Of their votes."""


def figure(kind: str, name: str) -> str:
    """What a figure is called of features by a name."""
    return f"{kind} of {name}"


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    sides = _own(subject)
    return {} if sides is None else accuracies(subject, *sides, most=FOLLOWED, probed=MOST_PROBED)


def report(subject: Subject, options: Options | None) -> list[Path]:
    """Prints the accuracy of both for each kind of feature."""
    chosen = options or Options()
    require("eval", chosen.most >= 2, "--most must be at least 2, got {}", chosen.most)
    sides = _own(subject) if chosen.data is None and chosen.train_data is None else _given(chosen)
    if sides is None:
        what = "no held-out images of two or more classes: give --data and --train-data, two folders of classes"
        return nothing(options, f"{subject.pairs.name} has {what}")
    found = accuracies(subject, *sides, chosen.most, chosen.k, chosen.temperature)
    for name, value in found.items():
        print(f"{name} (held-out): {shown(name, value)}")
    return []


def _own(subject: Subject) -> tuple[EvalSet, EvalSet] | None:
    """Images with classes that the run trained on, and those that it held out; None where there are none, or of one
    class."""
    data, classes = subject.pairs, subject.pairs.classes()
    if classes is None or len(set(classes)) < 2 or data.val is None or data.val.labels is None:
        return None
    source: Any = data.source
    return EvalSet(source, range(len(classes)), [], list(classes), data.max_broken), data.val


def _given(options: Options) -> tuple[EvalSet, EvalSet]:
    """As `_own`, of two folders; a ValueError where one is missing or they do not fit."""
    train, test = options.train_data, options.data
    given = train is not None and test is not None
    require("eval", given, "--data and --train-data must be given together, got {} and {}", test, train)
    assert train is not None and test is not None
    limit = DataConfig().max_broken
    known, other = (side.held_out(limit) for side in open_labelled(train, test))
    what = "--train-data must have images of two or more classes, got 1 in {!r}"
    require("eval", len(set(known.labels or ())) > 1, what, train)
    return known, other


@torch.no_grad()
def accuracies(
    subject: Subject,
    train: EvalSet,
    test: EvalSet,
    most: int,
    k: int | None = None,
    temperature: float = 0.07,
    probed: float = math.inf,
) -> dict[str, float]:
    """In [0, 1], by the names of both and of the features, each on the subject's device.

    Args:
        train, test: images with classes that are known, and those that are measured on.
        most: training images, at most.
        k: neighbours; None = `NEIGHBOURS`, or all.
        temperature: of their votes.
        probed: images times their features times classes up to which there is a probe.
    """
    if len(train) > most:
        places = np.sort(np.random.default_rng(0).permutation(len(train))[:most]).tolist()
        assert train.labels is not None
        labels = [train.labels[i] for i in places]
        train = EvalSet(train.source, [train.indices[i] for i in places], [], labels, train.max_broken)
    (known, of_known), (rows, of_rows) = (_computed(subject, side) for side in (train, test))
    what = "the readable images must be one or more, got {} to learn from and {} to measure on"
    require("features", len(of_known) > 0 and len(of_rows) > 0, what, len(of_known), len(of_rows))
    found: dict[str, float] = {}
    neighbours = min(NEIGHBOURS, len(of_known)) if k is None else k
    num_classes = len(of_known.unique())
    for name in known:
        sides = [x.to(subject.device) for x in (known[name], of_known, rows[name], of_rows)]
        found[figure("k-NN accuracy", name)] = knn_accuracy(*sides, k=neighbours, temperature=temperature)
        if num_classes > 1 and known[name].numel() * num_classes <= probed:
            found[figure("linear probe accuracy", name)] = linear_probe_accuracy(*sides)
    return found


def _computed(subject: Subject, images: EvalSet) -> tuple[dict[str, Tensor], Tensor]:
    """Features by their names, float32 [N, D] on the CPU, and classes, int64 [N], of the images that can be read."""
    able = subject.recipe.represents(subject.assets, subject.model, subject.device)

    def of(good: list[Image.Image], positions: list[int]) -> tuple[list[int], list[Tensor]]:
        found = able.compute(able.preprocess(good).to(subject.device))
        return positions, [x.float().cpu()[: len(positions)] for x in found]

    places, parts = zip(*subject.ranks.over(images, BATCH_SIZE, of), strict=True)
    assert images.labels is not None
    labels = torch.tensor([images.labels[i] for positions in places for i in positions])
    return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(able.names)}, labels
