"""`mmkernels.attention` on the layers of published models: times, memory and errors beside SDPA with the dense mask,
eager, compile and, on a GPU, FlexAttention, flash-attn and xformers."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.attention import LIBRARIES, WORKLOADS, contenders, operands, seen_cost, seen_share
from bench.case import Case, dtype_id, time_case
from bench.measure import MIB, gemm_flops_per_s, paired_medians, peak_extra_bytes, relative_error
from bench.peers import missing
from mmkernels import attention
from mmkernels._spec import Shape, shape_id
from mmkernels.attention.spec import PLAIN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# a CPU's forward is in its forward and backward
MODES = ("both",) if DEVICE == "cpu" else ("forward", "both")
# a compilation takes up to half a minute, and eager's weights much memory
COMPILED = ("Q-Former",) if DEVICE == "cpu" else ("Q-Former", "OpenFlamingo", "SDXL")
WEIGHTS_LIMIT = 1 << (25 if DEVICE == "cpu" else 32)


def skip_reason(name: str, contender: str, shape: Shape, known: bool) -> str | None:
    if contender in LIBRARIES and (reason := missing(contender)):
        return f"{contender} {reason}"
    if not known:
        return f"{contender} does not serve this on this machine"
    if contender == "compile" and name not in COMPILED:
        return f"compiled for {', '.join(COMPILED)} only: each compilation takes up to half a minute"
    if contender in ("eager", "compile") and weights(shape) > WEIGHTS_LIMIT:
        return f"{contender} would hold several matrices of {weights(shape)} weights"
    return None


def weights(shape: Shape) -> int:
    return shape["B"] * shape["H"] * shape["Lq"] * shape["Lk"]


def gemm_rate(num_queries: int, num_keys: int, width: int, device: torch.device) -> float:
    """FLOP/s of one bare product [Lq, K] x [K, Lk], and of no fewer than 2,048 queries and keys: all heads together
    are as many."""
    return gemm_flops_per_s(max(num_queries, 2048), max(num_keys, 2048), width, DTYPE, device)


@functools.cache
def gold(name: str, device: torch.device) -> Tensor:
    """dq in float64 of the same inputs, by the float64 path that the contract test holds to the reference."""
    workload = WORKLOADS[name]
    shape = workload.on(device.type)
    q, k, v = (x.detach().double() for x in operands(shape, DTYPE, device))
    mask = None if workload.mask is None else workload.mask(shape, device)
    q.requires_grad_()
    return torch.autograd.grad(attention(q, k, v, mask=mask, backend="mmkernels").sum(), q)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", ["mmkernels", "sdpa", "eager", "compile", "flex", *LIBRARIES])
@pytest.mark.parametrize("name", WORKLOADS)
def test_attention(benchmark: Any, device: torch.device, name: str, contender: str, mode: str) -> None:
    workload = WORKLOADS[name]
    shape = workload.on(device.type)
    calls = contenders(workload, shape, device)
    if reason := skip_reason(name, contender, shape, contender in calls):
        pytest.skip(reason)
    inputs, call = operands(shape, DTYPE, device), calls[contender]
    try:
        found = call(*inputs)
    except RuntimeError as refusal:
        if contender == "mmkernels":
            raise
        pytest.skip(f"{contender} does not serve this: {refusal}")
    assert found.isfinite().all(), "what is timed gives NaN"
    mask = None if workload.mask is None else workload.mask(shape, device)
    made, scaled = (seen_cost(x, seen_share(shape, mask)) for x in PLAIN.cost(shape, inputs[0].element_size()))
    cost = made if mode == "forward" else made + scaled
    rate = gemm_rate(shape["Lq"], shape["Lk"], shape["K"], device)

    def error() -> float:
        return relative_error(torch.autograd.grad(call(*inputs).sum(), inputs[0])[0], gold(name, device))

    case = Case(
        group=f"attention[{name.replace(' ', '_')}] {dtype_id(DTYPE)} {shape_id(shape)}",
        contender=contender,
        loss=lambda: call(*inputs).sum(),
        wrt=inputs,
        mode=mode,
        floor_s=cost.flops / rate,
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=rate,
        error=None if workload.dropout_p > 0 else error,  # each contender drops other weights
    )
    time_case(benchmark, device, case)


def paired(name: str, rounds: int, mode: str) -> tuple[float, float]:
    """Median seconds of ours and of SDPA with the dense mask, in turns."""
    device = torch.device("cpu")
    shape = WORKLOADS[name].on("cpu")
    inputs, calls = operands(shape, DTYPE, device), contenders(WORKLOADS[name], shape, device)

    def run(call: Any) -> None:
        if mode == "forward":
            with torch.no_grad():
                call(*inputs)
        else:
            torch.autograd.grad(call(*inputs).sum(), inputs)

    runs = {who: functools.partial(run, calls[who]) for who in ("mmkernels", "sdpa")}
    medians = paired_medians(runs, rounds, device)
    ratio = medians["sdpa"] / medians["mmkernels"]
    print(f"{name} {mode}: mmkernels {medians['mmkernels']:.4f} s, SDPA {medians['sdpa']:.4f} s: {ratio:.2f}x")
    return medians["mmkernels"], medians["sdpa"]


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("name", ["IDEFICS", "Llama-3.2-Vision", "Llama-3.2-Vision 4 images", "LLaVA packed"])
def test_structure_makes_attention_on_a_cpu_twice_as_fast_as_a_dense_mask(name: str, mode: str) -> None:
    ours, dense = paired(name, 5, mode)
    assert dense / ours >= 2.0


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("name", ["Q-Former", "BLIP", "Llama-3.2-Vision tower", "SDXL", "video resampler"])
def test_dense_attention_on_a_cpu_is_within_five_percent_of_sdpa(name: str, mode: str) -> None:
    ours, dense = paired(name, 41, mode)
    assert ours / dense <= 1.05


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
def test_packed_attention_on_a_cpu_holds_nothing_of_the_size_of_its_mask() -> None:
    device = torch.device("cpu")
    workload = WORKLOADS["LLaVA packed"]
    shape = workload.on("cpu")
    inputs, call = operands(shape, DTYPE, device), contenders(workload, shape, device)["mmkernels"]
    extra = peak_extra_bytes(lambda: torch.autograd.grad(call(*inputs).sum(), inputs), device)
    held = sum(x.numel() * x.element_size() for x in inputs)
    print(f"extra {extra} bytes, operands {held}")
    assert extra is None or extra <= 4 * held + 8 * MIB
