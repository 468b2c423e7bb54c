"""The contrastive kernels of vectors: what is made of the tiles' sums, and of the gradients of the statistics."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from mmkernels.contrastive.device_state import (
    CENTER,
    GRAD_CEILING,
    LOST,
    LOWEST,
    NOWHERE,
    SHARE_UNIT,
    UNIT,
    VECTORS,
    _largest,
    _shift,
    _shift_in_all,
)


@triton.jit(do_not_specialize=["M", "N"], do_not_specialize_on_alignment=VECTORS[:6])
def _contrastive_weights_kernel(
    scale_ptr,
    state_ptr,
    center_ptr,
    positives_ptr,
    row_lse_ptr,
    col_lse_ptr,
    positive_ptr,
    row_rest_ptr,
    col_rest_ptr,
    positive_rest_ptr,
    d_row_ptr,
    d_col_ptr,
    d_positive_ptr,
    row_ptr,  # [M], up to a whole tile, zero beyond
    col_ptr,  # [N]
    weight_ptr,  # [M]
    share,
    positive_share,
    M,
    N,
    rows,
    cols,
    ALWAYS: tl.constexpr,
    PARTS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    DIAGONAL: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What pass 2 multiplies the shifted exponentials with, and dL/dS at the positives, in units of dL/dS: from the
    gradients of the statistics, `share` of those of the log-sum-exps and `positive_share` of those of the positives."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_m, mask_n = offs < M, offs < N
    largest = _largest(state_ptr, 2, PARTS)
    if SYMMETRIC:
        largest += _largest(state_ptr, 3, PARTS)
    largest *= share
    if HAS_TEACHER:
        largest += _largest(state_ptr, 4, PARTS) + _largest(state_ptr, 5, PARTS)
    largest = tl.maximum(largest, 1e-30)
    unit = GRAD_CEILING / largest
    d_row = tl.load(d_row_ptr + offs, mask=mask_m, other=0.0) * share
    row_lse = tl.load(row_lse_ptr + offs, mask=mask_m, other=0.0)
    row_rest = tl.load(row_rest_ptr + offs, mask=mask_m, other=0.0)
    if not ALWAYS:
        scale, factor, shift, center, moved, _serves = _shift(scale_ptr, state_ptr, center_ptr, PARTS, DIAGONAL)
        per_nat = factor.to(tl.float64) / scale.to(tl.float64)
        by = _shift_in_all(factor, shift, center)
        exact = by - (row_lse.to(tl.float64) + row_rest) * per_nat
        tl.store(row_ptr + offs, tl.where(mask_m, d_row * unit * tl.exp2(exact).to(tl.float32), 0.0), mask=offs < rows)
        lowest = tl.min(tl.where(mask_m, row_lse, float("inf")), 0)
        if SYMMETRIC:
            d_col = tl.load(d_col_ptr + offs, mask=mask_n, other=0.0) * share
            col_lse = tl.load(col_lse_ptr + offs, mask=mask_n, other=0.0)
            col_rest = tl.load(col_rest_ptr + offs, mask=mask_n, other=0.0)
            exact = by - (col_lse.to(tl.float64) + col_rest) * per_nat
            col = tl.where(mask_n, d_col * unit * tl.exp2(exact).to(tl.float32), 0.0)
            tl.store(col_ptr + offs, col, mask=offs < cols)
            lowest = tl.minimum(lowest, tl.min(tl.where(mask_n, col_lse, float("inf")), 0))
        if (moved > 0) & (lowest < moved + LOWEST):
            tl.store(state_ptr + LOST, 1.0)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + UNIT, unit)
        tl.store(state_ptr + SHARE_UNIT, unit * share)
    if HAS_POSITIVES:
        positive = tl.load(positive_ptr + offs, mask=mask_m, other=0.0)
        positive_rest = tl.load(positive_rest_ptr + offs, mask=mask_m, other=0.0)
        weight = tl.load(d_positive_ptr + offs, mask=mask_m, other=0.0) * positive_share
        weight += tl.exp((positive - row_lse) + (positive_rest - row_rest)) * d_row
        if DIAGONAL:
            place, has_one = offs, mask_m
        else:
            given = tl.load(positives_ptr + offs, mask=mask_m, other=-1)
            has_one = given >= 0
            place = tl.minimum(tl.maximum(given, 0), N - 1)
        if SYMMETRIC:
            d_col = tl.load(d_col_ptr + place, mask=mask_m, other=0.0) * share
            col_lse = tl.load(col_lse_ptr + place, mask=mask_m, other=0.0)
            col_rest = tl.load(col_rest_ptr + place, mask=mask_m, other=0.0)
            weight += tl.exp((positive - col_lse) + (positive_rest - col_rest)) * d_col
        tl.store(weight_ptr + offs, tl.where(has_one, weight * unit, 0.0), mask=mask_m)


@triton.jit(do_not_specialize=["first_part", "M"])
def _contrastive_pairs_grad_kernel(
    a_ptr,
    b_ptr,
    da_ptr,  # of the products, in units, float32
    db_ptr,
    weight_ptr,
    scale_ptr,
    state_ptr,
    out_a_ptr,
    out_b_ptr,
    dscale_ptr,  # [first_part + M]
    stride_am,
    stride_bn,
    first_part,
    M,
    D,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of pairs of rows: the products' plus the positives', out of their units and times the scale."""
    offs_m = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)[:, None]
    weight = tl.load(weight_ptr + offs_m, mask=mask_m, other=0.0)
    unit = tl.load(state_ptr + UNIT)
    factor = tl.load(scale_ptr).to(tl.float32) / unit
    cosine = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)[None, :]
        inside = mask_m[:, None] & (offs_d < D)
        a = tl.load(a_ptr + rows * stride_am + offs_d, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + rows * stride_bn + offs_d, mask=inside, other=0.0).to(tl.float32)
        cosine += tl.sum(a * b, 1)
        places = rows * D + offs_d
        if NEEDS_A:
            da = (tl.load(da_ptr + places, mask=inside, other=0.0) + weight[:, None] * b) * factor
            tl.store(out_a_ptr + places, da.to(out_a_ptr.dtype.element_ty), mask=inside)
        if NEEDS_B:
            db = (tl.load(db_ptr + places, mask=inside, other=0.0) + weight[:, None] * a) * factor
            tl.store(out_b_ptr + places, db.to(out_b_ptr.dtype.element_ty), mask=inside)
    tl.store(dscale_ptr + first_part + offs_m, weight / unit * (cosine - tl.load(state_ptr + CENTER)), mask=mask_m)


@triton.jit
def _merged(ptr, plane, stride, parts, BLOCK: tl.constexpr, EXACT: tl.constexpr, HAS_CROSS: tl.constexpr):
    """Over the tiles' partial results at `ptr`: the maximum, the sum in float64, and the sum times weights."""
    PARTS_AT_ONCE: tl.constexpr = 8 if EXACT else 16
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    cross = tl.zeros([BLOCK], dtype=tl.float64)
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for first in range(0, parts, PARTS_AT_ONCE):
        part = first + tl.arange(0, PARTS_AT_ONCE)
        ptrs = ptr + part.to(tl.int64)[:, None] * stride + offs[None, :]
        mask = (part < parts)[:, None]
        if EXACT:
            maxima = tl.load(ptrs, mask=mask, other=float("-inf"))
            new = tl.maximum(largest, tl.max(maxima, 0))
            by = tl.maximum(new, NOWHERE)
            shares = tl.exp(maxima.to(tl.float64) - by.to(tl.float64)[None, :])
            shrink = tl.exp(largest.to(tl.float64) - by.to(tl.float64))
            largest = new
            sums = tl.load(ptrs + plane, mask=mask, other=0.0).to(tl.float64)
            total = total * shrink + tl.sum(sums * shares, 0)
            if HAS_CROSS:
                crosses = tl.load(ptrs + 2 * plane, mask=mask, other=0.0).to(tl.float64)
                cross = cross * shrink + tl.sum(crosses * shares, 0)
        else:
            total += tl.sum(tl.load(ptrs, mask=mask, other=0.0).to(tl.float64), 0)
    return largest, total, cross


@triton.jit
def _store_lse(lse_ptr, rest_ptr, lse, mask):
    """In float32, and what rounding took from it."""
    rounded = lse.to(tl.float32)
    rest = tl.where(tl.abs(rounded) < float("inf"), lse - rounded.to(tl.float64), 0.0)
    tl.store(lse_ptr, rounded, mask=mask)
    tl.store(rest_ptr, rest.to(tl.float32), mask=mask)


@triton.jit
def _store_expectation(lse_ptr, cross_ptr, largest, total, cross, mask):
    tl.store(lse_ptr, largest + tl.log(total).to(tl.float32), mask=mask)
    tl.store(cross_ptr, (cross / total).to(tl.float32), mask=mask)


@triton.jit
def _log_sum_exp(largest, total, by, per_log2, EXACT: tl.constexpr):
    if EXACT:
        return largest.to(tl.float64) + tl.log(total)
    else:
        return (tl.log2(total) + by) * per_log2


@triton.jit(do_not_specialize=["M", "N", "tiles_m", "tiles_n"], do_not_specialize_on_alignment=VECTORS)
def _contrastive_combine_kernel(
    row_ptr,
    col_ptr,
    product_ptr,  # [M], of the positives
    scale_ptr,
    state_ptr,
    center_ptr,
    positives_ptr,
    row_lse_ptr,
    col_lse_ptr,
    positive_ptr,
    row_cross_ptr,
    col_cross_ptr,
    row_rest_ptr,
    col_rest_ptr,
    teacher_row_lse_ptr,
    teacher_col_lse_ptr,
    positive_rest_ptr,
    loss_ptr,  # [M]
    M,
    N,
    tiles_m,
    tiles_n,
    EXACT: tl.constexpr,
    ALWAYS: tl.constexpr,
    PARTS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    DIAGONAL: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of as many rows and columns, from what the tiles left; where each row's positive is on the
    diagonal, the losses of the pairs too."""
    scale = tl.load(scale_ptr).to(tl.float32)
    shift, by, per_log2, moved, to_do = 0.0, 0.0, 1.0, 0.0, True
    factor = scale
    if not ALWAYS:
        scale, factor, shift, center, moved, serves = _shift(scale_ptr, state_ptr, center_ptr, PARTS, DIAGONAL)
        to_do = serves != EXACT
        if not EXACT:
            # exactly by the factor that the logits were multiplied with
            per_log2 = scale.to(tl.float64) / factor.to(tl.float64)
            by = _shift_in_all(factor, shift, center)
    if to_do:
        first = tl.program_id(0) * BLOCK
        offs = first + tl.arange(0, BLOCK)
        mask_m, mask_n = offs < M, offs < N
        row_stride, col_stride = tiles_m * BLOCK_M, tiles_n * BLOCK_N
        row_plane, col_plane = row_stride.to(tl.int64) * tiles_n, col_stride.to(tl.int64) * tiles_m
        parts = tl.where(first < M, tiles_n, 0)
        largest, total, _unused = _merged(row_ptr + first, row_plane, row_stride, parts, BLOCK, EXACT, False)
        row_lse = _log_sum_exp(largest, total, by, per_log2, EXACT)
        _store_lse(row_lse_ptr + offs, row_rest_ptr + offs, row_lse, mask_m)
        lowest = tl.min(tl.where(mask_m, row_lse, float("inf")), 0)
        if HAS_TEACHER:
            largest, total, cross = _merged(
                row_ptr + 2 * row_plane + first, row_plane, row_stride, parts, BLOCK, True, True
            )
            _store_expectation(teacher_row_lse_ptr + offs, row_cross_ptr + offs, largest, total, cross, mask_m)
        if SYMMETRIC:
            parts = tl.where(first < N, tiles_m, 0)
            largest, total, _unused = _merged(col_ptr + first, col_plane, col_stride, parts, BLOCK, EXACT, False)
            col_lse = _log_sum_exp(largest, total, by, per_log2, EXACT)
            _store_lse(col_lse_ptr + offs, col_rest_ptr + offs, col_lse, mask_n)
            lowest = tl.minimum(lowest, tl.min(tl.where(mask_n, col_lse, float("inf")), 0))
            if HAS_TEACHER:
                largest, total, cross = _merged(
                    col_ptr + 2 * col_plane + first, col_plane, col_stride, parts, BLOCK, True, True
                )
                _store_expectation(teacher_col_lse_ptr + offs, col_cross_ptr + offs, largest, total, cross, mask_n)
        if HAS_POSITIVES:
            products = tl.load(product_ptr + offs, mask=mask_m, other=0.0)
            if EXACT:
                positive = (products * scale).to(tl.float64)
            else:
                # of its exponential as it is in the sums: of that alone the loss is zero
                exponent = products * factor - shift
                exponential = tl.exp2(exponent).to(tl.float64)
                positive = tl.where(exponential > 1e-30, tl.log2(exponential), exponent.to(tl.float64))
                positive = (positive + by) * per_log2
            if not DIAGONAL:
                place = tl.load(positives_ptr + offs, mask=mask_m, other=-1)
                # not a number where it is out of range
                positive = tl.where((place >= 0) & (place < N), positive, tl.where(place == -1, 0.0, float("nan")))
            _store_lse(positive_ptr + offs, positive_rest_ptr + offs, positive, mask_m)
            if DIAGONAL:
                loss = row_lse - positive
                if SYMMETRIC:
                    loss = (loss + (col_lse - positive)) * 0.5
                tl.store(loss_ptr + offs, loss.to(tl.float32), mask=mask_m)
        if not EXACT:  # noqa: SIM102 (constexpr apart from what is known when it runs)
            if (moved > 0) & (lowest < moved + LOWEST):
                tl.store(state_ptr + LOST, 1.0)
