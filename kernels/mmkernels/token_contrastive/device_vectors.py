"""The token-contrastive kernel of vectors: what is made of the tiles' maxima and sums."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mmkernels._device import INTERPRETED
from mmkernels._tl import Constant

LOG2_E = Constant(1.4426950408889634)
# not -inf, less which -inf is not a number
NOWHERE = Constant(-3.0e38)
# Tiles whose maxima or sums are read at a time; of the interpreter's few tiles as well not all.
AT_ONCE = Constant(4 if INTERPRETED else 64)


@triton.jit
def _merged(ptr, plane, stride, parts, inside, BLOCK: tl.constexpr):
    """Over the tiles' maxima and sums at `ptr`: the log-sum-exp in float64."""
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        ptrs = ptr + part.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        maxima = tl.load(ptrs, mask=mask, other=float("-inf"))
        sums = tl.load(ptrs + plane, mask=mask, other=0.0)
        new = tl.maximum(largest, tl.max(maxima, 0))
        by = tl.maximum(new, NOWHERE)
        shrink = tl.exp2((largest - by) * LOG2_E)
        shares = tl.exp2((maxima - by[None, :]) * LOG2_E)
        total = total * shrink + tl.sum(sums.to(tl.float64) * shares, 0)
        largest = new
    return largest.to(tl.float64) + tl.log(total)


@triton.jit
def _summed(ptr, stride, parts, inside, BLOCK: tl.constexpr):
    """The sum of the tiles' at `ptr`."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        ptrs = ptr + part.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        total += tl.sum(tl.load(ptrs, mask=mask, other=0.0).to(tl.float64), 0)
    return total.to(tl.float32)


@triton.jit
def _store_statistics(
    ptr, plane, stride, parts, lse_ptr, rest_ptr, total_ptr, matched_ptr, mask,
    HAS_TOTALS: tl.constexpr, HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of rows or columns: the log-sum-exp in float32 and what rounding took from it, and the sums."""
    lse = _merged(ptr, plane, stride, parts, mask, BLOCK)
    rounded = lse.to(tl.float32)
    tl.store(lse_ptr, rounded, mask=mask)
    rest = tl.where(tl.abs(rounded) < float("inf"), lse - rounded.to(tl.float64), 0.0)
    tl.store(rest_ptr, rest.to(tl.float32), mask=mask)
    if HAS_TOTALS:
        tl.store(total_ptr, _summed(ptr + 2 * plane, stride, parts, mask, BLOCK), mask=mask)
    if HAS_LABELS:
        tl.store(matched_ptr, _summed(ptr + 3 * plane, stride, parts, mask, BLOCK), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "tiles_m", "tiles_n"])
def _token_contrastive_combine_kernel(
    row_ptr,
    col_ptr,
    logit_ptr,  # [M], at the positives
    positives_ptr,
    row_lse_ptr,
    col_lse_ptr,
    positive_ptr,
    row_total_ptr,
    col_total_ptr,
    row_matched_ptr,
    col_matched_ptr,
    row_rest_ptr,
    col_rest_ptr,
    M,
    N,
    tiles_m,
    tiles_n,
    HAS_POSITIVES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of as many rows and columns, from what the tiles left."""
    first = tl.program_id(0) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    mask_m, mask_n = offs < M, offs < N
    row_stride, col_stride = tiles_m * ROWS, tiles_n * BLOCK_N
    row_plane, col_plane = row_stride.to(tl.int64) * tiles_n, col_stride.to(tl.int64) * tiles_m
    _store_statistics(
        row_ptr + first, row_plane, row_stride, tl.where(first < M, tiles_n, 0), row_lse_ptr + offs,
        row_rest_ptr + offs, row_total_ptr + offs, row_matched_ptr + offs, mask_m, HAS_TOTALS, HAS_LABELS, BLOCK,
    )  # fmt: skip
    _store_statistics(
        col_ptr + first, col_plane, col_stride, tl.where(first < N, tiles_m, 0), col_lse_ptr + offs,
        col_rest_ptr + offs, col_total_ptr + offs, col_matched_ptr + offs, mask_n, HAS_TOTALS, HAS_LABELS, BLOCK,
    )  # fmt: skip
    if HAS_POSITIVES:
        place = tl.load(positives_ptr + offs, mask=mask_m, other=-1)
        has_one = (place >= 0) & (place < N)
        # not a number where it is out of range
        positive = tl.load(logit_ptr + offs, mask=mask_m & has_one, other=0.0)
        tl.store(positive_ptr + offs, tl.where(has_one | (place == -1), positive, float("nan")), mask=mask_m)
