"""Attention under structured masks: arguments checked, a backend picked, ours registered with torch."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmkernels._autograd import has_no_derivative, reverse_only
from mmkernels._checks import accumulator, autocast_operands, require
from mmkernels._device import Kernels, runs_triton
from mmkernels.attention import blockwise, fused
from mmkernels.attention.backends import OURS, Call, pick, run_backend
from mmkernels.attention.checks import (
    OP,
    Keys,
    check_mask,
    checked_seed,
    checked_segments,
    checked_slopes,
    interval_ends,
)
from mmkernels.attention.problem import (
    SCHEMA,
    Operands,
    Problem,
    densified,
    has_kernel_backward,
    joined,
    with_uniform_rows,
)
from mmkernels.attention.problem import empty_rows as find_empty_rows
from mmkernels.attention.reference import QKNorm
from mmkernels.masks import Dense, Intervals, Mask

kernel = Kernels("mmkernels.attention")

EMPTY_ROWS = ("zero", "uniform")
# Weights of a sample, over all heads, up to which a mask is made.
FEW_WEIGHTS = 1 << 17


@overload
def attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    gate: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    empty_rows: str = "zero",
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    gate: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    empty_rows: str = "zero",
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Keys,
    v: Keys,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    gate: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    empty_rows: str = "zero",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`tanh(gate) softmax(scale q k^T + bias) v` over the keys that the mask lets each query see.

    Neither the weights nor, for `Intervals`, a mask is ever stored, and tiles that no query sees are skipped.

    Args:
        q: queries `[B, Lq, H, K]`, float32, float16, bfloat16 or float64, any strides; K up to 256. A batch of 1
            is shared by every batch of keys (learned queries).
        k: keys `[B, Lk, Hkv, K]`, the dtype and device of `q`; H is a multiple of Hkv (grouped-query
            attention). A pair of them stands for their concatenation along Lk, which a GPU's kernels do not need
            to have made.
        v: values, of the shape of `k`.
        mask: of `mmkernels.masks`, for Lq queries and Lk keys in all; None = every query sees every key. A float
            mask is added to the logits; float32 or the dtype of `q`, and may want a gradient.
        scale: of the products; None = `K ** -0.5`.
        alibi_slopes: `[H]` or `[B, H]`, constants: `-slope |i + Lk - Lq - j|` is added to the logits
            (arXiv:2108.12409).
        dropout_p: from 0, below 1: the share of weights that is dropped, the others are divided by 1 - p.
        seed: of the dropout, an int or an int64 tensor `[]` on the device of `q`; None draws one from torch's
            generator. The same seed drops the same weights on every device.
        gate: `[]`, `[1]` or `[H]`: its tanh multiplies the result (Flamingo, arXiv:2204.14198).
        qk_norm: RMSNorm of `q` and `k` before the product.
        empty_rows: what a query that sees nothing gets: "zero", or "uniform", the mean of all values, as models
            that add a large negative number to the logits have it; no dropout falls on it.
        return_lse: also return the log-sum-exp of each row's logits, differentiable; -inf for an empty row.
        backend: who computes it: "mmkernels", "sdpa" (torch chooses), "sdpa_flash", "sdpa_cudnn",
            "sdpa_efficient", "flash_attn_2", "flash_attn_3", "flash_attn_4" or "xformers"; of `Intervals` too, by
            name alone, the "flash_attn"s (packed samples and padding on one side, for which a GPU is waited for),
            "flex" and "flex_flash" (torch's FlexAttention on Triton and on flash-attn 4), "cudnn_flex" and
            "flashmask". None picks by shape, mask, dtype, device and what is installed, on a GPU none whose
            backward adds in no fixed order.

    Returns:
        `[B, Lq, H, K]` in the dtype of `q`, accumulated in float32 (float64 for float64); with `return_lse` also
        `[B, H, Lq]`, float32 (float64).

    Raises:
        ValueError: a wrong shape, dtype, device, mask, probability or combination; a backend that cannot serve
            the call, and why.

    Reference: `attention_ref`. Papers: arXiv:1706.03762, arXiv:2205.14135.
    """
    segments = checked_segments(q, k, v, gate, qk_norm)
    bias = mask.values if isinstance(mask, Dense) else None
    operands = (q, *(x for segment in segments for x in segment))
    if bias is None or bias.dtype == torch.bool:
        q, *flat = autocast_operands(*operands)
    else:
        q, *flat, bias = autocast_operands(*operands, bias)
    segments = tuple(zip(flat[::2], flat[1::2], strict=True))
    batch, head_dim = segments[0][0].shape[0], q.shape[3]
    require(OP, empty_rows in EMPTY_ROWS, "empty_rows must be one of {}, got {!r}", EMPTY_ROWS, empty_rows)
    require(
        OP,
        alibi_slopes is None or empty_rows == "zero",
        "empty_rows must be 'zero' with alibi_slopes, got {!r}",
        empty_rows,
    )
    require(OP, 0 <= dropout_p < 1, "dropout_p must be from 0, below 1, got {}", dropout_p)
    if qk_norm is not None:
        q = qk_norm.of_query(q)
        segments = tuple((qk_norm.of_key(k), v) for k, v in segments)
    problem = Problem(
        q.expand(batch, -1, -1, -1),
        segments,
        interval_ends(mask),
        mask.keys if isinstance(mask, Intervals) else None,
        bias,
        checked_slopes(alibi_slopes, q, batch),
        checked_seed(seed, q) if dropout_p > 0 else None,
        head_dim**-0.5 if scale is None else scale,
        dropout_p,
    )
    check_mask(mask, problem)
    if len(segments) > 1 and not (runs_triton(q) and has_kernel_backward(problem)):
        problem = joined(problem)
    is_causal = isinstance(mask, Intervals) and mask.is_causal
    is_ordered = isinstance(mask, Intervals) and mask.is_ordered
    if backend in (None, OURS) and _skips_little(problem) and not (is_causal and problem.offset == 0):
        problem = densified(problem)
    empty = find_empty_rows(problem) if empty_rows == "uniform" else None
    call = Call.of(problem, is_causal, is_ordered, return_lse, empty is not None)
    name = pick(call, backend)
    if name == OURS:
        if return_lse and q.is_cpu and not fused.serves(problem):
            # in low precision ATen's kernel takes its exponentials to four digits
            problem = problem.widened()
        _reverse_only(problem)
        out, lse = _attention_fwd(*Operands.of(problem))
        out = out.to(q.dtype)
        out = out if empty is None else with_uniform_rows(problem, out, empty)
    else:
        if not name.startswith("sdpa"):  # torch's own refuses what it lacks
            _reverse_only(problem)
        out, lse = run_backend(name, problem, call), q.new_empty(0)
    if gate is not None:
        out = out * gate.to(out.dtype).tanh().reshape(-1, 1)
    return (out, lse) if return_lse else out


def _reverse_only(problem: Problem) -> None:
    q, k, v, *_, bias = Operands.of(problem).leaves
    reverse_only(OP, "mmkernels.attention_ref", q=q, k=k, v=v, mask=bias)


def _skips_little(problem: Problem) -> bool:
    """Whether finding the tiles that nobody sees would take longer than computing them."""
    num_queries, num_heads = problem.q.shape[1:3]
    if fused.serves(problem):
        return False
    return not runs_triton(problem.q) and num_queries * problem.num_keys * num_heads <= FEW_WEIGHTS


@torch.library.custom_op("mmkernels::attention_fwd", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
def _attention_fwd(*operands: Any) -> tuple[Tensor, Tensor]:
    problem = Operands(*operands).problem()
    path = kernel if runs_triton(problem.q) else blockwise
    with torch.autocast(problem.q.device.type, enabled=False):
        return path.attention_fwd(problem)


@_attention_fwd.register_fake
def _(q, *_):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulator(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op(
    "mmkernels::attention_bwd",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, bool[] needs) -> Tensor[]",
)
def _attention_bwd(*args: Any) -> list[Tensor]:
    *flat, out, lse, d_out, d_lse, needs = args
    operands = Operands(*flat)
    problem, q = operands.problem(), operands.q
    path = kernel if runs_triton(q) and has_kernel_backward(problem) else blockwise
    with torch.autocast(q.device.type, enabled=False):
        results = path.attention_bwd(problem, out, lse, d_out, d_lse, needs)
    return [
        q.new_empty(0) if dx is None or x is None else dx.to(x.dtype).contiguous()
        for dx, x in zip(results, operands.leaves, strict=True)
    ]


@_attention_bwd.register_fake
def _(*args):
    *flat, _, _, _, _, needs = args
    operands = Operands(*flat)
    return [
        operands.q.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(operands.leaves, needs, strict=True)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out: Tensor | None, d_lse: Tensor | None):
    *tensors, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    if d_out is None and d_lse is None:
        return (None,) * len(Operands._fields)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    options = (ctx.scale, ctx.dropout_p)
    grads = _attention_bwd(*tensors, *options, out, lse, d_out, d_lse, needs)
    constants = (None,) * (len(Operands._fields) - len(needs))
    return *(dx if needed else None for dx, needed in zip(grads, needs, strict=True)), *constants


_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
_attention_bwd.register_autograd(has_no_derivative(OP, "mmkernels.attention_ref"))
