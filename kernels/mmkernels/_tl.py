"""What the Triton kernels of several ops share: a tile's product, and the operands as kernels read them."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels._launch import Launch, architecture

# elements between rows are a multiple of this, so that loads and stores come in whole vectors
PITCH = 16


class Constant(tl.constexpr):
    """A number that kernels know by its name in their module. Triton compares each with what it was when the kernel was
    compiled, at every launch: of the same object without making new ones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Constant":
        return self

    def __ne__(self, other: object) -> Any:
        return False if other is self else super().__ne__(other)


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


@triton.jit
def tile_place(tile, tiles_m, tiles_n):
    """Row and column of the `tile`-th tile: down the rows of 8 tiles, then the next column, so that what a wave of
    programs reads is still in cache."""
    in_group = 8 * tiles_n
    first_m = tile // in_group * 8
    rows = tl.minimum(tiles_m - first_m, 8)
    return first_m + tile % in_group % rows, tile % in_group // rows


@triton.jit
def product(
    a,
    b,
    acc,
    stride_am,
    stride_bn,
    first_m,
    first_n,
    M,
    N,
    D,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """`acc`, in float32, plus a tile of `a b^T` from rows `first_m` and `first_n` on: by descriptors of tiles, zeros
    beyond the last row, or by pointers to rows of whole blocks, the last one again."""
    if DESCRIBED:
        for first in range(0, D, BLOCK_D):
            x, y = a.load([first_m, first]), b.load([first_n, first])
            acc = tl.dot(x, y.T, acc, input_precision=INPUT_PRECISION)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        rows_m = tl.minimum(first_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        rows_n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        a_ptrs = a + rows_m[:, None] * stride_am + offs_d[None, :]
        b_ptrs = b + rows_n[None, :] * stride_bn + offs_d[:, None]
        for _ in range(0, D, BLOCK_D):
            acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc, input_precision=INPUT_PRECISION)
            a_ptrs += BLOCK_D
            b_ptrs += BLOCK_D
    return acc


@triton.jit
def halves(x):
    """The left and the right columns of a tile: half of it at a time takes half of the registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def store_tile(out, values, first_m, first_n, rows, stride, DESCRIBED: tl.constexpr):
    """Writes a tile by a descriptor, or by pointers to rows of that stride."""
    if DESCRIBED:
        out.store([first_m, first_n], values.to(out.dtype))
    else:
        offs_m, offs_n = first_m + tl.arange(0, values.shape[0]), first_n + tl.arange(0, values.shape[1])
        ptrs = out + offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :]
        # up to the pitch, not the last column: whole vectors; what lies between is never read
        tl.store(ptrs, values.to(out.dtype.element_ty), mask=(offs_m < rows)[:, None] & (offs_n < stride)[None, :])


def operand(x: Tensor, block_d: int) -> Tensor:
    """`x` `[rows, D]` as a kernel reads it: rows of whole blocks, in whole vectors; if need be a padded copy.

    The interpreter would multiply bfloat16 as raw bits: there it is widened, which changes no value.
    """
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        x = x.float()
    missing = -x.shape[1] % block_d
    if missing or x.stride(1) != 1 or x.stride(0) % PITCH or x.data_ptr() % 16:
        return F.pad(x, (0, missing)).contiguous() if missing else x.clone(memory_format=torch.contiguous_format)
    return x


def readable(x: Tensor) -> Tensor:
    """`x` `[rows, D]` with its elements side by side, for a kernel that masks."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def is_described(x: Tensor) -> bool:
    """Whether tiles of `x` are read by tensor descriptors: what Hopper's tensor cores are fed by. An older GPU copies
    by pointers, and float32 has no use for them."""
    return x.element_size() == 2 and (not x.is_cuda or architecture(x.device) >= 90)


def tile_operand(x: Tensor, rows: int, config: Launch) -> Any:
    """`x` `[size, D]` as `product` reads it in tiles of `rows`: a descriptor, or a tensor."""
    if not is_described(x):
        return operand(x, config.block_d)
    x = operand(x, 1)
    if x.stride(0) % PITCH:  # of one row, or padded for the descriptor's sake
        x = F.pad(x, (0, -x.shape[1] % PITCH))[:, : x.shape[1]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, config.block_d])


def pitched(like: Tensor, rows: int, cols: int) -> Tensor:
    """An uninitialised `[rows, cols]` whose rows begin at multiples of PITCH."""
    return like.new_empty(rows, -(-cols // PITCH) * PITCH)[:, :cols]


def addmm_fp32_(out: Tensor, x: Tensor, y: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """`out = beta * out + alpha * x y` in float32, whatever the operands are; with `beta` 0 `out` is not read."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(out, x, y, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, x.float(), y.float(), beta=beta, alpha=alpha, out=out)
