"""The sigmoid loss in Triton: each tile of logits is computed once and never stored.

The kernel leaves dL/dx of a chunk of rows, in the operands' dtype, for the GEMM library to make both features'
gradients of, and float32 sums of each row of each tile. The diagonal's positives are left to plain calls, in float32.
"""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._launch import chunk_rows, input_precision, launch_config
from mmkernels._tl import dot_tile, matmul_fp32, operand, pitched
from mmkernels.sigmoid.blockwise import Grads
from mmkernels.sigmoid.launch import TABLE

# dL/dx is stored in the operands' dtype, entries of 1 moved here: float16 then keeps 28 binades below.
GRAD_CEILING = 2.0**14


@triton.jit
def _log1p(t):
    """log(1 + t) of 0 <= t <= 1, within 1.5 ulp: t times a minimax polynomial of log1p(t) / t, 3e-8."""
    p = t * 0.005364822689443827 - 0.030065786093473434
    p = p * t + 0.07920452207326889
    p = p * t - 0.13753801584243774
    p = p * t + 0.191536545753479
    p = p * t - 0.24857163429260254
    p = p * t + 0.3332132399082184
    p = p * t - 0.49999648332595825
    return (p * t + 1.0) * t


@triton.jit
def _sigmoid_fwd_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    row_label_ptr,  # int32 [M]
    col_label_ptr,  # int32 [N]
    coef_ptr,  # [M]
    sums_ptr,  # [3, column tiles, M]: of the losses, of dL/dx, of dL/dx times the cosine
    grad_ptr,  # [M, N]
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_gm,
    M,
    N,
    D,
    offset,
    HAS_LABELS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = dot_tile(
        a_ptr, b_ptr, stride_am, stride_ad, stride_bn, stride_bd, offs_m, offs_n, M, N, D, BLOCK_D, INPUT_PRECISION
    )
    logits = acc * scale + bias
    # minus infinity has neither loss nor gradient
    if HAS_LABELS:
        row_label = tl.load(row_label_ptr + offs_m, mask=mask_m, other=0)
        col_label = tl.load(col_label_ptr + offs_n, mask=mask_n, other=0)
        is_positive = row_label[:, None] == col_label[None, :]
        against = tl.where(mask_n[None, :], tl.where(is_positive, -logits, logits), float("-inf"))
    else:
        is_positive = offs_m[:, None] + offset == offs_n[None, :]  # the caller adds these, in float32
        against = tl.where(is_positive | (offs_n >= N)[None, :], float("-inf"), logits)
    tail = tl.exp(-tl.abs(against))  # at most 1: nothing overflows
    # not tl.maximum, which would lose a NaN
    losses = tl.where(against < 0, 0.0, against) + _log1p(tail)
    sums_ptrs = sums_ptr + pid_n.to(tl.int64) * M + offs_m
    plane = tl.num_programs(1).to(tl.int64) * M
    tl.store(sums_ptrs, tl.sum(losses, 1), mask=mask_m)
    if HAS_GRAD or HAS_SUMS:
        grad = tl.where(against < 0, tail, 1.0) / (1.0 + tail)
        if HAS_LABELS:
            grad = tl.where(is_positive, -grad, grad)
        if HAS_SUMS:
            tl.store(sums_ptrs + plane, tl.sum(grad, 1), mask=mask_m)
            tl.store(sums_ptrs + 2 * plane, tl.sum(grad * acc, 1), mask=mask_m)
        if HAS_GRAD:
            coef = tl.load(coef_ptr + offs_m, mask=mask_m, other=0.0)
            stored = (grad * coef[:, None]).to(grad_ptr.dtype.element_ty)
            grad_ptrs = grad_ptr + offs_m.to(tl.int64)[:, None] * stride_gm + offs_n[None, :]
            # up to the pitch, not N: whole vectors; what lies between is never read
            tl.store(grad_ptrs, stored, mask=mask_m[:, None] & (offs_n < stride_gm)[None, :])


def sigmoid_fwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    coef: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Grads]:
    """Each row's loss `[M]` in float64, and the gradients of `sum coef * loss` that `needs` asks for.

    `coef` is `[M]`, at most 1, None for ones. Gradients of features are accumulated in float32, those of the
    scale and the bias in float64.
    """
    num_rows, num_cols = a.shape[0], b.shape[0]
    if coef is None:
        coef = a.new_ones(num_rows, dtype=torch.float32)
    ids = None if labels is None else _label_ids(labels)
    da = a.new_empty(a.shape, dtype=torch.float32) if needs[0] else None
    db = b.new_zeros(b.shape, dtype=torch.float32) if needs[1] else None
    sums = a.new_empty(3, num_rows, dtype=torch.float64)
    chunk = max(min(chunk_rows(num_cols, a.element_size()), num_rows), 1)
    buffer = pitched(a, chunk if needs[0] or needs[1] else 0, num_cols)
    for first in range(0, num_rows, chunk):
        rows = slice(first, first + chunk)
        a_rows, of_rows = a[rows], coef[rows] * GRAD_CEILING
        grad = buffer[: len(a_rows)]
        of_labels = None if ids is None else (ids[0][rows], ids[1])
        sums[:, rows] = _run_chunk(a_rows, b, (scale, bias), of_labels, of_rows, grad, first, any(needs[2:]))
        if da is not None:
            da[rows] = matmul_fp32(grad, b)
        if db is not None:
            db.add_(matmul_fp32(grad.T, a_rows))
        if labels is None:
            parts = (None if dx is None else dx[rows] for dx in (da, db))
            sums[:, rows] += _add_positives(a_rows, b[rows], scale, bias, of_rows, *parts)
    for dx in (da, db):
        if dx is not None:
            dx.mul_(scale / GRAD_CEILING)
    dbias, dscale = ((x * coef).sum() for x in sums[1:])
    return sums[0], (da, db, dscale if needs[2] else None, dbias if needs[3] else None)


def _run_chunk(
    a: Tensor,
    b: Tensor,
    scale_bias: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor] | None,
    coef: Tensor,
    out: Tensor,
    offset: int,
    has_sums: bool,
) -> Tensor:
    """Write `coef * dL/dx` of the rows `a` into `out`; returns their sums, `[3, rows]`, as the kernel has them."""
    config = launch_config(TABLE, "fwd" if labels is None else "fwd_labels", a)
    num_rows, num_cols = a.shape[0], b.shape[0]
    grid = (triton.cdiv(num_rows, config.block_m), triton.cdiv(num_cols, config.block_n))
    sums = coef.new_empty(3, grid[1], num_rows)
    if not num_cols:
        return sums.sum(1)
    a, b = operand(a, config.block_d), operand(b, config.block_d)
    _sigmoid_fwd_kernel[grid](
        a,
        b,
        *scale_bias,
        *(labels or (coef, coef)),
        coef,
        sums,
        out,
        *a.stride(),
        *b.stride(),
        out.stride(0),
        num_rows,
        num_cols,
        a.shape[1],
        offset,
        HAS_LABELS=labels is not None,
        HAS_GRAD=out.numel() > 0,
        HAS_SUMS=has_sums,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        INPUT_PRECISION=input_precision(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return sums.sum(1, dtype=torch.float64)


def _add_positives(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, coef: Tensor, da: Tensor | None, db: Tensor | None
) -> Tensor:
    """Add the positives' gradients, row i of `b` being that of row i of `a`, in float32; returns their share of
    the sums, `[3, rows]`."""
    a, b = a.float(), b.float()
    cosines = (a * b).sum(1)
    logits = cosines * scale + bias
    grad = torch.sigmoid(-logits).neg_()
    weighted = (grad * coef).float()[:, None]
    if da is not None:
        da.addcmul_(b, weighted)
    if db is not None:
        db.addcmul_(a, weighted)
    return torch.stack([-F.logsigmoid(logits), grad, grad * cosines])


def _label_ids(labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The labels as int32, equal where they were equal: half of the registers."""
    ordered = torch.cat(labels).sort().values
    rows, cols = (torch.searchsorted(ordered, x.contiguous(), out_int32=True) for x in labels)
    return rows, cols
