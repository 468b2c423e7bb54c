"""Attention piece by piece: what a CPU without the native step runs, and float64 and gradients of a bias on any device.

On a CPU each piece goes to the fused kernel that ATen has for it; what that lacks (dropout, a gradient of the
log-sum-exp or of a bias, other devices) is done by plain ATen calls on tiles. Nothing of the size of a mask or of
the weights is stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._checks import accumulator
from mmkernels._philox import drop_
from mmkernels.attention import fused as native_step
from mmkernels.attention.pieces import Limits, Piece, bias_of, blocks
from mmkernels.attention.problem import Problem, empty_rows

FUSED_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Rows and keys of a tile of plain ATen calls, and its weights over all heads: 4 MiB of float32.
TILE_ROWS, TILE_COLS, TILE_WEIGHTS = 256, 1024, 1 << 20
# Rows of a masked piece of ATen's kernel, whose mask has to be made.
MASKED_ROWS = 512
UNBOUNDED = 1 << 30


class Part(NamedTuple):
    """A piece's result `[b, H, r, K]` and log-sum-exps `[b, H, r]`."""

    out: Tensor
    lse: Tensor


class Rows(NamedTuple):
    """What the backward of a piece reads of its rows: `[b, H, r, K]`, `[b, H, r]`."""

    out: Tensor
    d_out: Tensor
    lse: Tensor
    d_lse: Tensor | None


class Grads(NamedTuple):
    """Of a piece: `[b, H, r, K]`, `[b, Hkv, c, K]` twice, and, of its bias, `[b, H, r, c]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None


def attention_fwd(problem: Problem) -> tuple[Tensor, Tensor]:
    """The result `[B, Lq, H, K]`, and the log-sum-exps `[B, H, Lq]`."""
    if native_step.serves(problem):
        return native_step.attention_fwd(problem)
    q, dtype = problem.q, accumulator(problem.q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)
    fused = _is_fused(problem)
    if _is_widened(problem, fused):
        problem = problem.widened()
    for batch, rows, pieces in blocks(problem, _limits(problem, fused)):
        part = None
        for piece in pieces:
            found = (_fused_forward if fused else _tile_forward)(problem, piece)
            part = found if part is None else _combined(part, found)
        out[batch, rows] = 0 if part is None else part.out.transpose(1, 2)
        lse[batch, :, rows] = -torch.inf if part is None else part.lse
    return out, lse


def attention_bwd(
    problem: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v, of no second segment, and of the bias, those that `needs` asks for."""
    if native_step.serves(problem):
        # whether or not the bias's gradient is asked for, the others are the same bits
        dbias = _tiles_bwd(problem, out, lse, d_out, d_lse, needs)[5] if needs[5] else None
        return [*native_step.attention_bwd(problem, out, lse, d_out, d_lse), None, None, dbias]
    return _tiles_bwd(problem, out, lse, d_out, d_lse, needs)


def _tiles_bwd(
    problem: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    dtype = accumulator(problem.q.dtype)
    # a bias has the same weights whether or not its gradient is wanted
    fused = _is_fused(problem) and d_lse is None and not _has_float(problem)
    empty = empty_rows(problem)
    if empty is not None:
        # the weights of such a row, exp(S - lse), are zero
        lse = lse.masked_fill(empty, torch.inf)
        d_lse = None if d_lse is None else d_lse.masked_fill(empty, 0)
    bias = problem.bias
    dbias = torch.zeros_like(bias, dtype=dtype) if needs[5] and bias is not None else None
    if _is_widened(problem, fused):
        problem, out, d_out = problem.widened(), out.to(dtype), d_out.to(dtype)
    dq = torch.zeros(problem.q.shape, dtype=dtype, device=out.device)
    dkv = [torch.zeros_like(x, dtype=dtype) for x in problem.segments[0]]
    for batch, rows, pieces in blocks(problem, _limits(problem, fused)):
        o, do = (x[batch, rows].transpose(1, 2) for x in (out, d_out))
        row = Rows(o, do, lse[batch, :, rows], None if d_lse is None else d_lse[batch, :, rows])
        for piece in pieces:
            found = (_fused_backward if fused else _tile_backward)(problem, piece, row)
            dq[batch, rows] += found.q.transpose(1, 2)
            for dx, part in zip(dkv, (found.k, found.v), strict=True):
                dx[batch, piece.cols] += part.transpose(1, 2)
            if dbias is not None and found.bias is not None:
                _add_reduced(dbias, piece, found.bias)
    return [dq, *dkv, None, None, dbias]


def _is_fused(problem: Problem) -> bool:
    return problem.q.is_cpu and problem.dropout_p == 0


def _is_widened(problem: Problem, fused: bool) -> bool:
    """ATen's kernel takes low precision, and then a mask of it, in which a bias would be rounded."""
    return not fused or _has_float(problem) or problem.alibi_slopes is not None


def _has_float(problem: Problem) -> bool:
    return problem.bias is not None and problem.bias.is_floating_point()


def _limits(problem: Problem, fused: bool) -> Limits:
    num_queries, num_heads = problem.q.shape[1:3]
    if fused:
        rows = UNBOUNDED if problem.alibi_slopes is None else MASKED_ROWS
        return Limits(UNBOUNDED, rows, MASKED_ROWS, UNBOUNDED)
    cols = min(TILE_COLS, max(problem.num_keys, 1))
    rows = min(TILE_ROWS, max(num_queries, 1), max(TILE_WEIGHTS // (num_heads * cols), 16))
    return Limits(max(TILE_WEIGHTS // (num_heads * rows * cols), 1), rows, rows, cols)


def _views(problem: Problem, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """`[b, H, r, K]`, `[b, Hkv, c, K]` twice."""
    k, v = problem.segments[0]
    parts = (problem.q[piece.batch, piece.rows], k[piece.batch, piece.cols], v[piece.batch, piece.cols])
    # ATen's kernel reads along K without asking for the stride
    q, k, v = ((x if x.stride(3) == 1 else x.contiguous()).transpose(1, 2) for x in parts)
    return q, k, v


def _combined(one: Part, other: Part) -> Part:
    """The softmax over both pieces' keys."""
    lse = torch.logaddexp(one.lse, other.lse)
    shift = lse.masked_fill(lse == -torch.inf, 0)
    weights = ((part.lse - shift).exp()[..., None] for part in (one, other))
    return Part(sum(part.out * w for part, w in zip((one, other), weights, strict=True)), lse)  # pyright: ignore[reportArgumentType]


def _fused_bias(problem: Problem, piece: Piece) -> Tensor | None:
    bias = bias_of(problem, piece)
    return None if bias is None else bias.to(problem.q.dtype)


def _fused_forward(problem: Problem, piece: Piece) -> Part:
    bias = _fused_bias(problem, piece)
    causal, views = piece.kind == "causal", _views(problem, piece)
    out, lse = FUSED_FORWARD(*views, 0.0, causal, attn_mask=bias, scale=problem.scale)
    if bias is not None and piece.kind == "masked":
        # that kernel calls the log-sum-exp of nothing zero
        lse = lse.masked_fill((bias == -torch.inf).all(3), -torch.inf)
    return Part(out, lse.to(accumulator(out.dtype)))


def _fused_backward(problem: Problem, piece: Piece, row: Rows) -> Grads:
    bias, causal = _fused_bias(problem, piece), piece.kind == "causal"
    q, k, v = _views(problem, piece)
    num_heads = k.shape[1]
    if k.shape[0] * num_heads == 1:
        # ATen gives each thread key heads of its own
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    dq, dk, dv = FUSED_BACKWARD(row.d_out, q, k, v, row.out, row.lse, 0.0, causal, attn_mask=bias, scale=problem.scale)
    return Grads(dq, _group_sum(dk, num_heads), _group_sum(dv, num_heads), None)


def _logits(problem: Problem, piece: Piece, q: Tensor, k: Tensor) -> Tensor:
    """`[b, H, r, c]`."""
    logits = _product(q, k.mT).mul_(problem.scale)
    if piece.kind == "causal":
        size = logits.shape[2]
        logits.masked_fill_(torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    bias = bias_of(problem, piece)
    return logits if bias is None else logits.add_(bias)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """`x y` for `x [b, H, ...]` and `y [b, Hkv, ...]`: each head of `y` serves a group of those of `x`."""
    groups = x.shape[1] // y.shape[1]
    if groups == 1:
        return x @ y
    return (x.unflatten(1, (-1, groups)) @ y[:, :, None]).flatten(1, 2)


def _group_sum(x: Tensor, num_heads: int) -> Tensor:
    """`[b, H, ...]` summed over the heads of each group, `[b, num_heads, ...]`."""
    return x if x.shape[1] == num_heads else x.unflatten(1, (num_heads, -1)).sum(2)


def _drop_(problem: Problem, piece: Piece, x: Tensor) -> Tensor:
    """`x / (1 - p)` where dropout keeps it, zero elsewhere, in place."""
    assert problem.seed is not None
    num_heads = problem.q.shape[2]
    heads = torch.arange(problem.q.shape[0] * num_heads, device=x.device).view(-1, num_heads)[piece.batch]
    return drop_(x, problem.seed, problem.dropout_p, heads, piece.rows, piece.cols)


def _tile_forward(problem: Problem, piece: Piece) -> Part:
    q, k, v = _views(problem, piece)
    logits = _logits(problem, piece, q, k)
    shift = logits.amax(3).clamp_min_(torch.finfo(q.dtype).min)  # -inf - -inf would be NaN
    weights = logits.sub_(shift[..., None]).exp_()
    sums = weights.sum(3)
    out = _product(weights if problem.seed is None else _drop_(problem, piece, weights), v)
    return Part(out / sums.masked_fill(sums == 0, 1)[..., None], shift + sums.log())


def _tile_backward(problem: Problem, piece: Piece, row: Rows) -> Grads:
    # each is in two products, for which it would be copied twice
    q, k, v = (x.contiguous() for x in _views(problem, piece))
    d_out = row.d_out.contiguous()
    weights = (_logits(problem, piece, q, k) - row.lse[..., None]).exp_()
    dropped = weights if problem.seed is None else _drop_(problem, piece, weights.clone())
    excess = (d_out * row.out).sum(3)
    if row.d_lse is not None:
        excess -= row.d_lse
    d_logits = _product(d_out, v.mT).mul_(dropped).addcmul_(weights, excess[..., None], value=-1)
    dq = _product(d_logits, k).mul_(problem.scale)
    dk = (d_logits.mT @ q).mul_(problem.scale)
    num_heads = k.shape[1]
    return Grads(dq, _group_sum(dk, num_heads), _group_sum(dropped.mT @ d_out, num_heads), d_logits)


def _add_reduced(dbias: Tensor, piece: Piece, part: Tensor) -> None:
    """Add `[b, H, r, c]` to the gradient of a bias whose dimensions may be 1."""
    places = (piece.batch, slice(None), piece.rows, piece.cols)
    place = tuple(slice(None) if size == 1 else s for size, s in zip(dbias.shape, places, strict=True))
    dbias[place] += part.sum_to_size(dbias[place].shape)
