"""`mmkernels.ema_update_` on the parameters of published models, beside foreach and the loops of others.

The roofline is a copy of as many bytes: in float32 12 a parameter, and as many from bfloat16 parameters into float32
averages with bfloat16 copies.
"""

import functools
from typing import Any

import pytest
import torch

from bench.case import Case, time_case
from bench.ema import CONTENDERS, lists, sizes, timm
from bench.measure import machine_rates, paired_medians
from bench.peers import missing
from mmkernels._spec import Cost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ("many", "few", "ViT-B-16", "ViT-L-14") if DEVICE == "cuda" else ("many", "few", "ViT-B-32")
BYTES = 12


@pytest.mark.parametrize("contender", [*CONTENDERS, "timm"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_ema_update(benchmark: Any, device: torch.device, name: str, kind: str, contender: str) -> None:
    if contender == "timm" and (reason := missing("timm")):
        pytest.skip(f"timm {reason}")
    if contender == "timm" and kind != "fp32":
        pytest.skip("timm keeps no copies in another dtype")
    tensors = lists(name, kind, device)
    call = timm(tensors[1]) if contender == "timm" else functools.partial(CONTENDERS[contender], *tensors)
    cost = Cost(bytes_moved=BYTES * sum(sizes(name)))
    case = Case(
        group=f"ema_update_ {kind} {name}-{len(tensors[0])}x{sum(sizes(name)) / 1e6:.0f}M",
        contender=contender,
        loss=call,
        wrt=(),
        mode="update",
        floor_s=cost.bytes_moved / machine_rates(device)[0],
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=1.0,
    )
    time_case(benchmark, device, case)


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
@pytest.mark.parametrize(("kind", "least"), [("fp32", 0.95), ("bf16", 1.5)])
def test_ema_update_of_a_clip_on_a_cpu_is_level_with_foreach_and_ahead_in_mixed_dtypes(kind: str, least: float) -> None:
    """And moves its 12 bytes a parameter at 85 % of a copy's rate, or more."""
    device, count = torch.device("cpu"), sum(sizes("ViT-B-32"))
    tensors, (source, target) = lists("ViT-B-32", kind, device), torch.randn(2, count).unbind()
    runs = {who: functools.partial(CONTENDERS[who], *tensors) for who in ("mmkernels", "foreach_lerp")}
    medians = paired_medians(runs | {"copy": lambda: target.copy_(source)}, 15, device)
    ratio = medians["foreach_lerp"] / medians["mmkernels"]
    share = BYTES / 8 * medians["copy"] / medians["mmkernels"]
    print(f"ViT-B-32 {kind}: {medians}: {ratio:.2f}x, {100 * share:.0f} % of a copy's rate")
    assert ratio >= least and share >= 0.85


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
def test_ema_update_of_many_small_tensors_is_five_times_as_fast_as_the_loop() -> None:
    device = torch.device("cpu")
    tensors = lists("many", "fp32", device)
    runs = {who: functools.partial(CONTENDERS[who], *tensors) for who in ("mmkernels", "loop")}
    medians = paired_medians(runs, 15, device)
    ratio = medians["loop"] / medians["mmkernels"]
    print(f"10,000 small tensors: {medians}: {ratio:.2f}x")
    assert ratio >= 5
