"""`mmkernels.attention`: its entries in the contract test, and the layers of published models beside SDPA with the
dense mask, eager, compile and, on a GPU, FlexAttention, flash-attn and xformers.

In the contract every variant asks for our own backend by name. The masks are made from tensors inside the op, so that
the test can move and restride those like any other.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, dtype_id
from bench.cross_attentions import LIBRARIES, WORKLOADS, contenders, operands, seen_cost, seen_share
from bench.harness import CPU, DEVICE, DTYPE, ON_GPU, Bench, Claims, gradient_case, of_shape
from bench.measure import MIB, gemm_flops_per_s, paired_medians, peak_extra_bytes
from bench.spec import Inputs, OpSpec, Shape, Terms, shape_id
from mmkernels._cost import Cost
from mmkernels.attention.op import attention
from mmkernels.attention.reference import QKNorm, attention_ref
from mmkernels.masks import Intervals, Mask, causal, dense, intervals, key_padding

CASES = ("random", "large", "equal")


def _make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Queries, keys and values. random: logits near one. large: near four, so that a few keys hold most of a
    row; beyond, what a stored log-sum-exp loses to rounding, on which every fused backward stands, shows. equal:
    every two keys alike, and values of one sign."""
    generator = torch.Generator().manual_seed(seed)
    batch, num_heads, num_key_heads, width = (shape[axis] for axis in ("B", "H", "Hkv", "K"))

    def normal(length: int, heads: int) -> Tensor:
        return torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64)

    q = normal(shape["Lq"], num_heads)
    k, v = normal(shape["Lk"], num_key_heads), normal(shape["Lk"], num_key_heads)
    if case == "large":
        q = 4 * q
    if case == "equal":
        k, v = k[:, torch.arange(shape["Lk"]) // 2], v.abs()
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}


Extra = Callable[[Shape, torch.dtype, torch.Generator], Inputs]


def _ends(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Two intervals of any size a query, of which each may be empty; they overlap now and then."""
    size = (4, shape["B"], shape["Lq"])
    ends = torch.randint(shape["Lk"] + 1, size, generator=generator, dtype=torch.int32)
    (lo, hi), (lo2, hi2) = ends[:2].sort(0).values, ends[2:].sort(0).values
    empty, empty2 = torch.rand(2, shape["B"], shape["Lq"], generator=generator) < 0.3
    return {"ends": (lo, torch.where(empty, lo, hi), lo2, torch.where(empty2, lo2, hi2))}


def _blocks(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """One interval, the same for runs of queries: images and documents."""
    cut = torch.randint(shape["Lk"] + 1, (shape["B"], 2), generator=generator, dtype=torch.int32)
    (lo, hi), late = cut.sort(1).values.unbind(1), torch.arange(shape["Lq"]) > shape["Lq"] // 3
    return {"ends": (torch.where(late, lo[:, None], 0), torch.where(late, hi[:, None], lo[:, None]))}


def _keys(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Padding: none, one run of it on either side, or any."""
    places = torch.arange(shape["Lk"]) - torch.randint(shape["Lk"] + 1, (shape["B"], 1), generator=generator)
    some = torch.rand(shape["B"], shape["Lk"], generator=generator) < 0.6
    kind = torch.randint(4, (shape["B"], 1), generator=generator)
    return {"keys": ((places < 0) & (kind == 0)) | ((places >= 0) & (kind == 1)) | (some & (kind == 2)) | (kind == 3)}


def _ends_of_keys(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return _ends(shape, dtype, generator) | _keys(shape, dtype, generator)


def _bool(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    seen = torch.rand(shape["B"], 1, shape["Lq"], shape["Lk"], generator=generator) < 0.6
    seen[0, :, 0] = False
    return {"bias": seen}


def _float(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """For every batch the same."""
    size = (1, shape["H"], shape["Lq"], shape["Lk"])
    return {"bias": torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)}


def _slopes(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    powers = torch.randint(1, 9, (shape["B"], shape["H"]), generator=generator)
    return {"alibi_slopes": 0.5**powers}


def _dropout(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    seed = torch.randint(2**62, (), generator=generator)
    return {"dropout_p": 0.3, "seed": seed}


def _gated(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    sizes = {"gate": shape["H"], "q_weight": shape["K"], "k_weight": shape["K"]}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()}


def _segments(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A second pair of keys and values of a third of the length; intervals over both."""
    length = shape["Lk"] // 3
    size = (2, shape["B"], length, shape["Hkv"], shape["K"])
    k2, v2 = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    longer = {**shape, "Lk": shape["Lk"] + length}
    return _blocks(longer, dtype, generator) | {"k2": k2, "v2": v2}


def _call(
    fn: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    ends: tuple[Tensor, ...] = (),
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    is_causal: bool = False,
    backend: str = "mmkernels",
    **options: Any,
) -> Any:
    """`fn` with the mask and the pairs that the tensors stand for."""
    num_keys = k.shape[1] + (0 if k2 is None else k2.shape[1])
    mask: Mask | None = None
    if ends:
        mask = intervals(num_keys, *ends)
    elif bias is not None:
        mask = dense(bias)
    elif is_causal:
        mask = causal(q.shape[1], num_keys, device=q.device)
    if keys is not None and isinstance(mask, Intervals):
        mask &= key_padding(keys, q.shape[1])
    operands = (k, v) if k2 is None else ((k, k2), (v, v2))
    norm = None if q_weight is None or k_weight is None else QKNorm(q_weight, k_weight)
    result = fn(q, *operands, mask=mask, qk_norm=norm, backend=backend, **options)
    if not options.get("return_lse"):
        return result
    out, lse = result
    return out, torch.where(lse == -torch.inf, 0, lse)


def _cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    """Of attention without a mask."""
    batch, num_heads, width = shape["B"], shape["H"], shape["K"]
    weights = batch * num_heads * shape["Lq"] * shape["Lk"]
    of_q, of_k = shape["Lq"] * num_heads, shape["Lk"] * shape["Hkv"]
    moved = 2 * batch * width * (of_q + of_k) * element_size
    return Cost(4 * weights * width, moved, weights), Cost(10 * weights * width, 2 * moved, weights)


def _terms(inputs: Inputs, gold: Mapping[str, Tensor]) -> dict[str, Terms]:
    """dL/dS is `P (dP - dO O)`, from weights `exp(S - lse)`, of which a logit's rounding, relative to its size, is
    the error, and from an output O that has been rounded to be stored."""
    q, k, v = (inputs[name].flatten(0, 2) for name in TENSORS)
    if "k2" in inputs:
        k, v = (torch.cat([x, inputs[name].flatten(0, 2)]) for x, name in ((k, "k2"), (v, "v2")))
    if "q_weight" in inputs:
        q, k = (F.rms_norm(x, x.shape[1:], inputs[f"{n}_weight"], 1e-6) for n, x in (("q", q), ("k", k)))
    scale = q.shape[1] ** -0.5
    of_q, of_k, of_v = (float(x.norm(dim=1).max()) for x in (q, k, v.abs().sqrt()))
    logits = scale * of_q * of_k
    if "alibi_slopes" in inputs:
        logits += float(inputs["alibi_slopes"].max()) * (inputs["q"].shape[1] + inputs["k"].shape[1])
    if "bias" in inputs:
        logits += float(inputs["bias"].double().abs().max())
    upstream = 1.5 / (1 - inputs.get("dropout_p", 0.0))
    # roundings are of either sign, and the largest factors do not meet: a part of what they could come to
    d_logits = (1 + logits) * 2 * upstream * of_v**2 / 32
    # the weights of a key over all queries, at upstream gradients of a half and more
    of_key = 2 * float(gold["d_v"].abs().max())
    # half a unit in the last place, where the bound counts four
    stored = upstream * float(gold["out0"].abs().sum(3).max()) / 8
    of_dq = Terms(scale * of_k * d_logits, scale * of_k * stored)
    of_dk = scale * of_q * of_key
    of_values = {
        x: Terms((1 + logits) * float(gold[x].abs().max())) for x in ("d_v", "d_v2") if x in gold and gold[x].numel()
    }
    return {
        "out1": Terms(1 + logits),
        "d_q": of_dq,
        "d_q_weight": of_dq,
        "d_k": Terms(of_dk * d_logits, of_dk * stored),
        "d_k2": Terms(of_dk * d_logits, of_dk * stored),
        "d_k_weight": Terms(of_dk * d_logits, of_dk * stored),
        **of_values,
        "d_bias": Terms(d_logits, stored),
    }


def _draw(draw: Callable[[int, int], int]) -> Shape:
    num_key_heads = draw(1, 2)
    return {
        "B": draw(1, 2),
        "H": num_key_heads * draw(1, 2),
        "Hkv": num_key_heads,
        "Lq": draw(1, 24),
        "Lk": draw(1, 50),
        "K": draw(1, 40),
    }


SHAPES = (
    {"B": 1, "H": 1, "Hkv": 1, "Lq": 1, "Lk": 1, "K": 1},
    {"B": 2, "H": 1, "Hkv": 1, "Lq": 17, "Lk": 33, "K": 40},
    {"B": 1, "H": 2, "Hkv": 1, "Lq": 33, "Lk": 65, "K": 16},
)
TENSORS = ("q", "k", "v")


def _spec(variant: str, extra: Extra | None, more: tuple[str, ...] = (), **options: Any) -> OpSpec:
    def make_inputs(shape: Shape, case: str, dtype: torch.dtype, seed: int) -> Inputs:
        inputs = _make_inputs(shape, case, dtype, seed) | options
        if extra is not None:
            inputs |= extra(shape, dtype, torch.Generator().manual_seed(1000 + seed))
        return inputs

    return OpSpec(
        name=f"attention{variant}",
        op=partial(_call, attention),
        ref=partial(_call, attention_ref),
        make_inputs=make_inputs,
        shapes=SHAPES,
        draw_shape=_draw,
        cases=CASES,
        differentiable=(*TENSORS, *more),
        terms=_terms,
    )


PLAIN = _spec("", None)
CAUSAL = _spec("[causal]", _slopes, is_causal=True)
INTERVALS = _spec("[intervals]", _ends)
BLOCKS = _spec("[blocks]", _blocks, return_lse=True)
DENSE = _spec("[dense]", _bool)
BIAS = _spec("[bias]", _float, ("bias",))
DROPOUT = _spec("[dropout]", _dropout, is_causal=True)
GATED = _spec("[gated]", _gated, ("gate", "q_weight", "k_weight"))
SEGMENTS = _spec("[segments]", _segments, ("k2", "v2"))
PADDED = _spec("[padded]", _keys, is_causal=True)
UNIFORM = _spec("[uniform]", _ends_of_keys, empty_rows="uniform")
SPECS = (PLAIN, CAUSAL, INTERVALS, BLOCKS, DENSE, BIAS, DROPOUT, GATED, SEGMENTS, PADDED, UNIFORM)


# a CPU's forward is in its forward and backward
MODES = ("forward", "both") if ON_GPU else ("both",)
# a compilation takes up to half a minute, and eager's weights much memory
COMPILED = ("Q-Former", "OpenFlamingo", "SDXL") if ON_GPU else ("Q-Former",)
WEIGHTS_LIMIT = 1 << (32 if ON_GPU else 25)


def _skip_reason(name: str, contender: str, shape: Shape, known: bool) -> str | None:
    num_weights = shape["B"] * shape["H"] * shape["Lq"] * shape["Lk"]
    if not known:
        return f"{contender} does not serve this on this machine"
    if contender == "compile" and name not in COMPILED:
        return f"compiled for {', '.join(COMPILED)} only: each compilation takes up to half a minute"
    if contender in ("eager", "compile") and num_weights > WEIGHTS_LIMIT:
        return f"{contender} would hold several matrices of {num_weights} weights"
    return None


@cache
def _gold(name: str) -> Tensor:
    """dq in float64 of the same inputs, by the float64 path that the contract test holds to the reference."""
    workload = WORKLOADS[name]
    shape = workload.on(DEVICE.type)
    q, k, v = (x.detach().double() for x in operands(shape, DTYPE, DEVICE))
    mask = None if workload.mask is None else workload.mask(shape, DEVICE)
    q.requires_grad_()
    return torch.autograd.grad(attention(q, k, v, mask=mask, backend="mmkernels").sum(), q)[0]


def _case(name: str, contender: str, mode: str) -> Case:
    workload = WORKLOADS[name]
    shape = workload.on(DEVICE.type)
    calls = contenders(workload, shape, DEVICE)
    if reason := _skip_reason(name, contender, shape, contender in calls):
        pytest.skip(reason)
    inputs, call = operands(shape, DTYPE, DEVICE), calls[contender]
    try:
        found = call(*inputs)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as refusal:
        if contender == "mmkernels":
            raise
        pytest.skip(f"{contender} does not serve this: {refusal}")
    assert found.isfinite().all(), "what is timed gives NaN"
    mask = None if workload.mask is None else workload.mask(shape, DEVICE)
    made, scaled = (seen_cost(x, seen_share(shape, mask)) for x in _cost(shape, inputs[0].element_size()))
    return gradient_case(
        f"attention[{name.replace(' ', '_')}] {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: call(*inputs).sum(),
        inputs,
        mode,
        made if mode == "forward" else made + scaled,
        # of no fewer than 2,048 queries and keys: all heads together are as many
        rate=gemm_flops_per_s(max(shape["Lq"], 2048), max(shape["Lk"], 2048), shape["K"], DTYPE, DEVICE),
        # each contender drops other weights
        gold=None if workload.dropout_p > 0 else lambda: _gold(name),
    )


CONTENDERS = ("mmkernels", "sdpa", "eager", "compile", "flex", *LIBRARIES)
AXES = {"name": tuple(WORKLOADS), "contender": CONTENDERS, "mode": MODES}
BENCHES = (Bench("attention", _case, AXES, LIBRARIES, lambda axes: of_shape(WORKLOADS[axes["name"]].on(DEVICE.type))),)


def _paired(name: str, rounds: int, mode: str) -> float:
    """How many times as long as ours SDPA with the dense mask takes, in turns."""
    shape = WORKLOADS[name].on("cpu")
    inputs, calls = operands(shape, DTYPE, CPU), contenders(WORKLOADS[name], shape, CPU)

    def run(call: Any) -> None:
        if mode == "forward":
            with torch.no_grad():
                call(*inputs)
        else:
            torch.autograd.grad(call(*inputs).sum(), inputs)

    medians = paired_medians({who: partial(run, calls[who]) for who in ("mmkernels", "sdpa")}, rounds, CPU)
    ratio = medians["sdpa"] / medians["mmkernels"]
    print(f"{name} {mode}: mmkernels {medians['mmkernels']:.4f} s, SDPA {medians['sdpa']:.4f} s: {ratio:.2f}x")
    return ratio


def _structure_doubles_the_speed(name: str, mode: str) -> None:
    assert _paired(name, 5, mode) >= 2.0


def _dense_is_as_fast_as_sdpa(name: str, mode: str) -> None:
    assert _paired(name, 41, mode) >= 0.97


def _packed_holds_nothing_of_the_size_of_its_mask() -> None:
    workload = WORKLOADS["LLaVA packed"]
    shape = workload.on("cpu")
    inputs, call = operands(shape, DTYPE, CPU), contenders(workload, shape, CPU)["mmkernels"]
    extra = peak_extra_bytes(lambda: torch.autograd.grad(call(*inputs).sum(), inputs), CPU)
    held = sum(x.nbytes for x in inputs)
    print(f"extra {extra} bytes, operands {held}")
    assert extra is None or extra <= 4 * held + 8 * MIB


CLAIMS: Claims = {
    **{
        f"{name}, {mode}: twice as fast as a dense mask": partial(_structure_doubles_the_speed, name, mode)
        for name in ("IDEFICS", "Llama-3.2-Vision", "Llama-3.2-Vision 4 images", "LLaVA packed")
        for mode in ("forward", "both")
    },
    **{
        f"{name}, {mode}: as fast as SDPA": partial(_dense_is_as_fast_as_sdpa, name, mode)
        for name in ("Q-Former", "BLIP", "Llama-3.2-Vision tower", "SDXL", "video resampler")
        for mode in ("forward", "both")
    },
    "packed, it holds nothing of the size of its mask": _packed_holds_nothing_of_the_size_of_its_mask,
}
