"""The sigmoid loss in Triton: each tile of logits is computed once and never stored.

The kernel leaves dL/dx of a chunk of rows, in the operands' dtype, for the GEMM library to make both features'
gradients of, and float32 sums of each row of each tile. The diagonal's positives are added in float32, with a row's
sums.
"""

# triton types neither a launch nor cdiv
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels._launch import Launch, Table, chunk_rows, launch, launch_config, processors, tile_flags
from mmkernels._tl import addmm_fp32_, is_described, pitched, readable, tile_operand
from mmkernels.sigmoid.blockwise import Made
from mmkernels.sigmoid.device import _sigmoid_bwd_kernel, _sigmoid_fwd_kernel, _sigmoid_rows_kernel

# dL/dx is stored in the operands' dtype, in float16 entries of 1 moved here: it then keeps 28 binades below.
GRAD_CEILING = 2.0**14
# Rows, and elements of features, at a time.
BLOCK_R, BLOCK_D = 16, 128

TABLE: Table = {
    ("fwd", 2, 80): Launch(128, 128, 32, 8, 4),
    ("fwd", 2, 90): Launch(128, 256, 64, 8, 3),
    ("fwd", 2, 100): Launch(128, 128, 64, 8, 3),
    ("fwd", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd", 4, 100): Launch(128, 64, 16, 8, 3),
    # labels to compare, and coefficients of rows, take registers
    ("fwd_rich", 2, 80): Launch(128, 64, 32, 8, 4),
    ("fwd_rich", 2, 90): Launch(128, 128, 64, 8, 3),
    ("fwd_rich", 2, 100): Launch(64, 64, 64, 4, 3),
    ("fwd_rich", 4, 80): Launch(128, 64, 16, 8, 3),
    ("fwd_rich", 4, 90): Launch(128, 64, 16, 8, 3),
    ("fwd_rich", 4, 100): Launch(128, 64, 16, 8, 3),
}


def unit_of(x: Tensor) -> float:
    """What entries of dL/dx are stored times."""
    return GRAD_CEILING if x.dtype == torch.float16 else 1.0


def sigmoid_fwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    coef: Tensor | None,
    needs: Sequence[bool],
) -> Made:
    """`coef` is `[M]`, at most 1, None for ones. The gradients of a and b are left in float32, in units and not yet
    times the scale."""
    num_rows, num_cols, unit = len(a), len(b), unit_of(a)
    has_sums, has_grad = any(needs[2:]), needs[0] or needs[1]
    ids = (None, None) if labels is None else _label_ids(labels)
    stored_coef = None if coef is None else coef * unit
    config = launch_config(TABLE, "fwd" if labels is None and coef is None else "fwd_rich", a)
    sums = a.new_empty(3 if has_sums else 1, num_rows, dtype=torch.float64)
    da = a.new_empty(a.shape, dtype=torch.float32) if needs[0] else None
    db = b.new_empty(b.shape, dtype=torch.float32) if needs[1] else None
    if not (num_rows and num_cols):
        for x in (sums, da, db):
            if x is not None:
                x.zero_()
        return sums, da, db, sums.sum(1)
    chunk = min(chunk_rows(num_cols, a.element_size()), num_rows)
    buffer = pitched(a, chunk if has_grad else 0, num_cols)
    tiles_n = triton.cdiv(num_cols, config.block_n)
    of_tiles = a.new_empty(
        len(sums) * tiles_n * triton.cdiv(chunk, config.block_m) * config.block_m, dtype=torch.float32
    )
    flags = {"HAS_LABELS": labels is not None, "HAS_COEF": coef is not None, "HAS_SUMS": has_sums, "UNIT": unit}
    operands = tile_operand(a, config.block_m, config), tile_operand(b, config.block_n, config)
    a_rows, b_rows = readable(a), readable(b)
    for first in range(0, num_rows, chunk):
        rows = slice(first, min(first + chunk, num_rows))
        is_whole = chunk == num_rows
        grad, a_part = (buffer, a) if is_whole else (buffer[: rows.stop - first], a[rows])
        tiles_m = triton.cdiv(rows.stop - first, config.block_m)
        _launch_tiles(operands, grad, (scale, bias, *ids, stored_coef, of_tiles), rows, config, flags)
        if da is not None:
            addmm_fp32_(da if is_whole else da[rows], grad, b, beta=0.0)
        if db is not None:
            addmm_fp32_(db, grad.T, a_part, beta=float(first > 0))
        launch(
            _sigmoid_rows_kernel,
            (triton.cdiv(rows.stop - first, BLOCK_R),),
            a_rows,
            b_rows,
            da,
            db,
            scale,
            bias,
            stored_coef,
            of_tiles,
            sums,
            a_rows.stride(0),
            b_rows.stride(0),
            rows.stop,
            a.shape[1],
            first,
            num_rows,
            tiles_m,
            tiles_n,
            NEEDS_A=needs[0],
            NEEDS_B=needs[1],
            **flags,
            BLOCK_M=config.block_m,
            BLOCK_R=BLOCK_R,
            BLOCK_D=BLOCK_D,
        )
    if coef is not None:
        sums[1:] *= coef
    return sums, da, db, sums.sum(1)


def _launch_tiles(
    operands: tuple[Any, Any],
    grad: Tensor,
    vectors: tuple[Tensor | None, ...],
    rows: slice,
    config: Launch,
    flags: dict[str, Any],
) -> None:
    """Writes dL/dx of some rows into `grad`, and each tile's sums into the last of the vectors."""
    scale, *others = vectors
    width, num_cols = operands[0].shape[1], operands[1].shape[0]
    described = is_described(grad)
    in_halves = described and (config.block_n == 256 or not grad.is_cuda)
    stored: Any = grad if grad.numel() else None
    if stored is not None and described:
        block = [config.block_m, config.block_n // 2 if in_halves else config.block_n]
        stored = TensorDescriptor(grad, list(grad.shape), list(grad.stride()), block)
    strides = [x.strides[0] if isinstance(x, TensorDescriptor) else x.stride(0) for x in operands]
    tiles = triton.cdiv(rows.stop - rows.start, config.block_m) * triton.cdiv(num_cols, config.block_n)
    launch(
        _sigmoid_fwd_kernel,
        (min(tiles, processors(grad)),),
        scale,
        *operands,
        stored,
        *others,
        *strides,
        grad.stride(0),
        rows.stop,
        num_cols,
        width,
        rows.start,
        HAS_GRAD=stored is not None,
        # float32's products take longer than any exponential
        EXACT=grad.element_size() == 4,
        **flags,
        DESCRIBED=described,
        IN_HALVES=in_halves,
        **tile_flags(config),
    )


def sigmoid_bwd(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    made: tuple[Tensor, Tensor, Tensor],
    d_loss: Tensor,
    share: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of a, b, scale and bias by a share of the loss's, from what forward made: da and db in units, and
    sums over the rows."""
    a, b, scale, _ = inputs
    contiguous = torch.contiguous_format
    outs = [torch.empty_like(x, memory_format=contiguous) if needed else None for x, needed in zip(inputs, needs)]
    launch(
        _sigmoid_bwd_kernel,
        (max(triton.cdiv(max(len(a), len(b)), BLOCK_R), 1),),
        d_loss,
        *made,
        scale,
        *outs,
        share,
        len(a),
        len(b),
        a.shape[1],
        **dict(zip(("NEEDS_A", "NEEDS_B", "NEEDS_SCALE", "NEEDS_BIAS"), needs)),
        UNIT=unit_of(a),
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_D,
    )
    return outs


def _label_ids(labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The labels as int32, equal where they were equal: half of the registers."""
    ordered = torch.cat(labels).sort().values
    rows, cols = (torch.searchsorted(ordered, x.contiguous(), out_int32=True) for x in labels)
    return rows, cols
