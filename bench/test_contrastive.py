"""`mmkernels.contrastive_loss` at real shapes: times, memory and errors beside eager, open_clip's form and compile."""

import functools

import pytest
import torch
from torch import Tensor

from bench.case import MODES, Case, dtype_id, time_case
from bench.contrastive import PEERS, contenders, eager, features
from bench.contrastive import cost as cost_of
from bench.measure import MIB, gemm_flops_per_s, paired_medians, peak_extra_bytes, relative_error
from bench.peers import missing
from mmkernels import contrastive_loss
from mmkernels._spec import shape_id
from mmkernels.contrastive.spec import LOSS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cuda" else (torch.float32,)
SHAPES = LOSS.bench_shapes[DEVICE]
# a compilation takes up to half a minute
COMPILED = {"cpu": (1024, 4096, 8192), "cuda": (8192, 32768)}[DEVICE]
FULL_PRECISION_ON_CUDA = (8192, 768)
# eager holds several copies of [B, B]; a GPU says itself what is too much
STORED_LOGITS_LIMIT = 2**34 if DEVICE == "cuda" else 2**27


def gemm_rate(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one bare product [B, D] x [D, B]."""
    return gemm_flops_per_s(num_rows, num_rows, width, dtype, device)


@functools.cache
def gold(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """dA in float64 of the same inputs, by the float64 path that the contract test holds to eager."""
    a, b, scale = (x.detach().double().requires_grad_() for x in features(num_rows, width, dtype, device))
    return torch.autograd.grad(contrastive_loss(a, b, scale), a)[0]


def skip_reason(size: int, width: int, contender: str, dtype: torch.dtype) -> str | None:
    """Why a case is left out of this machine's run, which is to stay within minutes."""
    if contender in PEERS and (reason := missing(contender)):
        return f"{contender} {reason}"
    if contender == "compile" and (size not in COMPILED or (DEVICE == "cuda" and width != 768)):
        return f"compiled at B = {COMPILED} only: each compilation takes up to half a minute"
    if contender != "mmkernels" and size**2 > STORED_LOGITS_LIMIT:
        return f"{contender} would hold several [{size}, {size}] matrices"
    if DEVICE == "cuda" and dtype == torch.float32 and (size, width) != FULL_PRECISION_ON_CUDA:
        return f"float32 is timed at (B, D) = {FULL_PRECISION_ON_CUDA} only on a GPU"
    return None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("contender", ["mmkernels", "eager", "open_clip", "compile", *PEERS])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_contrastive_loss(benchmark, device, shape, contender, dtype, mode):
    size, width = shape["B"], shape["D"]
    if reason := skip_reason(size, width, contender, dtype):
        pytest.skip(reason)
    inputs, loss = features(size, width, dtype, device), contenders()[contender]
    forward, backward = cost_of(inputs[0], size)
    cost = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    rate = gemm_rate(size, width, dtype, device)

    def error() -> float:
        da = torch.autograd.grad(loss(*inputs), inputs[0])[0]
        return relative_error(da, gold(size, width, dtype, device))

    case = Case(
        group=f"contrastive_loss {dtype_id(dtype)} {shape_id(shape)}",
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
def test_contrastive_loss_on_a_cpu_is_well_ahead_of_eager_in_64_mib():
    device = torch.device("cpu")
    inputs = features(8192, 512, torch.float32, device)
    runs = {
        name: lambda loss=loss: torch.autograd.grad(loss(*inputs), inputs)
        for name, loss in (("ours", contrastive_loss), ("eager", eager))
    }
    medians = paired_medians(runs, 7, device)
    extra = peak_extra_bytes(runs["ours"], device)
    ratio = medians["eager"] / medians["ours"]
    print(f"eager {medians['eager']:.3f} s, mmkernels {medians['ours']:.3f} s: {ratio:.2f}x; extra {extra} bytes")
    assert ratio >= 1.6
    assert extra is None or extra - sum(x.numel() * 4 for x in inputs) <= 64 * MIB
