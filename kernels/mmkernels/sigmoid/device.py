"""The sigmoid loss's kernels: what runs on the GPU; kernel.py launches them."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from mmkernels._device import INTERPRETED
from mmkernels._tl import Constant, halves, product, store_tile, tile_place

LOG2_E = Constant(1.4426950408889634)
LN_2 = Constant(0.6931471805599453)
# an interpreter knows no machine instruction
IN_PYTHON = Constant(INTERPRETED)
# Logits whose exponentials are multiplied before one logarithm is taken, and, where some are so large that the product
# leaves float32's range, how many and up to which each: of a larger one, what it is more than that is its loss.
GROUP, SMALL_GROUP = Constant(16), Constant(4)
IN_RANGE = Constant(4.0e37)
LARGE_BITS, LARGE = Constant(30.0), Constant(2.0**30)


@triton.jit
def _reciprocal(x):
    """Within 1 ulp, by one instruction."""
    if IN_PYTHON:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _log2(x):
    """Of what is far enough from 1: within 2^-22 of it."""
    if IN_PYTHON:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _log1p(t):
    """log(1 + t) of t >= 0, within some ulp: below a half t times a minimax polynomial of log1p(t) / t, 3e-8."""
    p = t * 0.005364822689443827 - 0.030065786093473434
    p = p * t + 0.07920452207326889
    p = p * t - 0.13753801584243774
    p = p * t + 0.191536545753479
    p = p * t - 0.24857163429260254
    p = p * t + 0.3332132399082184
    p = p * t - 0.49999648332595825
    return tl.where(t < 0.5, (p * t + 1.0) * t, _log2(1.0 + t) * LN_2)


@triton.jit
def _either(s, t):
    """(1 + s)(1 + t) - 1: of small ones nothing is lost."""
    return s * t + s + t


@triton.jit
def _products(exponentials, SIZE: tl.constexpr):
    """Of groups of a row's logits, the product of 1 + exp(x), less 1."""
    ROWS: tl.constexpr = exponentials.shape[0]
    COLS: tl.constexpr = exponentials.shape[1]
    return tl.reduce(tl.reshape(exponentials, [ROWS, SIZE, COLS // SIZE]), 1, _either)


@triton.jit
def _binary_logits(acc, factor, shift, EXACT: tl.constexpr):
    """In base 2; with EXACT rounded as logits first, as the field does."""
    logits = acc * factor + shift
    return logits * LOG2_E if EXACT else logits


@triton.jit
def _part_of_tile(
    acc,
    factor,
    shift,
    row_label_ptr,
    col_label_ptr,
    coef,
    grad,
    in_chunk,
    first_m,
    first_n,
    M,
    N,
    stride_gm,
    HAS_LABELS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Stores dL/dx of a part of a tile; its rows' sums of the losses, of dL/dx, and of that times the products."""
    offs_m, offs_n = first_m + tl.arange(0, ROWS), first_n + tl.arange(0, COLS)
    logits = _binary_logits(acc, factor, shift, EXACT)
    if HAS_LABELS:
        row_label = tl.load(row_label_ptr + offs_m, mask=offs_m < M, other=-1)
        col_label = tl.load(col_label_ptr + offs_n, mask=offs_n < N, other=-2)
        is_positive = row_label[:, None] == col_label[None, :]
        logits = tl.where(is_positive, -logits, logits)
    exponentials = tl.exp2(logits)
    grouped = _products(exponentials, GROUP)
    # also where infinity met zero
    if tl.min((grouped <= IN_RANGE).to(tl.int32)) == 0:
        exponentials = tl.minimum(exponentials, LARGE, propagate_nan=tl.PropagateNan.ALL)
        if HAS_LABELS:
            beyond = _binary_logits(acc, factor, shift, EXACT)
            beyond = tl.where(is_positive, -beyond, beyond) - LARGE_BITS
        else:
            beyond = _binary_logits(acc, factor, shift - (LARGE_BITS / LOG2_E if EXACT else LARGE_BITS), EXACT)
        losses = tl.sum(tl.maximum(beyond, 0.0), 1) * LN_2
        losses += tl.sum(_log1p(_products(exponentials, SMALL_GROUP)), 1)
    else:
        losses = tl.sum(_log1p(grouped), 1)
    of_grad = tl.zeros([ROWS], dtype=tl.float32)
    of_products = of_grad
    if HAS_GRAD or HAS_SUMS:
        values = exponentials * _reciprocal(1.0 + exponentials)
        if HAS_LABELS:
            values = tl.where(is_positive, -values, values)
        if HAS_SUMS:
            of_grad, of_products = tl.sum(values, 1), tl.sum(values * acc, 1)
        if HAS_GRAD:
            if HAS_COEF:
                values *= coef[:, None]
            elif UNIT != 1:
                values *= UNIT
            store_tile(grad, values, in_chunk, first_n, M - (first_m - in_chunk), stride_gm, DESCRIBED)
    return losses, of_grad, of_products


@triton.jit(do_not_specialize=["M", "N", "first_row"])
def _sigmoid_fwd_kernel(
    scale_ptr,
    a,  # pointers, or descriptors of tiles
    b,
    grad,  # [chunk, N]
    bias_ptr,
    row_label_ptr,  # int32 [M]
    col_label_ptr,  # int32 [N]
    coef_ptr,  # [M], of what is stored
    sums_ptr,  # [3, column tiles, row tiles * BLOCK_M]: of the losses, of dL/dx, of dL/dx times the product
    stride_am,
    stride_bn,
    stride_gm,
    M,
    N,
    D,
    first_row,
    HAS_LABELS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    IN_HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Rows `first_row` to M."""
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
    factor, shift = (scale, bias) if EXACT else (scale * LOG2_E, bias * LOG2_E)
    # whose logit has neither loss nor gradient, times whatever factor
    factor = tl.where(tl.abs(factor) < 1e-30, 1e-30, factor)
    nowhere = tl.where(factor > 0, -3.0e38, 3.0e38)
    tiles_m, tiles_n = tl.cdiv(M - first_row, BLOCK_M), tl.cdiv(N, BLOCK_N)
    plane = (tiles_m * tiles_n).to(tl.int64) * BLOCK_M
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_place(tile, tiles_m, tiles_n)
        in_chunk = pid_m * BLOCK_M
        first_m, first_n = first_row + in_chunk, pid_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc = product(
            a, b, acc, stride_am, stride_bn, first_m, first_n, M, N, D,
            DESCRIBED, BLOCK_M, BLOCK_N, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
        is_near = first_n + BLOCK_N > N
        if not HAS_LABELS:
            is_near = is_near | ((first_m < first_n + BLOCK_N) & (first_n < first_m + BLOCK_M))
        if is_near:
            offs_n = first_n + tl.arange(0, BLOCK_N)
            inside = (offs_n < N)[None, :]
            if not HAS_LABELS:
                # positives: added in float32 with a row's sums
                inside = inside & (first_m + tl.arange(0, BLOCK_M)[:, None] != offs_n[None, :])
            acc = tl.where(inside, acc, nowhere)
        coef = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_COEF:
            offs_m = first_m + tl.arange(0, BLOCK_M)
            coef = tl.load(coef_ptr + offs_m, mask=offs_m < M, other=0.0)
        if IN_HALVES:
            left, right = halves(acc)
            losses, of_grad, of_products = _part_of_tile(
                left, factor, shift, row_label_ptr, col_label_ptr, coef, grad, in_chunk, first_m, first_n,
                M, N, stride_gm,
                HAS_LABELS, HAS_COEF, HAS_GRAD, HAS_SUMS, UNIT, EXACT, DESCRIBED, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            more, more_grad, more_products = _part_of_tile(
                right, factor, shift, row_label_ptr, col_label_ptr, coef, grad, in_chunk, first_m,
                first_n + BLOCK_N // 2, M, N, stride_gm,
                HAS_LABELS, HAS_COEF, HAS_GRAD, HAS_SUMS, UNIT, EXACT, DESCRIBED, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            losses, of_grad, of_products = losses + more, of_grad + more_grad, of_products + more_products
        else:
            losses, of_grad, of_products = _part_of_tile(
                acc, factor, shift, row_label_ptr, col_label_ptr, coef, grad, in_chunk, first_m, first_n,
                M, N, stride_gm,
                HAS_LABELS, HAS_COEF, HAS_GRAD, HAS_SUMS, UNIT, EXACT, DESCRIBED, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        ptrs = sums_ptr + (pid_n.to(tl.int64) * tiles_m + pid_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(ptrs, losses)
        if HAS_SUMS:
            tl.store(ptrs + plane, of_grad)
            tl.store(ptrs + 2 * plane, of_products)


@triton.jit
def _summed(ptr, stride, parts, BLOCK_R: tl.constexpr):
    """Over the tiles' sums of some rows, in float64."""
    PARTS_AT_ONCE: tl.constexpr = 16
    total = tl.zeros([BLOCK_R], dtype=tl.float64)
    for first in range(0, parts, PARTS_AT_ONCE):
        part = first + tl.arange(0, PARTS_AT_ONCE)
        ptrs = ptr + part.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_R)[None, :]
        total += tl.sum(tl.load(ptrs, mask=(part < parts)[:, None], other=0.0).to(tl.float64), 0)
    return total


@triton.jit(do_not_specialize=["M", "first_row", "total_rows", "tiles_m", "tiles_n"])
def _sigmoid_rows_kernel(
    a_ptr,
    b_ptr,
    da_ptr,  # [rows, D] float32, of the products
    db_ptr,
    scale_ptr,
    bias_ptr,
    coef_ptr,
    sums_ptr,
    out_ptr,  # [3, rows] float64
    stride_am,
    stride_bn,
    M,
    D,
    first_row,
    total_rows,
    tiles_m,
    tiles_n,
    HAS_LABELS: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of rows `first_row` to M, the sums over all tiles and, where the positives are on the diagonal, theirs; adds
    their gradients, in units, to the products'."""
    first = tl.program_id(0) * BLOCK_R
    offs_m = first_row + first + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    stride = tiles_m * BLOCK_M
    plane = stride.to(tl.int64) * tiles_n
    loss = _summed(sums_ptr + first, stride, tiles_n, BLOCK_R)
    of_grad = tl.zeros([BLOCK_R], dtype=tl.float64)
    of_products = of_grad
    if HAS_SUMS:
        of_grad = _summed(sums_ptr + plane + first, stride, tiles_n, BLOCK_R)
        of_products = _summed(sums_ptr + 2 * plane + first, stride, tiles_n, BLOCK_R)
    if not HAS_LABELS:
        scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
        rows = offs_m.to(tl.int64)[:, None]
        cosine = tl.zeros([BLOCK_R], dtype=tl.float32)
        for first_d in range(0, D, BLOCK_D):
            offs_d = first_d + tl.arange(0, BLOCK_D)[None, :]
            inside = mask_m[:, None] & (offs_d < D)
            a = tl.load(a_ptr + rows * stride_am + offs_d, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + rows * stride_bn + offs_d, mask=inside, other=0.0).to(tl.float32)
            cosine += tl.sum(a * b, 1)
        logit = (cosine * scale + bias).to(tl.float64)
        tail = tl.exp(-tl.abs(logit))
        loss += tl.where(logit > 0, 0.0, -logit) + tl.log(1.0 + tail)
        grad = -tl.where(logit > 0, tail, 1.0) / (1.0 + tail)
        of_grad += grad
        of_products += grad * cosine
        weight = grad.to(tl.float32)
        if HAS_COEF:
            weight *= tl.load(coef_ptr + offs_m, mask=mask_m, other=0.0)
        else:
            weight *= UNIT
        if NEEDS_A or NEEDS_B:
            for first_d in range(0, D, BLOCK_D):
                offs_d = first_d + tl.arange(0, BLOCK_D)[None, :]
                inside = mask_m[:, None] & (offs_d < D)
                places = rows * D + offs_d
                if NEEDS_A:
                    b = tl.load(b_ptr + rows * stride_bn + offs_d, mask=inside, other=0.0).to(tl.float32)
                    da = tl.load(da_ptr + places, mask=inside, other=0.0)
                    tl.store(da_ptr + places, da + weight[:, None] * b, mask=inside)
                if NEEDS_B:
                    a = tl.load(a_ptr + rows * stride_am + offs_d, mask=inside, other=0.0).to(tl.float32)
                    db = tl.load(db_ptr + places, mask=inside, other=0.0)
                    tl.store(db_ptr + places, db + weight[:, None] * a, mask=inside)
    tl.store(out_ptr + offs_m, loss, mask=mask_m)
    if HAS_SUMS:
        tl.store(out_ptr + total_rows + offs_m, of_products, mask=mask_m)
        tl.store(out_ptr + 2 * total_rows.to(tl.int64) + offs_m, of_grad, mask=mask_m)


@triton.jit(do_not_specialize=["rows_a", "rows_b"])
def _sigmoid_bwd_kernel(
    d_loss_ptr,
    da_ptr,
    db_ptr,
    totals_ptr,  # float64 [3]: the gradients of the scale and of the bias behind the loss
    scale_ptr,
    out_a_ptr,
    out_b_ptr,
    out_scale_ptr,
    out_bias_ptr,
    share,
    rows_a,
    rows_b,
    D,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What forward made times the upstream gradient, rounded once: float16's loss scale is in it."""
    pid, d_loss = tl.program_id(0), tl.load(d_loss_ptr).to(tl.float32) * share
    factor = d_loss * tl.load(scale_ptr).to(tl.float32) / UNIT
    offs_m = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = offs_m.to(tl.int64)[:, None]
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)[None, :]
        places = rows * D + offs_d
        if NEEDS_A:
            inside = (offs_m < rows_a)[:, None] & (offs_d < D)
            dx = tl.load(da_ptr + places, mask=inside, other=0.0) * factor
            tl.store(out_a_ptr + places, dx.to(out_a_ptr.dtype.element_ty), mask=inside)
        if NEEDS_B:
            inside = (offs_m < rows_b)[:, None] & (offs_d < D)
            dx = tl.load(db_ptr + places, mask=inside, other=0.0) * factor
            tl.store(out_b_ptr + places, dx.to(out_b_ptr.dtype.element_ty), mask=inside)
    if pid == 0:
        if NEEDS_SCALE:
            d_scale = (tl.load(totals_ptr + 1) * d_loss).to(tl.float32)
            tl.store(out_scale_ptr, d_scale.to(out_scale_ptr.dtype.element_ty))
        if NEEDS_BIAS:
            d_bias = (tl.load(totals_ptr + 2) * d_loss).to(tl.float32)
            tl.store(out_bias_ptr, d_bias.to(out_bias_ptr.dtype.element_ty))
