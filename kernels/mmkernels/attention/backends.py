"""Who computes an attention call: ours, or a library that is faster on it; a pure function of the call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import require
from mmkernels.attention.problem import Problem
from mmkernels.masks import Dense, Intervals, Mask


@dataclass(frozen=True)
class Call:
    """What a backend is picked by."""

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    mask: str  # "none", "intervals", "bool", "float"
    features: frozenset[str]  # what a library may lack

    @classmethod
    def of(cls, problem: Problem, mask: Mask | None, return_lse: bool, uniform: bool) -> "Call":
        batch, num_queries, num_heads, head_dim = problem.q.shape
        kind = "none"
        if isinstance(mask, Intervals):
            kind = "intervals"
        elif isinstance(mask, Dense):
            kind = "bool" if mask.values.dtype == torch.bool else "float"
        features = {
            "two segments of keys": len(problem.segments) > 1,
            "alibi_slopes": problem.alibi_slopes is not None,
            "dropout_p": problem.dropout_p > 0,
            "empty_rows='uniform'": uniform,
            "return_lse": return_lse,
            "a bias with a gradient": problem.bias is not None and problem.bias.requires_grad,
            "an empty batch or no keys": not problem.q.numel() or not problem.num_keys,
        }
        return cls(
            batch,
            num_queries,
            problem.num_keys,
            num_heads,
            num_heads // problem.num_groups,
            head_dim,
            problem.q.dtype,
            problem.q.device.type,
            kind,
            frozenset(name for name, wanted in features.items() if wanted),
        )


def pick(call: Call, backend: str | None) -> str:
    """The backend that is asked for, if it serves the call, or the fastest that does."""
    if backend is None:
        return "sdpa" if _sdpa_is_faster(call) else "mmkernels"
    require("attention", backend in REFUSALS, "backend must be one of {}, got {!r}", tuple(REFUSALS), backend)
    refusal = REFUSALS[backend](call)
    require(
        "attention",
        refusal is None,
        "backend must be one that serves the call, got {!r}, which does not: {}",
        backend,
        refusal,
    )
    return backend


def run_backend(name: str, problem: Problem, mask: Mask | None) -> Tensor:
    """`[B, Lq, H, K]` of a call that `pick` gave to the library."""
    return RUN[name](problem, mask)


def _sdpa_is_faster(call: Call) -> bool:
    return call.mask == "none" and _refused_by_sdpa(call) is None


def _refused_by_sdpa(call: Call) -> str | None:
    lacking = call.features - {"a bias with a gradient"}
    if lacking:
        return f"it has no {', '.join(sorted(lacking))}"
    if call.mask == "intervals":
        return "it would store the mask as a matrix; mmkernels.masks.dense(mask.to_dense()) does"
    return None


def _run_sdpa(problem: Problem, mask: Mask | None) -> Tensor:
    (k, v), *_ = problem.segments
    values = None if mask is None else mask.to_dense()
    if values is not None and values.dtype != torch.bool:
        values = values.to(problem.q.dtype)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (problem.q, k, v)),
        attn_mask=values,
        scale=problem.scale,
        enable_gqa=problem.num_groups > 1,
    )
    return out.transpose(1, 2)


REFUSALS: Mapping[str, Callable[[Call], str | None]] = {
    "mmkernels": lambda call: None,
    "sdpa": _refused_by_sdpa,
}
RUN: Mapping[str, Callable[[Problem, Mask | None], Tensor]] = {"sdpa": _run_sdpa}
