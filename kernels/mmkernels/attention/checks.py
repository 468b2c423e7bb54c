"""What an attention call must be, before anything is launched."""

import torch
from torch import Tensor

from mmkernels._checks import check_beside, check_dtype, require
from mmkernels.attention.problem import Problem
from mmkernels.attention.reference import QKNorm
from mmkernels.masks import Dense, Intervals, Mask

OP = "attention"
MAX_HEAD_DIM = 256
AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}
Keys = Tensor | tuple[Tensor, Tensor]


def checked_segments(
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
            "v{} must be of the shape of k{}, {}, got {}",
            at,
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
        require(OP, shape in ([], [1], [num_heads]), "gate must be [], [1] or [{}], got shape {}", num_heads, shape)
        check_dtype(OP, "gate", gate)
        check_beside(OP, "gate", gate, "q", q)
    for name, x in () if qk_norm is None else zip(("q_weight", "k_weight"), qk_norm[:2], strict=True):
        require(OP, list(x.shape) == [head_dim], "qk_norm.{} must be [{}], got shape {}", name, head_dim, list(x.shape))
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
    # under autocast a LayerNorm of queries and keys is float32 and values are not; it brings all to one dtype
    same = x.dtype == q.dtype or ({x.dtype, q.dtype} <= AUTOCAST and torch.is_autocast_enabled(q.device.type))
    require(OP, same, "{} must have the dtype of q, {}, got {}", name, q.dtype, x.dtype)
    check_beside(OP, name, x, "q", q)


def interval_ends(mask: Mask | None) -> tuple[Tensor, ...]:
    return tuple(x for pair in mask.pairs for x in pair) if isinstance(mask, Intervals) else ()


def check_mask(mask: Mask | None, problem: Problem) -> None:
    if mask is None:
        return
    batch, num_queries, num_heads = problem.q.shape[:3]
    require(
        OP, mask.num_keys == problem.num_keys, "mask must be of Lk = {} keys, got {}", problem.num_keys, mask.num_keys
    )
    queries = (1, num_queries) if isinstance(mask, Dense) else (num_queries,)
    require(OP, mask.num_queries in queries, "mask must be of Lq = {} queries, got {}", num_queries, mask.num_queries)
    require(OP, mask.num_batches in (1, batch), "mask must be of a batch of 1 or {}, got {}", batch, mask.num_batches)
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
            OP, values.shape[1] in (1, num_heads), "mask must be of 1 or {} heads, got {}", num_heads, values.shape[1]
        )
        known = (torch.bool, torch.float32, problem.q.dtype)
        require(OP, values.dtype in known, "mask must be one of {}, got {}", known, values.dtype)


def checked_slopes(slopes: Tensor | None, q: Tensor, batch: int) -> Tensor | None:
    if slopes is None:
        return None
    num_heads, shape = q.shape[2], list(slopes.shape)
    known = ([num_heads], [batch, num_heads])
    require(OP, shape in known, "alibi_slopes must be {} or {}, got shape {}", *known, shape)
    check_dtype(OP, "alibi_slopes", slopes)
    require(OP, not slopes.requires_grad, "alibi_slopes must be constants, got {}", "some with a gradient")
    check_beside(OP, "alibi_slopes", slopes, "q", q)
    return slopes.float().reshape(-1, num_heads)


def checked_seed(seed: int | Tensor | None, q: Tensor) -> Tensor:
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
