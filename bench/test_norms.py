"""The norm, the clip, EWC and PackNet on the parameters of CLIP ViT-B/16 and on 10,000 small tensors, beside torch's
foreach and the loops of others.

The roofline is a copy of as many bytes as an op has to read and write.
"""

from typing import Any

import pytest
import torch

from bench.case import Case, step, time_case
from bench.ema import sizes
from bench.measure import machine_rates, paired_medians
from bench.norms import OPS
from mmkernels._spec import Cost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ("many", "ViT-B-16")
PAIRS = [(op, contender) for op, (_, contenders) in OPS.items() for contender in contenders]


def case_of(op: str, contender: str, name: str, device: torch.device, copied_per_s: float) -> Case:
    call = OPS[op].contenders[contender](name, device)
    cost = Cost(bytes_moved=OPS[op].element_bytes * sum(sizes(name)))
    return Case(
        group=f"{op} {name}-{len(sizes(name))}x{sum(sizes(name)) / 1e6:.0f}M",
        contender=contender,
        loss=call.run,
        wrt=call.leaves,
        mode="both" if call.leaves else "update",
        floor_s=cost.bytes_moved / copied_per_s,
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=1.0,
    )


@pytest.mark.parametrize(("op", "contender"), PAIRS)
@pytest.mark.parametrize("name", MODELS)
def test_norms(benchmark: Any, device: torch.device, name: str, op: str, contender: str) -> None:
    time_case(benchmark, device, case_of(op, contender, name, device, machine_rates(device)[0]))


@pytest.mark.skipif(DEVICE != "cpu", reason="a claim about CPUs")
@pytest.mark.parametrize("op", OPS)
def test_on_a_clip_on_a_cpu_none_is_slower_than_what_torch_has(op: str) -> None:
    device = torch.device("cpu")
    runs = {who: step(case_of(op, who, "ViT-B-16", device, 1.0)) for who in OPS[op].contenders}
    medians = paired_medians(runs, 15, device)
    best = min(time for who, time in medians.items() if who != "mmkernels")
    print(f"{op}: {medians}: {best / medians['mmkernels']:.2f}x")
    # a twentieth is what the noise of a pair comes to
    assert medians["mmkernels"] <= 1.05 * best
