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
from mmkernels._numerics import log_sum_exp
from mmkernels._tl import addmm_fp32_, pitched
from mmkernels.linear_cross_entropy.blockwise import Grads, Stats, add_targets, coefficients, row_loss
from mmkernels.linear_cross_entropy.device import _linear_cross_entropy_fwd_kernel

# dL/dlogits is stored in the operands' dtype, entries of 1 moved here: float16 then keeps 28 binades below.
GRAD_CEILING = 2.0**14
# the largest log-sum-exp that the z-loss's factor leaves room for below the ceiling
LSE_CEILING = 1024
# One [chunk, V] buffer holds the logits and then dL/dlogits: CHUNK_BYTES of it, but never fewer rows than keep
# the product for the weight, which reads and writes [V, D] in float32, from waiting for memory.
MIN_CHUNK, MAX_CHUNK = 1024, 8192
# A program owns a row, and walks it in blocks of block_n.
LAUNCH = Launch(1, 4096, 1, 8, 1)


def chunk_rows(vocab: int) -> int:
    """Rows of float32 logits that are held at a time."""
    fitting = CHUNK_BYTES // (vocab * 4) // 128 * 128
    return min(max(fitting, MIN_CHUNK), MAX_CHUNK)


def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coef: Tensor,
    mean_logit: Tensor | None,
    terms: Sequence[float],
    grads: Grads,
) -> Tensor:
    """The loss of each row; the gradients of `sum coef * loss` are written into `grads`.

    `terms` are the label smoothing and the weight of the z-loss. The smoothing's part of the gradients, alike
    in every column, is the caller's; `coef` is at most 1.
    """
    dh, dw, db = grads
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    unit = GRAD_CEILING / 2.0 ** math.ceil(math.log2(1 + 2 * terms[1] * LSE_CEILING))
    config = constant_launch(LAUNCH, hidden)
    loss = torch.empty_like(coef)
    chunk = chunk_rows(vocab)
    buffer = pitched(coef, min(chunk, num_rows), vocab)
    for first in range(0, num_rows, chunk):
        rows = slice(first, first + chunk)
        h, of_rows = hidden[rows], targets[rows]
        logits = buffer[: len(h)]
        grad = logits.view(hidden.dtype)[:, :vocab] if any(dx is not None for dx in grads) else None
        addmm_fp32_(logits, h, weight.T, beta=0.0)
        stats = _softmax(logits, bias, of_rows, coef[rows] * unit, terms[1], grad, config)
        loss[rows] = row_loss(stats, None if mean_logit is None else mean_logit[rows], terms)
        if grad is None:
            continue
        dh_part = None if dh is None else dh[rows]
        if dh_part is not None:
            addmm_fp32_(dh_part, grad, weight, beta=0.0, alpha=1 / unit)
        if dw is not None:
            addmm_fp32_(dw, grad.T, h, beta=float(first > 0), alpha=1 / unit)
        if db is not None:
            of_chunk = grad.sum(0, dtype=db.dtype).div_(unit)
            db.add_(of_chunk) if first else db.copy_(of_chunk)
        _, target_coef = coefficients(stats, coef[rows], terms)
        add_targets((dh_part, dw, db), h, weight, of_rows, target_coef)
    return loss


def _softmax(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coef: Tensor,
    z_loss: float,
    grad: Tensor | None,
    config: Launch,
) -> Stats:
    """The statistics of the rows; dL/dlogits, zero at the targets, goes into `grad`."""
    num_rows, vocab = logits.shape
    row_max, row_sum, target_logit = coef.new_empty(3, num_rows)
    out = logits if grad is None else grad
    launch(
        _linear_cross_entropy_fwd_kernel,
        (triton.cdiv(num_rows, config.block_m),),
        logits,
        out,
        logits if bias is None else bias.contiguous(),
        targets,
        coef,
        row_max,
        row_sum,
        target_logit,
        logits.stride(0),
        out.stride(0),
        num_rows,
        vocab,
        z_loss,
        HAS_BIAS=bias is not None,
        HAS_GRAD=grad is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return (*log_sum_exp(row_max, row_sum), target_logit)
