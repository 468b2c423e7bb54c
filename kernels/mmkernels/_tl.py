"""What the Triton kernels of several ops share: a tile's product, and the operands as kernels read them."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# elements between rows are a multiple of this, so that loads and stores come in whole vectors
PITCH = 16


@triton.jit
def dot_tile(
    a_ptr,
    b_ptr,
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    offs_m,
    offs_n,
    M,
    N,
    D,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Rows `offs_m` of a times rows `offs_n` of b, in float32; beyond the last row, that row again.

    D is a multiple of BLOCK_D.
    """
    offs_d = tl.arange(0, BLOCK_D)
    # clamped, not masked: masks of whole tiles cost registers, and the callers mask the logits anyway
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    a_ptrs = a_ptr + rows_m[:, None] * stride_am + offs_d.to(tl.int64)[None, :] * stride_ad
    b_ptrs = b_ptr + rows_n[None, :] * stride_bn + offs_d.to(tl.int64)[:, None] * stride_bd
    acc = tl.zeros([offs_m.shape[0], offs_n.shape[0]], dtype=tl.float32)
    for _ in range(0, D, BLOCK_D):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc, input_precision=INPUT_PRECISION)
        a_ptrs += BLOCK_D * stride_ad
        b_ptrs += BLOCK_D * stride_bd
    return acc


def operand(x: Tensor, block_d: int) -> Tensor:
    """`x` `[rows, D]` as a kernel reads it: rows of whole blocks, in whole vectors; if need be a padded copy.

    The interpreter would multiply bfloat16 as raw bits: there it is widened, which changes no value.
    """
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        x = x.float()
    missing = -x.shape[1] % block_d
    if missing or x.stride(1) != 1 or x.stride(0) % PITCH:
        return F.pad(x, (0, missing)).contiguous()
    return x


def pitched(like: Tensor, rows: int, cols: int) -> Tensor:
    """An uninitialised `[rows, cols]` whose rows begin at multiples of PITCH."""
    return like.new_empty(rows, -(-cols // PITCH) * PITCH)[:, :cols]


def addmm_fp32_(out: Tensor, x: Tensor, y: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """`out = beta * out + alpha * x y` in float32, whatever the operands are; with `beta` 0 `out` is not read."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(out, x, y, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, x.float(), y.float(), beta=beta, alpha=alpha, out=out)
