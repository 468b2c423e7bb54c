"""Who computes an attention call: ours, or a library that is faster on it; a pure function of the call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels._checks import require
from mmkernels._launch import architecture
from mmkernels.attention import fused
from mmkernels.attention.libraries import FALLING, KEYS, LIBRARIES, SECOND, SLOPES
from mmkernels.attention.problem import Problem

OURS = "mmkernels"
NAMES = (OURS, *LIBRARIES)
# Plain attention of more queries than this goes to a library on a GPU: what our kernels are made for is fewer, or
# structure.
FEW_QUERIES = 128
# Of fewer queries than this our native step leaves most of its lanes empty, and SDPA is ahead on a CPU.
FEW_ROWS = 8
# By architecture, fastest first; each adds a gradient in a fixed order, as ours does.
WITH_GRADIENT = {80: ("flash_attn_2",), 90: ("flash_attn_3", "flash_attn_4", "flash_attn_2"), 100: ("flash_attn_4",)}


@dataclass(frozen=True)
class Call:
    """What a backend is picked by."""

    num_queries: int
    num_keys: int
    num_groups: int
    head_dim: int
    dtype: torch.dtype
    architecture: int  # 0 for a CPU
    mask: str  # "none", "causal", "intervals", "bool", "float"
    has_gradient: bool
    features: frozenset[str]  # what a library may lack
    structure: frozenset[str] = frozenset()  # what intervals a library may lack
    is_deterministic: bool = False  # whether torch was asked for deterministic algorithms

    @classmethod
    def of(cls, problem: Problem, is_causal: bool, is_ordered: bool, return_lse: bool, uniform: bool) -> "Call":
        kind, q, bias = "none", problem.q, problem.bias
        if problem.ends:
            kind = "causal" if is_causal else "intervals"
        elif bias is not None:
            kind = "bool" if bias.dtype == torch.bool else "float"
        features = {
            "two segments of keys": len(problem.segments) > 1,
            "alibi_slopes": problem.alibi_slopes is not None,
            "dropout_p": problem.dropout_p > 0,
            "empty_rows='uniform'": uniform,
            "return_lse": return_lse,
            "a bias with a gradient": bias is not None and bias.requires_grad,
            "a bias wider than q": bias is not None and bias.element_size() > q.element_size(),
            "an empty batch or no keys": not q.numel() or not problem.num_keys,
        }
        structure = {
            SECOND: len(problem.ends) > 2,
            KEYS: problem.keys is not None,
            FALLING: not is_ordered,
            SLOPES: problem.alibi_slopes is not None,
        }
        operands = (q, *(x for segment in problem.segments for x in segment))
        return cls(
            q.shape[1],
            problem.num_keys,
            problem.num_groups,
            q.shape[3],
            q.dtype,
            architecture(q.device) if q.is_cuda else 0,
            kind,
            torch.is_grad_enabled() and any(x.requires_grad for x in operands),
            frozenset(name for name, wanted in features.items() if wanted),
            frozenset(name for name, there in structure.items() if there and kind == "intervals"),
            torch.are_deterministic_algorithms_enabled(),
        )


def pick(call: Call, backend: str | None) -> str:
    """The backend that is asked for, if it serves the call, or the fastest that does."""
    if backend is None:
        return next((name for name in _faster(call) if refusal(name, call) is None), OURS)
    require("attention", backend in NAMES, "backend must be one of {}, got {!r}", NAMES, backend)
    reason = refusal(backend, call)
    require(
        "attention",
        reason is None,
        "backend must be one that serves the call, got {!r}, which does not: {}",
        backend,
        reason,
    )
    return backend


def refusal(name: str, call: Call) -> str | None:
    """Why the backend does not serve the call; None where it does."""
    if name == OURS:
        return None
    library = LIBRARIES[name]
    lacking = sorted(call.features - library.features)
    limits = {
        f"it has no {', '.join(lacking)}": bool(lacking),
        f"it has no {call.mask} mask": call.mask not in library.masks and call.mask != "intervals",
        "it would store the mask as a matrix; mmkernels.masks.dense(mask.to_dense()) does": (
            call.mask not in library.masks and call.mask == "intervals"
        ),
        f"it takes intervals, but none with {', '.join(sorted(call.structure - library.structure))}": bool(
            call.structure - library.structure
        ),
        "its gradient adds in no fixed order, and torch.use_deterministic_algorithms is on": (
            call.has_gradient and call.is_deterministic and not library.is_deterministic
        ),
        "its causal mask needs as many queries as keys": (
            call.mask == "causal" and not library.is_bottom_right and call.num_queries != call.num_keys
        ),
        f"it has no {call.dtype}": call.dtype not in library.dtypes,
        f"K must be a multiple of {library.multiple} up to {library.max_head_dim}": (
            call.head_dim % library.multiple > 0 or call.head_dim > library.max_head_dim
        ),
        "it has no groups of heads": call.num_groups > 1 and not library.has_groups,
        "it needs a GPU" + (f" of sm_{library.only}" if library.only else ""): (
            library.only is not None and call.architecture not in library.only
        ),
    }
    reason = next((reason for reason, applies in limits.items() if applies), None)
    return library.missing() if reason is None else reason


def run_backend(name: str, problem: Problem, call: Call) -> Tensor:
    """`[B, Lq, H, K]` of a call that `pick` gave to the library."""
    return LIBRARIES[name].run(problem, call.mask == "causal")


def _faster(call: Call) -> Sequence[str]:
    """Libraries that beat ours on the call, wherever they serve it, the fastest first."""
    if call.architecture == 0:
        # for a gradient of the bias it would store the weights
        wants_bias = "a bias with a gradient" in call.features
        is_plain = call.mask != "intervals" and not wants_bias
        is_slower = fused.has(call.dtype) and call.num_queries >= FEW_ROWS
        return ("sdpa",) if is_plain and not is_slower else ()
    # those that take intervals compile, make a plan or wait for the GPU in each call
    if call.mask not in ("none", "causal") or call.num_queries <= FEW_QUERIES:
        return ()
    return WITH_GRADIENT[call.architecture] if call.has_gradient else ("sdpa",)
