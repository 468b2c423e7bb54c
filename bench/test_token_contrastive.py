"""`mmkernels.token_contrastive_loss` at BLIP-2's shapes: times, memory, errors beside two eager forms and compile."""

import functools

import pytest
import torch
from torch import Tensor

from bench.case import MODES, Case, dtype_id, time_case
from bench.measure import MIB, gemm_flops_per_s, paired_medians, peak_extra_bytes, relative_error
from bench.token_contrastive import contenders, eager, features, ours
from bench.token_contrastive import cost as cost_of
from mmkernels._spec import shape_id
from mmkernels.token_contrastive.spec import LOSS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cuda" else (torch.float32,)
SHAPES = LOSS.bench_shapes[DEVICE]
COMPILED = {"cpu": (256, 512), "cuda": (4096,)}[DEVICE]  # a compilation takes up to half a minute
# products that an eager form may store; LAVIS's form multiplies matrices by vectors, on a CPU for seconds
STORED_LIMIT = {"cpu": 2**27, "cuda": 2**31}[DEVICE]
LAVIS_LIMIT = {"cpu": 2**18, "cuda": 2**29}[DEVICE]

Sizes = tuple[int, int, int, int]


def gemm_rate(shape: Sizes, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one bare product [M * Q, D] x [D, N]."""
    num_rows, num_tokens, num_cols, width = shape
    return gemm_flops_per_s(num_rows * num_tokens, num_cols, width, dtype, device)


@functools.cache
def gold(shape: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tokens' gradient in float64 of the same inputs, by the float64 path that the contract test holds to
    eager."""
    inputs = [x.detach().double().requires_grad_() for x in features(shape, dtype, device)]
    return torch.autograd.grad(ours(*inputs), inputs[0])[0]


def skip_reason(shape: Sizes, contender: str, dtype: torch.dtype) -> str | None:
    """Why a case is left out of this machine's run, which is to stay within minutes."""
    num_rows, num_tokens, num_cols, _ = shape
    products = num_rows * num_tokens * num_cols
    if contender == "compile" and num_rows not in COMPILED:
        return f"compiled at M = {COMPILED} only: each compilation takes up to half a minute"
    if contender != "mmkernels" and products > STORED_LIMIT:
        return f"{contender} would hold several times {products} products"
    if contender == "lavis" and products > LAVIS_LIMIT:
        return f"{products} products by LAVIS's form would take minutes, or more memory than there is"
    if DEVICE == "cuda" and dtype == torch.float32 and num_rows != 1024:
        return "float32 is timed at M = 1024 only on a GPU"
    return None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("contender", ["mmkernels", "eager", "lavis", "compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_token_contrastive_loss(benchmark, device, shape, contender, dtype, mode):
    sizes = tuple(shape[axis] for axis in "MQND")
    if reason := skip_reason(sizes, contender, dtype):
        pytest.skip(reason)
    inputs, loss = features(sizes, dtype, device), contenders()[contender]
    forward, backward = cost_of(shape, inputs[0])
    cost = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    rate = gemm_rate(sizes, dtype, device)

    def error() -> float:
        dtokens = torch.autograd.grad(loss(*inputs), inputs[0])[0]
        return relative_error(dtokens, gold(sizes, dtype, device))

    case = Case(
        group=f"token_contrastive_loss {dtype_id(dtype)} {shape_id(shape)}",
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
def test_token_contrastive_loss_on_a_cpu_is_twice_as_fast_as_eager_in_64_mib():
    device = torch.device("cpu")
    inputs = features((1024, 32, 1024, 256), torch.float32, device)
    runs = {
        name: lambda loss=loss: torch.autograd.grad(loss(*inputs), inputs)
        for name, loss in (("ours", ours), ("eager", eager))
    }
    medians = paired_medians(runs, 7, device)
    extra = peak_extra_bytes(runs["ours"], device)
    ratio = medians["eager"] / medians["ours"]
    print(f"eager {medians['eager']:.3f} s, mmkernels {medians['ours']:.3f} s: {ratio:.2f}x; extra {extra} bytes")
    assert ratio >= 2.0
    assert extra is None or extra - sum(x.numel() * 4 for x in inputs) <= 64 * MIB
