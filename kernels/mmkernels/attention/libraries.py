"""Attention of other libraries, each behind one signature, and what each of them lacks.

Where a library drops weights, the bits are its own, which no seed of ours can give; so a dropout is never theirs.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels.attention.problem import Problem
from mmkernels.attention.translations import FLEX_BLOCK, blocks_of, bounded, columns_of, endpoints_of, sequences_of

HALF = (torch.float16, torch.bfloat16)
SINGLE = (*HALF, torch.float32)
PLAIN = frozenset({"none", "causal"})
STRUCTURED = PLAIN | {"intervals"}
# what intervals may have that a library does not take
SECOND, KEYS, SLOPES = "a second interval a query", "a vector of keys", "alibi_slopes beside them"
FALLING = "ends that may fall from a query to the next"
Run = Callable[[Problem, bool], Tensor]


@dataclass(frozen=True)
class Library:
    """What a library serves, and how it is called.

    Attributes:
        run: gives `[B, Lq, H, K]` of a problem, whose mask is causal or its bias.
        module: what is imported; None for torch itself.
        masks: kinds of masks.
        features: those that a library may lack and this one has, see `Call`.
        structure: the same of intervals.
        is_deterministic: whether its gradient adds in a fixed order where torch is asked for that.
        only: the architectures that it runs on; None for all devices.
        multiple: of which the head dimension must be.
        is_bottom_right: whether its causal mask lets the last query see the last key, at any lengths.
    """

    run: Run
    module: str | None = None
    masks: frozenset[str] = PLAIN
    features: frozenset[str] = frozenset()
    structure: frozenset[str] = frozenset()
    is_deterministic: bool = True
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
    options: dict[str, Any] = {"softmax_scale": problem.scale, "deterministic": True}
    slopes = problem.alibi_slopes
    if has_slopes and slopes is not None:
        options["alibi_slopes"] = slopes[0] if slopes.shape[0] == 1 else slopes
    if problem.ends and not is_causal:
        runs = sequences_of(problem, module)
        packed = (x.flatten(0, 1) for x in (problem.q, k, v))
        options |= {name: value for name, value in runs._asdict().items() if name != "is_causal"}
        result = _FOUND[module].flash_attn_varlen_func(*packed, causal=runs.is_causal, **options)
    else:
        result = _FOUND[module].flash_attn_func(problem.q, k, v, causal=is_causal, **options)
    # some releases return the log-sum-exp beside it
    return (result[0] if isinstance(result, tuple) else result).view(problem.q.shape)


def _run_flex(problem: Problem, is_causal: bool, *, engine: str) -> Tensor:
    """torch's FlexAttention, compiled, its blocks made of the intervals."""
    (k, v), *_ = problem.segments
    module, mask = _FOUND[FLEX], None
    if problem.ends:
        *lists, sees = blocks_of(problem)
        lengths = problem.q.shape[1], problem.num_keys
        mask = module.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=lengths)
    return _compiled_flex()(
        *(x.transpose(1, 2) for x in (problem.q, k, v)),
        block_mask=mask,
        scale=problem.scale,
        enable_gqa=problem.num_groups > 1,
        kernel_options={"BACKEND": engine},
    ).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(_FOUND[FLEX].flex_attention, dynamic=False)


def _run_cudnn_flex(problem: Problem, is_causal: bool) -> Tensor:
    """Of cuDNN's frontend, which makes a plan of the mask in each call, and waits for the GPU to."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (problem.q, *problem.segments[0]))
    module = _FOUND["cudnn.flex_attention"]
    plan = module.create_mask_plan(endpoints_of(bounded(problem)), q, k, v)
    return module.flex_attn_func(q, k, v, mask_plan=plan, softmax_scale=problem.scale, deterministic=True)


def _run_flashmask(problem: Problem, is_causal: bool) -> Tensor:
    """Of FlashMask's port to torch, whose gradient follows torch.use_deterministic_algorithms."""
    (k, v), *_ = problem.segments
    return _FOUND["flashmask_interface"].flashmask_attention(
        problem.q, k, v, columns_of(bounded(problem)), causal=False, softmax_scale=problem.scale
    )


def _run_xformers(problem: Problem, is_causal: bool) -> Tensor:
    (k, v), *_ = problem.segments
    ops = _FOUND["xformers.ops"]
    bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if is_causal else None
    return ops.memory_efficient_attention(problem.q, k, v, attn_bias=bias, p=0.0, scale=problem.scale)


def _flash_attn(module: str, has_slopes: bool = False, **limits: Any) -> Library:
    run = partial(_run_flash_attn, module=module, has_slopes=has_slopes)
    features = frozenset({"alibi_slopes"} if has_slopes else ())
    # of these the values tell whether they are runs
    return Library(run, module, STRUCTURED, features, frozenset({FALLING, KEYS}), **limits)


FLEX = "torch.nn.attention.flex_attention"
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
    "flex": Library(
        partial(_run_flex, engine="TRITON"),
        FLEX,
        STRUCTURED,
        structure=frozenset({SECOND, KEYS, FALLING}),
        dtypes=SINGLE,
    ),
    "flex_flash": Library(
        partial(_run_flex, engine="FLASH"),
        FLEX,
        STRUCTURED,
        structure=frozenset({SECOND, KEYS, FALLING}),
        is_deterministic=False,
        only=(90, 100),
        max_head_dim=128,
    ),
    "cudnn_flex": Library(
        _run_cudnn_flex,
        "cudnn.flex_attention",
        STRUCTURED,
        structure=frozenset({SECOND, FALLING}),
        only=(90, 100),
        max_head_dim=128,
    ),
    "flashmask": Library(
        _run_flashmask,
        "flashmask_interface",
        STRUCTURED,
        structure=frozenset({KEYS}),
        dtypes=(torch.bfloat16,),
        only=(90,),
    ),
}
