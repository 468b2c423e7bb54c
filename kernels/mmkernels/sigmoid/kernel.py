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
from torch import Tensor

from mmkernels._launch import Launch, Table, chunk_rows, input_precision, launch, launch_config
from mmkernels._tl import addmm_fp32_, operand, pitched
from mmkernels.sigmoid.blockwise import Grads
from mmkernels.sigmoid.device import _sigmoid_fwd_kernel

# dL/dx is stored in the operands' dtype, entries of 1 moved here: float16 then keeps 28 binades below.
GRAD_CEILING = 2.0**14

TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 128, 32, 16, 4),
    ("fwd", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd", 2, 100): Launch(128, 128, 64, 8, 3),
    ("fwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 90): Launch(64, 128, 32, 8, 2),
    ("fwd", 4, 100): Launch(128, 64, 32, 8, 3),
    # the comparison of labels takes registers
    ("fwd_labels", 2, 80): Launch(128, 128, 32, 16, 4),
    ("fwd_labels", 2, 90): Launch(128, 128, 64, 16, 3),
    ("fwd_labels", 2, 100): Launch(128, 64, 64, 8, 3),
    ("fwd_labels", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd_labels", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd_labels", 4, 100): Launch(128, 64, 32, 8, 3),
}


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
            addmm_fp32_(da[rows], grad, b, beta=0.0)
        if db is not None:
            addmm_fp32_(db, grad.T, a_rows)
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
    launch(
        _sigmoid_fwd_kernel,
        grid,
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
