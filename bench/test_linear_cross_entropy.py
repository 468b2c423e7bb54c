"""`mmkernels.linear_cross_entropy` at heads of real sizes: times, memory and errors beside eager, compile, peers."""

import functools

import pytest
import torch
from torch import Tensor

from bench.case import MODES, Case, dtype_id, time_case
from bench.linear_cross_entropy import PEERS, contenders, eager, head
from bench.measure import MIB, gemm_flops_per_s, paired_medians, peak_extra_bytes, relative_error
from bench.peers import missing
from mmkernels import linear_cross_entropy
from mmkernels._spec import shape_id
from mmkernels.linear_cross_entropy.spec import PLAIN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = PLAIN.bench_shapes[DEVICE]
GOLD_LOGITS = 2**29  # float64 is slow on a GPU


def gemm_rate(num_rows: int, vocab: int, width: int, device: torch.device) -> float:
    """FLOP/s of one bare product [T, D] x [D, V]."""
    return gemm_flops_per_s(num_rows, vocab, width, DTYPE, device)


@functools.cache
def gold(num_rows: int, width: int, vocab: int, ignored: int, device: torch.device) -> Tensor:
    """dhidden in float64 of the same inputs, by the float64 path that the contract test holds to eager."""
    *leaves, targets = head(num_rows, width, vocab, ignored, DTYPE, device)
    hidden, weight = (x.detach().double() for x in leaves)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    return torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", ["mmkernels", "eager", "compile", *PEERS])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_linear_cross_entropy(benchmark, device, shape, contender, mode):
    if contender in PEERS and (reason := missing(contender)):
        pytest.skip(f"{contender} {reason}")
    loss = contenders()[contender]
    if mode == "backward" and contender in ("mmkernels", "liger"):
        pytest.skip(f"{contender} makes its gradients in forward: both is what compares")
    num_rows, width, vocab, ignored = shape["T"], shape["D"], shape["V"], shape["ignored"]
    hidden, weight, targets = head(num_rows, width, vocab, ignored, DTYPE, device)
    forward, backward = PLAIN.cost(shape, hidden.element_size())
    cost = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    rate = gemm_rate(num_rows, vocab, width, device)

    def error() -> float:
        dh = torch.autograd.grad(loss(hidden, weight, targets), hidden)[0]
        return relative_error(dh, gold(num_rows, width, vocab, ignored, device))

    case = Case(
        group=f"linear_cross_entropy {dtype_id(DTYPE)} {shape_id(shape)}",
        contender=contender,
        loss=lambda: loss(hidden, weight, targets),
        wrt=(hidden, weight),
        mode=mode,
        floor_s=cost.flops / rate,
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=rate,
        error=error if num_rows * vocab <= GOLD_LOGITS else None,
    )
    time_case(benchmark, device, case)


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
@pytest.mark.parametrize(("ignored", "speedup"), [(0, 1.5), (50, 2.5)])
def test_on_a_cpu_it_is_faster_than_eager_in_80_mib_beside_the_gradients(ignored, speedup):
    device = torch.device("cpu")
    hidden, weight, targets = head(1024, 512, 32000, ignored, torch.float32, device)
    runs = {
        name: lambda loss=loss: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
        for name, loss in (("ours", linear_cross_entropy), ("eager", eager))
    }
    medians = paired_medians(runs, 5, device)
    extra = peak_extra_bytes(runs["ours"], device)
    ratio = medians["eager"] / medians["ours"]
    print(f"eager {medians['eager']:.3f} s, mmkernels {medians['ours']:.3f} s: {ratio:.2f}x; extra {extra} bytes")
    assert ratio >= speedup
    # 64 MiB of logits beside the gradients
    assert extra is None or extra - 4 * (hidden.numel() + weight.numel()) <= 80 * MIB
