"""Linear cross-entropy on a GPU: the products are the GEMM library's, one Triton kernel does all between them.

The float32 logits of a chunk of rows become dL/dlogits in the same memory, in the operands' dtype.
"""

# triton types no launch
# pyright: reportCallIssue=false, reportArgumentType=false

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mmkernels._launch import CHUNK_BYTES, Launch, constant_launch, launch
from mmkernels._tl import addmm_fp32_, pitched
from mmkernels.linear_cross_entropy.blockwise import Grads, Rows, add_targets
from mmkernels.linear_cross_entropy.device import _linear_cross_entropy_fwd_kernel

# dL/dlogits is stored in the operands' dtype, entries of 1 moved here: float16 then keeps 28 binades below.
GRAD_CEILING = 2.0**14
# the largest log-sum-exp that the z-loss's factor leaves room for below the ceiling
LSE_CEILING = 1024
# One [chunk, V] buffer holds the logits and then dL/dlogits: a share of the GPU's memory, so many rows that the product
# for the weight, which reads and writes [V, D] in float32 once a chunk, does not wait for memory.
CHUNK_SHARE = 64
MIN_CHUNK, MAX_CHUNK = 1024, 8192
# Rows whose product is under way while the host waits for the number of rows that count; so few are not counted.
AHEAD = 1024
# A program owns a row, and walks it in blocks of block_n.
LAUNCH = Launch(1, 4096, 1, 8, 1)


def chunk_rows(vocab: int, memory: int) -> int:
    """Rows of float32 logits that are held at a time, of a device with so many bytes."""
    fitting = max(CHUNK_BYTES, memory // CHUNK_SHARE) // (vocab * 4) // 128 * 128
    return min(max(fitting, MIN_CHUNK), MAX_CHUNK)


def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of_rows: Rows,
    mean_logit: Tensor | None,
    terms: Sequence[float],
    grads: Grads,
) -> Tensor:
    """As the blockwise path's. `coef` is at most 1. Where the number of rows that count is to come, they are the
    first, and only they are computed."""
    targets, ignore_index, coef, num_kept = of_rows
    targets = targets.contiguous()
    dh, dw, db = grads
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    unit = GRAD_CEILING / 2.0 ** math.ceil(math.log2(1 + 2 * terms[1] * LSE_CEILING))
    loss, target_coef = torch.empty_like(coef), torch.empty_like(coef)
    chunk = chunk_rows(vocab, _memory(hidden))
    buffer = pitched(coef, min(chunk, num_rows), vocab)
    ahead = 0
    if num_kept is not None:
        ahead = min(AHEAD, chunk, num_rows)
        addmm_fp32_(buffer[:ahead], hidden[:ahead], weight.T, beta=0.0)
        num_rows = _keep_first(num_kept(), loss, grads)
    for first in range(0, num_rows, chunk):
        rows = slice(first, min(first + chunk, num_rows))
        h, of_chunk = hidden[rows], targets[rows]
        logits = buffer[: len(h)]
        if first or ahead < len(h):
            done = 0 if first else ahead
            addmm_fp32_(logits[done:], h[done:], weight.T, beta=0.0)
        grad = logits.view(hidden.dtype)[:, :vocab] if any(dx is not None for dx in grads) else None
        of_mean = None if mean_logit is None else mean_logit[rows]
        results = loss[rows], target_coef[rows]
        _softmax(logits, bias, of_chunk, coef[rows], of_mean, results, grad, (ignore_index, unit, *terms))
        if grad is None:
            continue
        dh_part = None if dh is None else dh[rows]
        if dh_part is not None:
            addmm_fp32_(dh_part, grad, weight, beta=0.0, alpha=1 / unit)
        if dw is not None:
            addmm_fp32_(dw, grad.T, h, beta=float(first > 0), alpha=1 / unit)
        if db is not None:
            part = grad.sum(0, dtype=db.dtype).div_(unit)
            db.add_(part) if first else db.copy_(part)
        add_targets((dh_part, dw, db), h, weight, of_chunk.clamp(0, vocab - 1), target_coef[rows])
    return loss


def _memory(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).total_memory if x.is_cuda else 0


def _keep_first(num_kept: int, loss: Tensor, grads: Grads) -> int:
    """Zeros in all that rows beyond these would have written."""
    dh, *of_all = grads
    loss[num_kept:] = 0
    if dh is not None:
        dh[num_kept:] = 0
    for dx in of_all:
        if dx is not None and not num_kept:
            dx.zero_()
    return num_kept


def _softmax(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coef: Tensor,
    mean_logit: Tensor | None,
    results: tuple[Tensor, Tensor],
    grad: Tensor | None,
    numbers: tuple[float, ...],
) -> None:
    """The rows' losses and dL/dlogit at the targets; dL/dlogits, zero at the targets, goes into `grad`."""
    num_rows, vocab = logits.shape
    config = constant_launch(LAUNCH, logits)
    out = logits if grad is None else grad
    launch(
        _linear_cross_entropy_fwd_kernel,
        (triton.cdiv(num_rows, config.block_m),),
        logits,
        out,
        logits if bias is None else bias.contiguous(),
        targets,
        coef,
        coef if mean_logit is None else mean_logit,
        *results,
        logits.stride(0),
        out.stride(0),
        num_rows,
        vocab,
        *numbers,
        HAS_BIAS=bias is not None,
        HAS_MEAN=mean_logit is not None,
        HAS_GRAD=grad is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
