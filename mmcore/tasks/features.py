"""How well frozen features of an image tower tell classes apart: nearest neighbours, and a linear probe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data import DataConfig, EvalSet
from mmcore.data.opening import open_held_out
from mmcore.figures import shown
from mmcore.metrics.probe import knn_accuracy, linear_probe_accuracy
from mmcore.ops import require
from mmcore.tasks.subject import BATCH_SIZE, Subject, nothing

FOLLOWED = 5_000
"""Training images that a run under way is measured with, at most."""
NEIGHBOURS = 20


@dataclass(frozen=True)
class Options:
    """Measure on classes that the tower did not learn from."""

    data: str | None = None
    """Folder of classes that is measured on; None = what the run held out."""
    class_names: str | None = None
    """Of a folder of synsets, as --class-names of mmcore train has it."""
    train_data: str | None = None
    """Folder of the same classes that neighbours and probe are taken from; None = what the run was trained on."""
    most: int = 50_000
    """Images of them at most, drawn at random."""
    k: int = NEIGHBOURS
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of their votes."""

    def held_out(self) -> Any:
        """See `mmcore.tasks.subject.Options`."""
        return None


def figure(kind: str, name: str) -> str:
    """What a figure is called of features by a name."""
    return f"{kind} of {name}"


def follow(subject: Subject) -> dict[str, float]:
    """While a run trains."""
    train, test = _sides(subject, None)
    return {} if train is None or test is None else accuracies(subject, train, test, most=FOLLOWED)


def report(subject: Subject, options: Options | None) -> list[Path]:
    """Prints the accuracy of both for each kind of feature."""
    train, test = _sides(subject, options)
    if train is None or test is None:
        name = subject.pairs.name
        return nothing(options, f"{name} has no held-out images of classes: give --data and --train-data, two folders")
    chosen = options or Options()
    found = accuracies(subject, train, test, chosen.most, chosen.k, chosen.temperature)
    for name, value in found.items():
        print(f"{name} (held-out): {shown(name, value)}")
    return []


def _sides(subject: Subject, options: Options | None) -> tuple[EvalSet | None, EvalSet | None]:
    """Images with classes: those that are known, and those that are measured on; None where there are none."""
    if options is not None and options.data is not None:
        require("eval", options.train_data is not None, "--train-data must be given with --data, got {}", None)
        assert options.train_data is not None
        both = [_classes(path, options.class_names) for path in (options.train_data, options.data)]
        what = "--train-data must have the classes of --data, got {} and {}"
        require("eval", both[0][1] == both[1][1], what, *(len(names) for _, names in both))
        return both[0][0], both[1][0]
    require("eval", options is None or options.train_data is None, "--train-data must be given with --data, got {}", "")
    data = subject.pairs
    classes = getattr(data.source, "classes", None)
    if classes is None or data.val is None or data.val.labels is None:
        return None, None
    source: Any = data.source
    return EvalSet(source, range(len(classes)), [], list(classes), data.max_broken), data.val


def _classes(folder: str, names: str | None) -> tuple[EvalSet, list[str]]:
    found = open_held_out(DataConfig(folder, class_names=names))
    require("eval", found.class_names is not None, "data must be a folder of classes, got {!r}", folder)
    assert found.class_names is not None and found.val is not None
    return found.val, found.class_names


@torch.no_grad()
def accuracies(
    subject: Subject, train: EvalSet, test: EvalSet, most: int, k: int = NEIGHBOURS, temperature: float = 0.07
) -> dict[str, float]:
    """In [0, 1], by the names of both and of the features; `k` at most as many as there are training images."""
    if len(train) > most:
        places = np.sort(np.random.default_rng(0).permutation(len(train))[:most]).tolist()
        assert train.labels is not None
        labels = [train.labels[i] for i in places]
        train = EvalSet(train.source, [train.indices[i] for i in places], [], labels, train.max_broken)
    (known, of_known), (rows, of_rows) = (_computed(subject, side) for side in (train, test))
    found: dict[str, float] = {}
    for name in known:
        sides = known[name], of_known, rows[name], of_rows
        found[figure("k-NN accuracy", name)] = knn_accuracy(*sides, k=min(k, len(of_known)), temperature=temperature)
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
