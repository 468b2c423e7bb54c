"""`mmkernels.contrastive_loss` at real shapes: times, memory and errors beside eager, open_clip's form and compile."""

import functools
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.contrastive import Loss, contenders, eager, features
from bench.measure import MIB, gemm_flops_per_s, paired_medians, peak_extra_bytes, relative_error, synchronize
from mmkernels import contrastive_loss
from mmkernels._spec import shape_id
from mmkernels.contrastive.spec import LOSS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cuda" else (torch.float32,)
SHAPES = LOSS.bench_shapes[DEVICE]
COMPILED = {"cpu": (1024, 8192), "cuda": (8192, 32768)}[DEVICE]  # a compilation takes up to half a minute
FULL_PRECISION_ON_CUDA = (8192, 768)
STORED_LOGITS_LIMIT = 2**32 if DEVICE == "cuda" else 2**27  # eager holds several copies of [B, B]
MODES = ("forward", "backward", "both")
BUDGET_S = {"cpu": 1.5, "cuda": 0.3}[DEVICE]


@functools.cache
def roofline_s(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one bare product [B, D] x [D, B]."""
    return 2 * num_rows**2 * width / gemm_flops_per_s(num_rows, num_rows, width, dtype, device)


@functools.cache
def gold(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """dA in float64 of the same inputs, by the float64 path that the contract test holds to eager."""
    a, b, scale = (x.detach().double().requires_grad_() for x in features(num_rows, width, dtype, device))
    return torch.autograd.grad(contrastive_loss(a, b, scale), a)[0]


def steps(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], mode: str) -> Callable[[], object]:
    """The timed call of a mode; "backward" reuses one graph."""
    if mode == "forward":
        return torch.no_grad()(lambda: loss(*inputs))
    if mode == "both":
        return lambda: torch.autograd.grad(loss(*inputs), inputs)
    value = loss(*inputs)
    return lambda: torch.autograd.grad(value, inputs, retain_graph=True)


def skip_reason(size: int, width: int, contender: str, dtype: torch.dtype) -> str | None:
    """Why a case is left out of this machine's run, which is to stay within minutes."""
    if contender == "compile" and (size not in COMPILED or (DEVICE == "cuda" and width != 768)):
        return f"compiled at B = {COMPILED} only: each compilation takes up to half a minute"
    if contender != "mmkernels" and size**2 > STORED_LOGITS_LIMIT:
        return f"{contender} would hold several [{size}, {size}] matrices"
    if DEVICE == "cuda" and dtype == torch.float32 and (size, width) != FULL_PRECISION_ON_CUDA:
        return f"float32 is timed at (B, D) = {FULL_PRECISION_ON_CUDA} only on a GPU"
    return None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("contender", ["mmkernels", "eager", "open_clip", "compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_contrastive_loss(benchmark, device, shape, contender, dtype, mode):
    size, width = shape["B"], shape["D"]
    if reason := skip_reason(size, width, contender, dtype):
        pytest.skip(reason)
    inputs = features(size, width, dtype, device)
    step = steps(contenders()[contender], inputs, mode)

    def timed() -> None:
        step()
        synchronize(device)

    timed()
    began = time.perf_counter()
    timed()
    rounds = max(5, min(50, int(BUDGET_S / (time.perf_counter() - began + 1e-6))))
    benchmark.group = f"contrastive_loss {str(dtype).removeprefix('torch.')} {shape_id(shape)} {mode}"
    benchmark.pedantic(timed, rounds=rounds, iterations=1)
    if not benchmark.enabled:
        return
    times = torch.tensor(benchmark.stats.stats.data)
    products = {"forward": 1, "backward": 3, "both": 4}[mode]
    info = {
        "contender": contender,
        "p20_s": float(times.quantile(0.2)),
        "p80_s": float(times.quantile(0.8)),
        "roofline_share": products * roofline_s(size, width, dtype, device) / float(times.median()),
    }
    if mode == "both":
        gradients = sum(x.numel() * x.element_size() for x in inputs)
        extra = peak_extra_bytes(timed, device)
        info["extra_bytes"] = None if extra is None else max(0, extra - gradients)
        da = torch.autograd.grad(contenders()[contender](*inputs), inputs[0])[0]
        info["error_da"] = relative_error(da, gold(size, width, dtype, device))
    benchmark.extra_info.update(info)


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
def test_contrastive_loss_on_a_cpu_is_twice_as_fast_as_eager_in_64_mib():
    device = torch.device("cpu")
    inputs = features(8192, 512, torch.float32, device)
    runs = {
        name: steps(loss, inputs, "both") for name, loss in (("ours", contrastive_loss), ("eager", eager))
    }
    medians = paired_medians(runs, 7, device)
    extra = peak_extra_bytes(runs["ours"], device)
    ratio = medians["eager"] / medians["ours"]
    print(
        f"eager {medians['eager']:.3f} s, mmkernels {medians['ours']:.3f} s: {ratio:.2f}x; extra {extra} bytes"
    )
    assert ratio >= 2.0
    assert extra is None or extra - sum(x.numel() * 4 for x in inputs) <= 64 * MIB
