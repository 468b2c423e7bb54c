"""The losses with small inputs of any number of rows, for what all of them promise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mk


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(*values: Tensor | float) -> list[Tensor]:
    return [torch.as_tensor(x).detach().clone().requires_grad_() for x in values]


@dataclass(frozen=True)
class Loss:
    """A loss, its reference and its inputs of a number of rows, of which those that are learned are leaves.

    `is_by_row`: whether what is wrong with a row reaches its own loss alone; `rows`: over a tile, and no more than the
    interpreter can do in no time.
    """

    fn: Callable[..., Tensor]
    ref: Callable[..., Tensor]
    inputs: Callable[[int], list[Any]]
    is_by_row: bool
    rows: int = 40

    def leaves(self, inputs: list[Any]) -> list[Tensor]:
        return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def features(rows: int, seed: int = 0) -> Tensor:
    return normal(rows, 24, seed=seed)


def words(rows: int) -> list[Any]:
    """Every third target is ignored."""
    targets = torch.randint(70, (rows,), generator=torch.Generator().manual_seed(0))
    targets[::3] = -100
    return [*learned(features(rows), features(70, 1) / 24**0.5), targets]


LOSSES = {
    "contrastive": Loss(
        mk.contrastive_loss,
        mk.contrastive_loss_ref,
        lambda n: learned(features(n), features(n, 1), 0.7),
        is_by_row=False,
    ),
    "token_contrastive": Loss(
        mk.token_contrastive_loss,
        mk.token_contrastive_loss_ref,
        lambda n: learned(normal(n, 5, 12), normal(n, 12, seed=1), 0.7),
        is_by_row=False,
        rows=12,
    ),
    "sigmoid": Loss(
        mk.sigmoid_loss, mk.sigmoid_loss_ref, lambda n: learned(features(n), features(n, 1), 0.7, -3.0), is_by_row=True
    ),
    "linear_cross_entropy": Loss(mk.linear_cross_entropy, mk.linear_cross_entropy_ref, words, is_by_row=True),
    "distillation": Loss(
        mk.distillation_loss,
        mk.distillation_loss_ref,
        lambda n: [*learned(3 * normal(n, 40)), 3 * normal(n, 40, seed=1), 0.5, 0.25],
        is_by_row=True,
        rows=12,
    ),
}


def on_cuda(name: str, rows: int, *, needs_grad: bool = True) -> list[Any]:
    """Inputs of unit norm on the device, leaves again."""
    found = []
    for x in LOSSES[name].inputs(rows):
        if isinstance(x, Tensor):
            y = x.detach().cuda()
            y = F.normalize(y, dim=-1) if y.ndim > 1 else y
            found.append(y.requires_grad_(x.requires_grad and needs_grad))
        else:
            found.append(torch.tensor(x, device="cuda"))
    return found
