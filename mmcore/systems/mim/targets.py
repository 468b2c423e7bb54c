"""What systems of masked image modelling differ in: a table, targets and losses by their names in it."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Literal["pixels", "hog", "tokens", "features", "states"]


class Row(NamedTuple):
    """A system: what the head predicts of a masked patch, by which loss, and how the prediction is measured. In all of
    them a mask token stands for masked patches, among all others, and the head is linear; MAE, whose encoder reads
    visible patches alone and whose head is a decoder, is a system of its own."""

    target: Target
    loss: str
    score: Literal["R^2", "accuracy", "cosine"]


ROWS: Mapping[str, Row] = {
    "simmim": Row("pixels", "l1", "R^2"),
    "maskfeat": Row("hog", "mse", "R^2"),
    "beit": Row("tokens", "cross-entropy", "accuracy"),
    "beit2": Row("tokens", "cross-entropy", "accuracy"),
    "mvp": Row("features", "cosine", "cosine"),
    "eva": Row("features", "cosine", "cosine"),
    "data2vec": Row("states", "smooth l1", "R^2"),
}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cosine(predicted: Tensor, target: Tensor) -> Tensor:
    return -F.cosine_similarity(_wide(predicted), _wide(target), dim=1)


def _smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(_wide(predicted), _wide(target), reduction="none", beta=2.0).mean(1)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda predicted, target: (_wide(predicted) - target).abs().mean(1),
    "mse": lambda predicted, target: (_wide(predicted) - target).square().mean(1),
    "cross-entropy": lambda predicted, target: F.cross_entropy(_wide(predicted), target, reduction="none"),
    "cosine": _cosine,
    "smooth l1": _smooth_l1,  # the square below a distance of 2
}
"""Of predictions [N, C] and targets, [N, C] or tokens [N]: [N], at least float32."""
