"""Attention under structured masks: arguments checked, a backend picked, ours registered with torch."""

import torch
from torch import Tensor

from mmkernels._checks import accumulator, autocast_operands, check_beside, check_dtype, require
from mmkernels._device import HAS_TRITON, runs_triton
from mmkernels.attention import blockwise
from mmkernels.attention.backends import Call, pick, run_backend
from mmkernels.attention.problem import Problem, with_uniform_rows
from mmkernels.attention.problem import empty_rows as find_empty_rows
from mmkernels.attention.reference import QKNorm
from mmkernels.masks import Dense, Intervals, Mask

if HAS_TRITON:
    from mmkernels.attention import kernel
else:
    kernel = blockwise

OP = "attention"
EMPTY_ROWS = ("zero", "uniform")
MAX_HEAD_DIM = 256
Keys = Tensor | tuple[Tensor, Tensor]


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
            attention). A pair of them stands for their concatenation along Lk, which is not made.
        v: values, of the shape of `k`.
        mask: of `mmkernels.masks`, for Lq queries and Lk keys in all; None = every query sees every key. A float
            mask is added to the logits; float32 or the dtype of `q`, and may want a gradient.
        scale: of the products; None = `K ** -0.5`.
        alibi_slopes: float32 `[H]` or `[B, H]`, constants: `-slope |i + Lk - Lq - j|` is added to the logits
            (arXiv:2108.12409).
        dropout_p: from 0, below 1: the share of weights that is dropped, the others are divided by 1 - p.
        seed: of the dropout, an int or an int64 tensor `[]` on the device of `q`; None draws one from torch's
            generator. The same seed drops the same weights on every device.
        gate: `[]`, `[1]` or `[H]`: its tanh multiplies the result (Flamingo, arXiv:2204.14198).
        qk_norm: RMSNorm of `q` and `k` before the product.
        empty_rows: what a query that sees nothing gets: "zero", or "uniform", the mean of all values, as models
            that add a large negative number to the logits have it.
        return_lse: also return the log-sum-exp of each row's logits, differentiable; -inf for an empty row.
        backend: "mmkernels", "sdpa", "flash_attn" or "xformers"; None picks by shape, mask, dtype, device and
            what is installed.

    Returns:
        `[B, Lq, H, K]` in the dtype of `q`, accumulated in float32 (float64 for float64); with `return_lse` also
        `[B, H, Lq]`, float32 (float64).

    Raises:
        ValueError: a wrong shape, dtype, device, mask, probability or combination; a backend that cannot serve
            the call, and why.

    Reference: `attention_ref`. Papers: arXiv:1706.03762, arXiv:2205.14135.
    """
    segments = _checked(q, k, v, gate, qk_norm)
    q, *flat = autocast_operands(q, *(x for segment in segments for x in segment))
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
        _ends(mask),
        mask.values if isinstance(mask, Dense) else None,
        _slopes(alibi_slopes, q, batch),
        _seed(seed, q) if dropout_p > 0 else None,
        head_dim**-0.5 if scale is None else scale,
        dropout_p,
    )
    _check_mask(mask, problem)
    empty = find_empty_rows(problem) if empty_rows == "uniform" else None
    call = Call.of(problem, mask, return_lse, empty is not None)
    name = pick(call, backend)
    if name == "mmkernels":
        out, lse = _call(problem if empty is None else with_uniform_rows(problem, empty))
        lse = lse if empty is None else lse.masked_fill(empty, -torch.inf)
    else:
        out, lse = run_backend(name, problem, mask), q.new_empty(0)
    if gate is not None:
        out = out * gate.to(out.dtype).tanh().reshape(-1, 1)
    return (out, lse) if return_lse else out


def _call(problem: Problem) -> tuple[Tensor, Tensor]:
    (k, v), *more = problem.segments
    k2, v2 = more[0] if more else (None, None)
    ends = (*problem.ends, None, None, None, None)[:4]
    return _attention_fwd(
        problem.q,
        k,
        v,
        k2,
        v2,
        problem.bias,
        *ends,
        problem.alibi_slopes,
        problem.seed,
        problem.scale,
        problem.dropout_p,
    )


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    bias: Tensor | None,
    lo: Tensor | None,
    hi: Tensor | None,
    lo2: Tensor | None,
    hi2: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Problem:
    second = () if k2 is None or v2 is None else ((k2, v2),)
    ends = tuple(x for x in (lo, hi, lo2, hi2) if x is not None)
    return Problem(q, ((k, v), *second), ends, bias, alibi_slopes, seed, scale, dropout_p)


@torch.library.custom_op("mmkernels::attention_fwd", mutates_args=())
def _attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    bias: Tensor | None,
    lo: Tensor | None,
    hi: Tensor | None,
    lo2: Tensor | None,
    hi2: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    problem = _problem(q, k, v, k2, v2, bias, lo, hi, lo2, hi2, alibi_slopes, seed, scale, dropout_p)
    path = kernel if runs_triton(q) else blockwise
    with torch.autocast(q.device.type, enabled=False):
        return path.attention_fwd(problem)


@_attention_fwd.register_fake
def _(q, k, v, k2, v2, bias, lo, hi, lo2, hi2, alibi_slopes, seed, scale, dropout_p):
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulator(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("mmkernels::attention_bwd", mutates_args=())
def _attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    bias: Tensor | None,
    lo: Tensor | None,
    hi: Tensor | None,
    lo2: Tensor | None,
    hi2: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    problem = _problem(q, k, v, k2, v2, bias, lo, hi, lo2, hi2, alibi_slopes, seed, scale, dropout_p)
    # float64 and gradients of a bias have no kernel
    path = kernel if runs_triton(q) and not needs[-1] else blockwise
    with torch.autocast(q.device.type, enabled=False):
        results = path.attention_bwd(problem, out, lse, d_out, d_lse, needs)
    inputs = (q, k, v, k2, v2, bias)
    return [
        q.new_empty(0) if dx is None or x is None else dx.to(x.dtype).contiguous()
        for dx, x in zip(results, inputs, strict=True)
    ]


@_attention_bwd.register_fake
def _(
    q,
    k,
    v,
    k2,
    v2,
    bias,
    lo,
    hi,
    lo2,
    hi2,
    alibi_slopes,
    seed,
    scale,
    dropout_p,
    out,
    lse,
    d_out,
    d_lse,
    needs,
):
    inputs = (q, k, v, k2, v2, bias)
    return [
        q.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(inputs, needs, strict=True)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out: Tensor | None, d_lse: Tensor | None):
    *tensors, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    if d_out is None and d_lse is None:
        return (None,) * 14
    d_out = torch.zeros_like(out) if d_out is None else d_out
    options = (ctx.scale, ctx.dropout_p)
    grads = _attention_bwd(*tensors, *options, out, lse, d_out, d_lse, needs)
    return *(dx if needed else None for dx, needed in zip(grads, needs, strict=True)), *(None,) * 8


_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _checked(
    q: Tensor, k: Keys, v: Keys, gate: Tensor | None, qk_norm: QKNorm | None
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The segments of keys and values."""
    require(OP, q.ndim == 4, "q must be [B, Lq, H, K], got shape {}", list(q.shape))
    head_dim = q.shape[3]
    require(OP, 0 < head_dim <= MAX_HEAD_DIM, "q must have K from 1 to {}, got {}", MAX_HEAD_DIM, head_dim)
    check_dtype(OP, "q", q)
    require(
        OP,
        isinstance(k, tuple) == isinstance(v, tuple),
        "v must be a pair like k, or neither, got {}",
        type(v).__name__,
    )
    keys, values = (x if isinstance(x, tuple) else (x,) for x in (k, v))
    require(
        OP,
        len(keys) == len(values) <= 2,
        "k and v must be tensors or pairs of them, got {} and {}",
        len(keys),
        len(values),
    )
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        at = f"[{i}]" if isinstance(k, tuple) else ""
        _check_keys(f"k{at}", key, q, keys[0])
        _check_keys(f"v{at}", value, q, keys[0])
        shape = list(key.shape)
        require(
            OP,
            list(value.shape) == shape,
            "v{} must be of the shape of k{0}, {}, got {}",
            at,
            shape,
            list(value.shape),
        )
    batch = keys[0].shape[0]
    require(OP, q.shape[0] in (1, batch), "q must have a batch of 1 or {} like k, got {}", batch, q.shape[0])
    num_heads, num_key_heads = q.shape[2], keys[0].shape[2]
    require(
        OP,
        num_key_heads > 0 and num_heads % num_key_heads == 0,
        "q must have a multiple of k's {} heads, got {}",
        num_key_heads,
        num_heads,
    )
    if gate is not None:
        shape = list(gate.shape)
        require(
            OP,
            shape in ([], [1], [num_heads]),
            "gate must be [], [1] or [{}], got shape {}",
            num_heads,
            shape,
        )
        check_dtype(OP, "gate", gate)
        check_beside(OP, "gate", gate, "q", q)
    for name, x in () if qk_norm is None else zip(("q_weight", "k_weight"), qk_norm[:2], strict=True):
        require(
            OP,
            list(x.shape) == [head_dim],
            "qk_norm.{} must be [{}], got shape {}",
            name,
            head_dim,
            list(x.shape),
        )
        check_beside(OP, f"qk_norm.{name}", x, "q", q)
    return tuple(zip(keys, values, strict=True))


def _check_keys(name: str, x: Tensor, q: Tensor, like: Tensor) -> None:
    require(OP, x.ndim == 4, "{} must be [B, Lk, Hkv, K], got shape {}", name, list(x.shape))
    require(OP, x.shape[3] == q.shape[3], "{} must have q's K of {}, got {}", name, q.shape[3], x.shape[3])
    require(
        OP,
        x.shape[0] == like.shape[0] and x.shape[2] == like.shape[2],
        "{} must have the batch and the heads of the other keys, {} and {}, got {} and {}",
        name,
        like.shape[0],
        like.shape[2],
        x.shape[0],
        x.shape[2],
    )
    require(OP, x.dtype == q.dtype, "{} must have the dtype of q, {}, got {}", name, q.dtype, x.dtype)
    check_beside(OP, name, x, "q", q)


def _ends(mask: Mask | None) -> tuple[Tensor, ...]:
    return tuple(x for pair in mask.pairs for x in pair) if isinstance(mask, Intervals) else ()


def _check_mask(mask: Mask | None, problem: Problem) -> None:
    if mask is None:
        return
    batch, num_queries, num_heads = problem.q.shape[:3]
    require(
        OP,
        mask.num_keys == problem.num_keys,
        "mask must be of Lk = {} keys, got {}",
        problem.num_keys,
        mask.num_keys,
    )
    queries = (1, num_queries) if isinstance(mask, Dense) else (num_queries,)
    require(
        OP,
        mask.num_queries in queries,
        "mask must be of Lq = {} queries, got {}",
        num_queries,
        mask.num_queries,
    )
    require(
        OP,
        mask.num_batches in (1, batch),
        "mask must be of a batch of 1 or {}, got {}",
        batch,
        mask.num_batches,
    )
    require(
        OP,
        mask.device == problem.q.device,
        "mask must be on the device of q, {}, got {}",
        problem.q.device,
        mask.device,
    )
    if isinstance(mask, Dense):
        values = mask.values
        require(
            OP,
            values.shape[1] in (1, num_heads),
            "mask must be of 1 or {} heads, got {}",
            num_heads,
            values.shape[1],
        )
        known = (torch.bool, torch.float32, problem.q.dtype)
        require(OP, values.dtype in known, "mask must be one of {}, got {}", known, values.dtype)


def _slopes(slopes: Tensor | None, q: Tensor, batch: int) -> Tensor | None:
    if slopes is None:
        return None
    num_heads, shape = q.shape[2], list(slopes.shape)
    known = ([num_heads], [batch, num_heads])
    require(
        OP, shape in known, "alibi_slopes must be [{}] or [{}, {0}], got shape {}", num_heads, batch, shape
    )
    require(OP, slopes.dtype == torch.float32, "alibi_slopes must be float32, got {}", slopes.dtype)
    require(OP, not slopes.requires_grad, "alibi_slopes must be constants, got {}", "some with a gradient")
    check_beside(OP, "alibi_slopes", slopes, "q", q)
    return slopes.reshape(-1, num_heads)


def _seed(seed: int | Tensor | None, q: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(2**62, (), device=q.device)
    if isinstance(seed, int):
        return torch.full((), seed, dtype=torch.int64, device=q.device)
    require(
        OP,
        seed.dtype == torch.int64 and seed.ndim == 0,
        "seed must be an int or int64 [], got {} {}",
        seed.dtype,
        list(seed.shape),
    )
    check_beside(OP, "seed", seed, "q", q)
    return seed
