"""Tiles, their sums and the bound that the tests of the elementwise step share."""

import math

import torch
from torch import Tensor

from mmkernels._tile import fold_tile

EPS = torch.finfo(torch.float32).eps
SHAPES = [(1, 1), (1, 40), (33, 1), (31, 17), (70, 601)]
Vectors = tuple[Tensor, Tensor]


def draw(case: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(rows, cols, generator=generator) - 1
    if case == "negative":
        return cosines.abs_().neg_()
    if case == "far apart":  # each row and column far below another: one shift for all would flush it
        return cosines.mul_(0.01).add_(torch.linspace(-1, 0, rows)[:, None]).add_(torch.linspace(-1, 0, cols))
    return cosines


def framed(x: Tensor) -> tuple[Tensor, Tensor]:
    """A view that holds `x`, and the larger buffer of NaN that it lies in, at odd strides and offsets."""
    buffer = x.new_full([size + 5 for size in x.shape], math.nan)
    view = buffer[tuple(slice(3, 3 + size) for size in x.shape)]
    view.copy_(x)
    return view, buffer


def empty_sums(size: int, dtype: torch.dtype = torch.float32) -> Vectors:
    return torch.full((size,), -math.inf, dtype=dtype), torch.zeros(size, dtype=dtype)


def lse_of(sums: Vectors) -> Tensor:
    return sums[0].double() + sums[1].double().log()


def fold(cosines: Tensor, scale: float) -> tuple[Vectors, Vectors]:
    row, col = (empty_sums(size, cosines.dtype) for size in cosines.shape)
    fold_tile(cosines, scale, *row, *col)
    return row, col


def assert_bound(got: Tensor, ref: Tensor, gold: Tensor) -> None:
    """The house's bound: twice the eager reference's error, and four roundings."""
    bound = 2 * (ref.double() - gold).abs().max() + 4 * torch.finfo(ref.dtype).eps * gold.abs().max()
    assert got.shape == gold.shape
    assert (got.double() - gold).abs().max() <= bound


def statistics(cosines: Tensor, scale: float) -> tuple[Vectors, Vectors]:
    """Log-sum-exps and coefficients of rows and columns, as a backward pass has them."""
    logits, generator = scale * cosines.double(), torch.Generator().manual_seed(1)
    row, col = (
        (logits.logsumexp(dim).float(), torch.randn(size, generator=generator) / size)
        for dim, size in ((1, len(cosines)), (0, cosines.shape[1]))
    )
    return row, col


def labels(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Some equal, some only in their lower or their upper 32 bits."""
    generator = torch.Generator().manual_seed(2)
    low, high = (torch.randint(0, 3, (rows + cols,), generator=generator) for _ in range(2))
    row, col = (low + (high << 32)).split([rows, cols])
    return row, col
