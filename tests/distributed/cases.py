"""Batches for the distributed losses: cut over ranks by a worker, whole in its test."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NUM, DIM, SCALE, BIAS = 12, 6, 12.0, -3.0
# How many rows each rank has; with labels the columns are dealt the other way round.
LAYOUTS = {
    2: {"even": (6, 6), "uneven": (7, 5), "one empty": (0, 12)},
    3: {"even": (4, 4, 4), "one empty": (5, 0, 7)},
    4: {"even": (3, 3, 3, 3), "one empty": (3, 6, 0, 3)},
}
EXCHANGES = {"gathered": 2**30, "ring": 0}


@dataclass(frozen=True)
class Case:
    """The arguments of a loss beyond features and scale; the tensors are named, and taken from the batch."""

    tensors: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, batch: dict[str, Tensor], rows: slice, cols: slice) -> dict[str, Any]:
        taken: dict[str, Any] = dict(self.options)
        if "labels" in self.tensors:
            taken["labels"] = batch["row labels"][rows], batch["col labels"][cols]
        if "teacher" in self.tensors:
            taken["teacher"] = batch["teacher a"][rows], batch["teacher b"][cols]
        if "negatives" in self.tensors:
            taken["negatives"] = batch["negatives"]
        if "exclude" in self.tensors:
            # of a rank's own columns
            exclude = batch["exclude"][rows]
            taken["exclude"] = torch.where(exclude < 0, -1, exclude - (cols.start or 0))
        if "mask" in self.tensors:
            taken["mask"] = batch["mask"][rows]
        if "b mask" in self.tensors:
            taken["b_mask"] = batch["b mask"][cols]
        return taken


EVERYTHING = {"alpha": 0.4, "label_smoothing": 0.1}
CASES = {
    "plain": Case(), "rows alone": Case(options={"symmetric": False}), "labels": Case(("labels",)),
    "smoothing": Case(options={"label_smoothing": 0.2}), "negatives": Case(("negatives",)),
    "teacher": Case(("teacher",), {"alpha": 0.4}),
    "teacher and negatives": Case(("teacher", "negatives"), {"alpha": 0.4}),
    "exclude": Case(("exclude", "teacher", "negatives"), {"alpha": 0.4}),
    "exclude, rows alone": Case(("exclude",), {"symmetric": False}),
    "everything": Case(("labels", "teacher", "negatives"), EVERYTHING),
    "everything, rows alone": Case(("labels", "teacher", "negatives"), EVERYTHING | {"symmetric": False}),
    "normalized": Case(("labels", "negatives"), {"normalized": True}),
}  # fmt: skip
SIGMOID_CASES = {"plain": Case(), "labels": Case(("labels",))}

TOKEN_CASES = {
    "plain": Case(),
    "rows alone": Case(options={"symmetric": False}),
    "labels, smoothed": Case(("labels",), {"label_smoothing": 0.2}),
    "labels, rows alone": Case(("labels",), {"symmetric": False}),
    "masked, smoothed": Case(("mask",), {"label_smoothing": 0.2}),
}

LATE_CASES = {
    "plain": Case(),
    "labels, masked, smoothed": Case(("labels", "mask", "b mask"), {"label_smoothing": 0.2}),
    "masked": Case(("mask", "b mask")),
    "masked, rows alone": Case(("b mask",), {"symmetric": False}),
}


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A global batch of unit-norm features; of the labels some have no partner, others several."""
    generator = torch.Generator().manual_seed(0)

    def features(num: int) -> Tensor:
        return F.normalize(torch.randn(num, DIM, generator=generator, dtype=torch.float64), dim=1).to(dtype)

    names = ("a", "b", "teacher a", "teacher b")
    found = {name: features(NUM) for name in names} | {"negatives": features(5)}
    found["row labels"] = torch.randint(0, 6, (NUM,), generator=generator)
    found["col labels"] = torch.randint(1, 7, (NUM,), generator=generator)
    # on the row's rank in each layout
    found["exclude"] = torch.tensor([1, 0, 1, *[-1] * 6, 10, 11, 9])
    found["tokens"] = F.normalize(torch.randn(NUM, 4, DIM, generator=generator, dtype=dtype), dim=2)
    found["mask"] = torch.rand(NUM, 4, generator=generator) < 0.7
    found["texts"] = F.normalize(torch.randn(NUM, 3, DIM, generator=generator, dtype=dtype), dim=2)
    found["b mask"] = torch.rand(NUM, 3, generator=generator) < 0.7
    found["b mask"][2] = False  # a text of padding alone
    return found


def extent(counts: tuple[int, ...], rank: int) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def apart() -> Tensor:
    """Features `[NUM, DIM]` of two halves that point in opposite ways."""
    generator = torch.Generator().manual_seed(1)
    noise = 0.05 * torch.randn(NUM, DIM, generator=generator, dtype=torch.float64)
    noise[: NUM // 2, 0] += 1
    noise[NUM // 2 :, 0] -= 1
    return F.normalize(noise, dim=1)


def near(dtype: torch.dtype) -> Tensor:
    """Features `[NUM, NUM + 1]` whose products are 100 with themselves and 89 with each other."""
    apart = 11**0.5 * torch.eye(NUM, dtype=dtype)
    return torch.cat([torch.full((NUM, 1), 89**0.5, dtype=dtype), apart], 1)
