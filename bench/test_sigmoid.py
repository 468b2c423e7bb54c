"""`mmkernels.sigmoid_loss` at real shapes: times, memory and errors beside eager, compile and siglip-kernel.

"forward" is timed without gradients. There is no "backward" by itself: its work is done in a forward that wants
gradients.
"""

import functools

import pytest
import torch
from torch import Tensor

from bench.case import Case, dtype_id, time_case
from bench.measure import MIB, gemm_flops_per_s, paired_medians, peak_extra_bytes, relative_error
from bench.peers import missing
from bench.sigmoid import contenders, eager, trained
from mmkernels import sigmoid_loss
from mmkernels._spec import Cost, shape_id
from mmkernels.sigmoid.spec import LOSS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = LOSS.bench_shapes[DEVICE]
# a compilation takes up to half a minute
COMPILED = {"cpu": (1024, 4096, 8192), "cuda": (8192, 32768)}[DEVICE]
# eager holds several copies of [B, B]; a GPU says itself what is too much
STORED_LOGITS_LIMIT = 2**34 if DEVICE == "cuda" else 2**27


def gemm_rate(num_rows: int, width: int, device: torch.device) -> float:
    """FLOP/s of one bare product [B, D] x [D, B]."""
    return gemm_flops_per_s(num_rows, num_rows, width, DTYPE, device)


@functools.cache
def gold(num_rows: int, width: int, device: torch.device) -> Tensor:
    """dA in float64 of the same inputs, by the float64 path that the contract test holds to eager."""
    inputs = [x.detach().double().requires_grad_() for x in trained(num_rows, width, DTYPE, device)]
    a, b, scale, bias = inputs
    return torch.autograd.grad(sigmoid_loss(a, b, scale, bias), a)[0]


def skip_reason(size: int, contender: str) -> str | None:
    """Why a case is left out of this machine's run, which is to stay within minutes."""
    if contender == "siglip-kernel" and (reason := missing(contender)):
        return f"{contender} {reason}"
    if contender == "compile" and size not in COMPILED:
        return f"compiled at B = {COMPILED} only: each compilation takes up to half a minute"
    if contender in ("eager", "compile") and size**2 > STORED_LOGITS_LIMIT:
        return f"{contender} would hold several [{size}, {size}] matrices"
    return None


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("contender", ["mmkernels", "eager", "compile", "siglip-kernel"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_sigmoid_loss(benchmark, device, shape, contender, mode):
    size, width = shape["B"], shape["D"]
    if reason := skip_reason(size, contender):
        pytest.skip(reason)
    inputs, loss = trained(size, width, DTYPE, device), contenders()[contender]
    made, scaled = LOSS.cost(shape, inputs[0].element_size())
    cost = made + scaled
    if mode == "forward":
        cost = Cost(made.flops // 3, made.bytes_moved // 2, made.exps)
    rate = gemm_rate(size, width, device)

    def error() -> float:
        da = torch.autograd.grad(loss(*inputs), inputs[0])[0]
        return relative_error(da, gold(size, width, device))

    case = Case(
        group=f"sigmoid_loss {dtype_id(DTYPE)} {shape_id(shape)}",
        contender=contender,
        loss=lambda: loss(*inputs),
        wrt=inputs,
        mode=mode,
        floor_s=cost.flops / rate,
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=rate,
        error=error,
    )
    time_case(benchmark, device, case)


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
def test_sigmoid_loss_on_a_cpu_is_twice_as_fast_as_eager_in_64_mib():
    device = torch.device("cpu")
    inputs = trained(8192, 512, torch.float32, device)
    runs = {
        name: lambda loss=loss: torch.autograd.grad(loss(*inputs), inputs)
        for name, loss in (("ours", sigmoid_loss), ("eager", eager))
    }
    medians = paired_medians(runs, 7, device)
    extra = peak_extra_bytes(runs["ours"], device)
    ratio = medians["eager"] / medians["ours"]
    print(f"eager {medians['eager']:.3f} s, mmkernels {medians['ours']:.3f} s: {ratio:.2f}x; extra {extra} bytes")
    assert ratio >= 2.0
    assert extra is None or extra - sum(x.numel() * 4 for x in inputs) <= 64 * MIB
