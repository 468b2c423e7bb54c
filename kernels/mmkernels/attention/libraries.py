"""Attention of other libraries, each behind one signature, and what each of them lacks.

Where a library drops weights, the bits are its own, which no seed of ours can give; so a dropout is never theirs.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels.attention.problem import Problem

HALF = (torch.float16, torch.bfloat16)
SINGLE = (*HALF, torch.float32)
PLAIN = frozenset({"none", "causal"})
Run = Callable[[Problem, bool], Tensor]


@dataclass(frozen=True)
class Library:
    """What a library serves, and how it is called.

    Attributes:
        run: gives `[B, Lq, H, K]` of a problem, whose mask is causal or its bias.
        module: what is imported; None for torch itself.
        masks: kinds of masks.
        features: those that a library may lack and this one has, see `Call`.
        only: the architectures that it runs on; None for all devices.
        multiple: of which the head dimension must be.
        is_bottom_right: whether its causal mask lets the last query see the last key, at any lengths.
    """

    run: Run
    module: str | None = None
    masks: frozenset[str] = PLAIN
    features: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = HALF
    only: tuple[int, ...] | None = (80, 90, 100)
    max_head_dim: int = 256
    multiple: int = 8
    is_bottom_right: bool = True
    has_groups: bool = True

    def missing(self) -> str | None:
        """Why it cannot be imported; None where it can."""
        return None if self.module is None else _missing(self.module)


def _missing(module: str) -> str | None:
    if module not in _FOUND:
        _FOUND[module] = _import(module)
        if "cannot be imported" in str(_FOUND[module]):
            warnings.warn(str(_FOUND[module]), stacklevel=2)
    found = _FOUND[module]
    return found if isinstance(found, str) else None


# all that torch.compiler.assume_constant_result does, after importing Dynamo, which takes as long as torch
_missing._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _import(name: str) -> Any:
    """The module, or why there is none."""
    top = name.partition(".")[0]
    if find_spec(top) is None:
        return f"{top} is not installed"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return f"{name} is not installed"
        return f"{name} cannot be imported: {error}"
    except ImportError as error:
        return f"{name} cannot be imported: {error}"


_FOUND: dict[str, Any] = {}


def _run_sdpa(problem: Problem, is_causal: bool, *, backend: SDPBackend | None = None) -> Tensor:
    (k, v), *_ = problem.segments
    bias = problem.bias
    if bias is not None and bias.dtype == torch.float32 and problem.q.dtype == torch.float64:
        bias = bias.double()  # torch's own conversion is wrong on processors without AVX-512
    call = partial(
        F.scaled_dot_product_attention,
        *(x.transpose(1, 2) for x in (problem.q, k, v)),
        attn_mask=bias,
        is_causal=is_causal,
        scale=problem.scale,
        enable_gqa=problem.num_groups > 1,
    )
    if backend is None:
        return call().transpose(1, 2)
    with sdpa_kernel(backend):
        return call().transpose(1, 2)


def _run_flash_attn(problem: Problem, is_causal: bool, *, module: str, has_slopes: bool) -> Tensor:
    """Of flash-attn 2, 3 and 4, whose names for these arguments are the same."""
    (k, v), *_ = problem.segments
    options: dict[str, Any] = {}
    slopes = problem.alibi_slopes
    if has_slopes and slopes is not None:
        options["alibi_slopes"] = slopes[0] if slopes.shape[0] == 1 else slopes
    result = _FOUND[module].flash_attn_func(
        problem.q, k, v, softmax_scale=problem.scale, causal=is_causal, deterministic=True, **options
    )
    # some releases return the log-sum-exp beside it
    return result[0] if isinstance(result, tuple) else result


def _run_xformers(problem: Problem, is_causal: bool) -> Tensor:
    (k, v), *_ = problem.segments
    ops = _FOUND["xformers.ops"]
    bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if is_causal else None
    return ops.memory_efficient_attention(problem.q, k, v, attn_bias=bias, p=0.0, scale=problem.scale)


def _flash_attn(module: str, has_slopes: bool = False, **limits: Any) -> Library:
    run = partial(_run_flash_attn, module=module, has_slopes=has_slopes)
    features = frozenset({"alibi_slopes"} if has_slopes else ())
    return Library(run, module, features=features, **limits)


DENSE = frozenset({"none", "bool", "float"})
LIBRARIES: Mapping[str, Library] = {
    "sdpa": Library(
        _run_sdpa,
        masks=DENSE | PLAIN,
        features=frozenset({"a bias with a gradient"}),
        dtypes=(*SINGLE, torch.float64),
        only=None,
        multiple=1,
        is_bottom_right=False,
    ),
    "sdpa_flash": Library(partial(_run_sdpa, backend=SDPBackend.FLASH_ATTENTION), multiple=1, is_bottom_right=False),
    # with a mask its backward has given NaN: masks are not for it
    "sdpa_cudnn": Library(
        partial(_run_sdpa, backend=SDPBackend.CUDNN_ATTENTION), only=(90, 100), max_head_dim=128, is_bottom_right=False
    ),
    "sdpa_efficient": Library(
        partial(_run_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
        masks=DENSE | PLAIN,
        features=frozenset({"a bias with a gradient"}),
        dtypes=SINGLE,
        multiple=1,
        is_bottom_right=False,
        has_groups=False,
    ),
    "flash_attn_2": _flash_attn("flash_attn.flash_attn_interface", has_slopes=True, multiple=1),
    "flash_attn_3": _flash_attn("flash_attn_interface", only=(90,)),
    # on sm_100 it has no head dimension between 128 and 256
    "flash_attn_4": _flash_attn("flash_attn.cute", only=(90, 100), max_head_dim=128),
    "xformers": Library(_run_xformers, "xformers.ops", dtypes=SINGLE, has_groups=False),
}
