"""The elementwise step on a tile, by ATen and by native code: one meaning, no further from float64 than eager."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmkernels._tile import fold_tile, grad_tile
from tests.kernels.tile_cases import (
    EPS,
    SHAPES,
    Vectors,
    assert_bound,
    draw,
    empty_sums,
    fold,
    framed,
    lse_of,
    statistics,
)

fuzz = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def gradient(cosines: Tensor, scale: float, row: Vectors, col: Vectors | None, skip: Tensor | None) -> Tensor:
    """The formula as eager writes it, in the dtype of `cosines`."""
    logits, (row_lse, row_coef) = scale * cosines, (x.to(cosines.dtype) for x in row)
    grad = row_coef[:, None] * (logits - row_lse[:, None]).exp()
    if col is not None:
        col_lse, col_coef = (x.to(cosines.dtype) for x in col)
        grad = grad + col_coef * (logits - col_lse).exp()
    if skip is not None:
        grad = grad.masked_fill(skip[:, None] == torch.arange(cosines.shape[1]), 0)
    return grad


def halves(size: int) -> tuple[slice, slice]:
    return slice(size // 2), slice(size // 2, None)


def unweighed(cosines: Tensor, scale: float) -> Vectors:
    """The rows' sums, tile by tile."""
    sums = empty_sums(len(cosines))
    for rows, cols in itertools.product(*map(halves, cosines.shape)):
        fold_tile(cosines[rows, cols], scale, *(x[rows] for x in sums))
    return sums


@pytest.mark.parametrize("scale", [1.0, 200.0, -7.0, 0.0])
@pytest.mark.parametrize("case", ["random", "negative", "far apart"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_as_exact_as_eagers_log_sum_exp(path, shape, case: str, scale: float) -> None:
    cosines = draw(case, *shape)
    tile, buffer = framed(cosines)
    before = buffer.clone()
    for dim, sums in zip((1, 0), fold(tile, scale), strict=True):
        assert_bound(lse_of(sums), (scale * cosines).logsumexp(dim), (scale * cosines.double()).logsumexp(dim))
    torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


@fuzz
@given(cuts=st.lists(st.integers(0, 90), max_size=4), size=st.integers(1, 90), scale=st.sampled_from([3.0, 200.0]))
def test_any_split_into_tiles_has_the_sums_of_the_whole(path, cuts: list[int], size: int, scale: float) -> None:
    cosines = draw("far apart", size, 90 - size + 1, seed=size)
    (rows, row_buffers), (cols, col_buffers) = (
        zip(*(framed(x) for x in empty_sums(n)), strict=True) for n in cosines.shape
    )
    bounds = [[0, *sorted(min(cut, n) for cut in cuts), n] for n in cosines.shape]
    for i, j in zip(bounds[0], bounds[0][1:]):
        for k, l in zip(bounds[1], bounds[1][1:]):
            fold_tile(cosines[i:j, k:l], scale, *(x[i:j] for x in rows), *(x[k:l] for x in cols))
    for dim, sums in ((1, rows), (0, cols)):
        assert_bound(lse_of(sums), (scale * cosines).logsumexp(dim), (scale * cosines.double()).logsumexp(dim))
    for buffer in row_buffers + col_buffers:
        assert buffer[:3].isnan().all() and buffer[-2:].isnan().all()


@pytest.mark.parametrize("with_cols", [True, False], ids=["both", "rows alone"])
@pytest.mark.parametrize("scale", [1.0, 200.0, -7.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_weighed_as_exactly_as_eagers_softmax(path, shape, scale: float, with_cols: bool) -> None:
    cosines, values = draw("far apart", *shape), draw("random", *shape, seed=1)
    tile, weighed = framed(cosines)[0], framed(values)[0]
    row, col = (empty_sums(size) for size in shape)
    row_cross, col_cross = (framed(torch.zeros(size))[0] for size in shape)
    for rows, cols in itertools.product(*map(halves, shape)):
        fold_tile(
            tile[rows, cols],
            scale,
            *(x[rows] for x in row),
            *((x[cols] for x in col) if with_cols else ()),
            values=weighed[rows, cols],
            row_cross=row_cross[rows],
            col_cross=col_cross[cols] if with_cols else None,
        )
    for dim, sums, cross in ((1, row, row_cross), (0, col, col_cross))[: 2 if with_cols else 1]:
        ref, gold = (
            ((scale * x).softmax(dim) * y).sum(dim) for x, y in ((cosines, values), (cosines.double(), values.double()))
        )
        assert_bound(cross / sums[1], ref, gold)
    assert all(torch.equal(x, y) for x, y in zip(row, unweighed(cosines, scale), strict=True))


@pytest.mark.parametrize("with_cols", [True, False], ids=["both", "rows alone"])
@pytest.mark.parametrize("scale", [1.0, 200.0, -7.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_and_their_sum_are_as_exact_as_eagers(path, shape, scale: float, with_cols: bool) -> None:
    cosines = draw("random", *shape)
    row, col = statistics(cosines, scale)
    columns, center = col if with_cols else None, 0.25
    skip = torch.arange(shape[0]) - 2
    tile, _ = framed(cosines)
    out, buffer = framed(torch.zeros(shape))
    total = grad_tile(tile, scale, row, columns, skip, center, out)
    gold = gradient(cosines.double(), scale, row, columns, skip)
    assert_bound(out, gradient(cosines, scale, row, columns, skip), gold)
    assert buffer.isnan().sum() == buffer.numel() - out.numel()
    # an entry's own error: exp's, the products', and the rounding of S, which exp amplifies
    terms = gold * (cosines.double() - center)
    assert total.dtype == torch.float64
    assert abs(total - terms.sum()) <= (6 + 2 * abs(scale)) * EPS * terms.abs().sum()


def test_a_skipped_nan_is_zero_and_adds_nothing(path) -> None:
    cosines = draw("random", 5, 40)
    row, col = statistics(cosines, 5.0)
    skip = torch.tensor([-1, 3, 39, 40, 16])
    expected = torch.empty_like(cosines)
    total = grad_tile(cosines, 5.0, row, col, skip, 0.5, expected)
    spoilt, out = cosines.clone(), torch.empty_like(cosines)
    spoilt[[1, 2, 4], [3, 39, 16]] = math.nan
    assert torch.equal(grad_tile(spoilt, 5.0, row, col, skip, 0.5, out), total)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_are_float32_gradients_rounded(path, dtype: torch.dtype) -> None:
    cosines = draw("random", 50, 75)
    cosines[4, 2] = math.nan
    cosines.view(torch.int32)[5, 74] = 0x7FFFFFFF  # a NaN that rounding its bits would make a zero
    row, col = statistics(draw("random", 50, 75), 9.0)
    row[1][7] = 1e30
    wide, out = torch.empty_like(cosines), torch.empty(50, 75, dtype=dtype)
    grad_tile(cosines, 9.0, row, col, None, None, wide)
    grad_tile(cosines, 9.0, row, col, None, None, out)
    torch.testing.assert_close(out, wide.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == 2


def test_a_sum_of_a_million_terms_does_not_drift(path) -> None:
    """Terms of one sign and size: a float32 accumulator would stop short of their sum by far."""
    cosines, zeros = torch.full((40, 30000), 0.3), (torch.zeros(40), torch.full((40,), 1 / 3))
    out = torch.empty_like(cosines)
    total = grad_tile(cosines, 0.0, zeros, None, None, 0.0, out)
    gold = out.double().mul(cosines).sum()
    assert abs(total - gold) <= 4 * EPS * gold
    row, col = fold(cosines, 1.0)
    assert abs(row[1] - 30000).max() <= 4 * EPS * 30000
    assert (col[1] == 40).all()


@pytest.mark.parametrize("at", [(0, 0), (3, 37), (39, 69)])
def test_not_a_number_reaches_its_own_sums_and_no_other(path, at: tuple[int, int]) -> None:
    cosines = draw("random", 40, 70)
    expected = [lse_of(sums) for sums in fold(cosines, 3.0)]
    cosines[at] = math.nan
    for index, gold, sums in zip(at, expected, fold(cosines, 3.0), strict=True):
        got = lse_of(sums)
        assert got.isnan().nonzero().tolist() == [[index]]
        others = torch.arange(len(got)) != index
        torch.testing.assert_close(got[others], gold[others])
    out = torch.empty_like(cosines)
    total = grad_tile(cosines, 3.0, *statistics(draw("random", 40, 70), 3.0), None, 0.5, out)
    assert out.isnan().nonzero().tolist() == [list(at)]
    assert total.isnan()


def test_minus_infinity_adds_nothing_even_alone(path) -> None:
    cosines = draw("random", 40, 70)
    cosines[3] = -math.inf
    cosines[:, 33] = -math.inf
    for dim, sums in zip((1, 0), fold(cosines, 3.0), strict=True):
        torch.testing.assert_close(lse_of(sums), (3 * cosines.double()).logsumexp(dim))
        assert (sums[1] == 0).sum() == 1


def test_logits_are_rounded_before_anything_is_subtracted(path) -> None:
    """A fused `scale * cosine - lse` would be another S than the forward pass's: here not 0, but up to 4e-6."""
    cosines = draw("random", 1, 70)
    lse, ones = (99.7 * cosines)[0], torch.ones(70)
    out = torch.empty_like(cosines)
    grad_tile(cosines, 99.7, (torch.full((1,), 300.0), torch.zeros(1)), (lse, ones), None, None, out)
    assert (out == 1).all()
    largest, _ = empty_sums(1)
    fold_tile(cosines, 99.7, largest, torch.zeros(1))
    assert largest == lse.max()


def exp(x: Tensor) -> Tensor:
    """`e^x` as the step computes it: S = x, lse = 0, coef = 1."""
    out = torch.empty(1, len(x))
    grad_tile(x[None], 1.0, (torch.zeros(1), torch.ones(1)), None, None, None, out)
    return out[0]


@pytest.mark.parametrize(("sign", "end"), [(1, 88.72), (-1, 86.8)])
def test_exp_is_within_a_unit_and_a_quarter_in_the_last_place(path, sign: int, end: float) -> None:
    last = torch.tensor(end).view(torch.int32).item()
    x = sign * torch.arange(0, last, 1009, dtype=torch.int32).view(torch.float32)
    gold = x.double().exp()
    ulp = torch.exp2(gold.log2().floor() - 23)
    assert ((exp(x).double() - gold).abs() / ulp).max() <= 1.25


def test_exp_beyond_its_range_is_zero_or_infinity_and_of_nan_is_nan(path) -> None:
    small = exp(torch.linspace(-104, -86.8, 1000))
    assert ((small >= 0) & (small <= 2.1e-38)).all()
    assert (exp(torch.tensor([-104.0, -1e4, -3e38, -math.inf])) == 0).all()
    assert (exp(torch.tensor([88.73, 89.5, 200, 3e38, math.inf])) == math.inf).all()
    assert exp(torch.tensor([math.nan, -math.nan])).isnan().all()
