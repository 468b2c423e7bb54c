"""Attention on a CPU by the native step: one call, which walks the tiles that some query of a block sees.

Masks, slopes and dropout are made a tile at a time. Sums are float32 whatever the operands' dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels import native
from mmkernels._philox import threshold
from mmkernels.attention.problem import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has(dtype: torch.dtype) -> bool:
    """Whether the native step is there for a dtype."""
    return native.AVAILABLE and dtype in DTYPES


def serves(problem: Problem) -> bool:
    """Whether the native step computes a call's result; its gradients too, but for that of a bias."""
    return problem.q.is_cpu and has(problem.q.dtype) and len(problem.segments) == 1


def attention_fwd(problem: Problem) -> tuple[Tensor, Tensor]:
    """The result `[B, Lq, H, K]`, and the log-sum-exps `[B, H, Lq]`."""
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1])
    torch.ops.mmkernels.attention_cpu(*_operands(problem), out, lse)
    return out, lse


def attention_bwd(problem: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> list[Tensor]:
    """Gradients of q, k and v."""
    d_out, delta = _rows(d_out), torch.empty(lse.shape)
    torch.ops.mmkernels.attention_delta(_rows(out), d_out, delta)
    if d_lse is not None:  # of a row that sees nothing, whose weights are zero, it goes nowhere
        delta -= d_lse
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (problem.q, *problem.segments[0])]
    torch.ops.mmkernels.attention_cpu_bwd(*_operands(problem), d_out, lse, delta, *grads)
    return grads


def _operands(problem: Problem) -> Sequence[object]:
    (k, v), bias, keys, slopes = problem.segments[0], problem.bias, problem.keys, problem.alibi_slopes
    if bias is not None and bias.is_floating_point():
        bias = bias.detach().float()
    ends = [_rows(x) for x in problem.ends]
    limit, scale = 0.0, 0.0
    if problem.seed is not None:
        limit, scale = float(threshold(problem.dropout_p)), 1 / (1 - problem.dropout_p)
    rows = (_rows(problem.q), _rows(k), _rows(v))
    return *rows, ends, None if keys is None else _rows(keys), bias, slopes, problem.seed, limit, scale, problem.scale


def _rows(x: Tensor) -> Tensor:
    """With unit stride along the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
