"""What the contrastive kernels of a call tell each other: the bounds that decide how logits are shifted."""

# triton types a jitted function as one that does not return
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mmkernels._tl import Constant

# What the kernels of a call tell each other, float32: whether a shift lost a sum, the unit of dL/dS, that of the rows'
# and columns' share, and of pairs the center of the products; then maxima of parts, MAXIMA times as many as PARTS: of
# the norms of a and of b and of the gradients of the rows' and columns' statistics and of the teacher's.
LOST, UNIT, SHARE_UNIT, CENTER, FIRST = (Constant(i) for i in range(5))
MAXIMA = 6
LOG2_E = Constant(1.4426950408889634)
# Up to this bound on the logits a shift serves: it leaves them this far above zero, where a sum is far from overflow.
# Where there is one, a log-sum-exp that far below it may have lost terms: of 65,536 terms, more than 1e-7 of the sum.
MOST = Constant(128.0)
HEADROOM = Constant(64.0)
LOWEST = Constant(-60.0)
# dL/dS is stored in the operands' dtype, its largest possible entry moved here: float16 then keeps 28 binades below it.
GRAD_CEILING = Constant(2.0**14)
# What begins anywhere in an allocation: an aligned vector is to be no kernel of its own.
VECTORS = [
    "row_lse_ptr",
    "col_lse_ptr",
    "row_rest_ptr",
    "col_rest_ptr",
    "positive_ptr",
    "positive_rest_ptr",
    "loss_ptr",
]
# not -inf, which times a gradient of zero is not a number
NOWHERE = Constant(-3.0e38)


@triton.jit
def _largest(state_ptr, which: tl.constexpr, PARTS: tl.constexpr):
    return tl.max(tl.load(state_ptr + FIRST + which * PARTS + tl.arange(0, PARTS)), 0)


@triton.jit
def _center(state_ptr, center_ptr, PAIRS: tl.constexpr):
    return tl.load(state_ptr + CENTER if PAIRS else center_ptr).to(tl.float32)


@triton.jit
def _shift(scale_ptr, state_ptr, center_ptr, PARTS: tl.constexpr, PAIRS: tl.constexpr):
    """How `exp2(products * factor - shift)` is the exponential of a logit, of products less their center, and whether
    that serves: the scale, the factor, the shift, the center, and by how much the shift moved the logits down."""
    scale = tl.load(scale_ptr).to(tl.float32)
    bound = tl.abs(scale) * _largest(state_ptr, 0, PARTS) * _largest(state_ptr, 1, PARTS)
    # also not of what is not a number
    serves = (scale > 0) & (bound <= MOST) & (tl.load(state_ptr + LOST) == 0)
    factor = scale * LOG2_E
    center = _center(state_ptr, center_ptr, PAIRS)
    center = tl.where(tl.abs(center) < float("inf"), center, 0.0)
    moved = tl.maximum(bound - HEADROOM, 0.0)
    return scale, factor, moved * LOG2_E - factor * center, center, moved, serves


@triton.jit
def _shift_in_all(factor, shift, center):
    """What the exponentials are less than the logits' by, in base 2 and float64."""
    return shift.to(tl.float64) + factor.to(tl.float64) * center.to(tl.float64)


@triton.jit
def _largest_norm(x_ptr, stride, rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of this program's rows."""
    largest = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        squares = tl.zeros([BLOCK_R], dtype=tl.float32)
        for first in range(0, D, BLOCK_D):
            offs_d = first + tl.arange(0, BLOCK_D)
            inside = (offs_r < rows)[:, None] & (offs_d < D)[None, :]
            x = tl.load(x_ptr + offs_r.to(tl.int64)[:, None] * stride + offs_d[None, :], mask=inside, other=0.0)
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        largest = tl.maximum(largest, squares)
    return tl.sqrt(tl.max(largest, 0))


@triton.jit
def _sampled_center(a_ptr, b_ptr, stride_am, stride_bn, M, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mean product of some rows of a with some rows of b: near that of all."""
    offs_r = tl.arange(0, BLOCK_R)
    rows_a = (offs_r * (M // BLOCK_R + 1) % M).to(tl.int64)[:, None]
    rows_b = ((offs_r * (M // BLOCK_R + 1) + M // 2) % M).to(tl.int64)[:, None]
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)[None, :]
        a = tl.load(a_ptr + rows_a * stride_am + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + rows_b * stride_bn + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        total += tl.sum(a, 0) * tl.sum(b, 0)
    return tl.sum(total, 0) / (BLOCK_R * BLOCK_R)


@triton.jit
def _largest_value(x_ptr, size, BLOCK: tl.constexpr):
    """The magnitude of this program's largest."""
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x_ptr + offs, mask=offs < size, other=0.0)))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["M", "N"])
def _contrastive_bounds_kernel(
    a_ptr,
    b_ptr,
    d_row_ptr,
    d_col_ptr,
    teacher_d_row_ptr,
    teacher_d_col_ptr,
    state_ptr,
    stride_am,
    stride_bn,
    M,
    N,
    D,
    HAS_GRAD: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fills the state, each of its PARTS programs one place of every maximum."""
    pid, PARTS = tl.program_id(0), tl.num_programs(0)
    state_ptr += FIRST
    tl.store(state_ptr + pid, _largest_norm(a_ptr, stride_am, M, D, BLOCK_R, BLOCK_D))
    tl.store(state_ptr + PARTS + pid, _largest_norm(b_ptr, stride_bn, N, D, BLOCK_R, BLOCK_D))
    if HAS_GRAD:
        num_cols = tl.where(SYMMETRIC, N, 0)
        tl.store(state_ptr + 2 * PARTS + pid, _largest_value(d_row_ptr, M, BLOCK_D))
        tl.store(state_ptr + 3 * PARTS + pid, _largest_value(d_col_ptr, num_cols, BLOCK_D))
        if HAS_TEACHER:
            tl.store(state_ptr + 4 * PARTS + pid, _largest_value(teacher_d_row_ptr, M, BLOCK_D))
            tl.store(state_ptr + 5 * PARTS + pid, _largest_value(teacher_d_col_ptr, num_cols, BLOCK_D))
    if pid == 0:
        tl.store(state_ptr - FIRST + LOST, 0.0)
        if PAIRS:
            center = _sampled_center(a_ptr, b_ptr, stride_am, stride_bn, M, D, BLOCK_R, BLOCK_D)
            tl.store(state_ptr - FIRST + CENTER, tl.where(tl.abs(center) < float("inf"), center, 0.0))
