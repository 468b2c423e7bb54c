"""A training step of CLIP ViT-B/32, from pixels and tokens to stepped and averaged weights, beside transformers' and
open_clip's models with torch's AdamW and an average of the weights: the same weights, batch and loss. Ours computes of
a caption what comes before its end token, on which nothing else depends; they compute the padding too."""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.case import Case, time_case
from bench.clip_step import CONTENDERS, UPDATE_BYTES, batch, clip, step_flops
from bench.lists import sizes
from bench.measure import gemm_flops_per_s, machine_rates, paired_medians
from bench.peers import missing
from mmcore.systems.clip.model import CLIPConfig
from mmcore.systems.clip.shapes import CLIP_CONFIGS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
# a rank's batch on a GPU; seconds a step on two cores
SIZE = 256 if DEVICE.type == "cuda" else 4
CONFIG = CLIP_CONFIGS["ViT-B-32"]


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """The last contender's weights, moments and averages are gone before the next one's are made."""
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def skip_reason(contender: str) -> str | None:
    peer = contender.split()[0].rstrip(",")
    if peer in ("open_clip", "transformers") and (reason := missing(peer)):
        return f"{peer} {reason}"
    if "compiled" in contender and DEVICE.type == "cpu":
        return "compiled on GPUs only: two towers take minutes of two cores"
    return None


def step(contender: str, config: CLIPConfig = CONFIG, size: int = SIZE) -> Callable[[], Tensor]:
    return functools.partial(CONTENDERS[contender](clip(config), DEVICE), *batch(size, config, DEVICE))


@pytest.mark.parametrize("contender", CONTENDERS)
def test_clip_step(benchmark: Any, device: torch.device, contender: str) -> None:
    if reason := skip_reason(contender):
        pytest.skip(reason)
    lengths = batch(SIZE, CONFIG, torch.device("cpu"))[2]
    products = step_flops(CONFIG, lengths) / gemm_flops_per_s(2048, 768, 3072, DTYPE, device)
    params = sum(sizes("ViT-B-32"))
    case = Case(
        group=f"clip ViT-B-32-B{SIZE}",
        contender=contender,
        loss=step(contender),
        wrt=(),
        mode="step",
        floor_s=products + UPDATE_BYTES * params / machine_rates(device)[0],
    )
    time_case(benchmark, device, case)


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "mmcore"])
def test_all_compute_the_same_losses(contender: str) -> None:
    """At the first step, and at the third: so of the same gradients, moments and steps; in a small CLIP."""
    if reason := skip_reason(contender):
        pytest.skip(reason)
    runs = [step(name, CLIP_CONFIGS["tiny"], 6) for name in ("mmcore", contender)]
    for _ in range(3):
        ours, theirs = (run().item() for run in runs)
        assert ours == pytest.approx(theirs, rel=2e-2 if DEVICE.type == "cuda" else 1e-4)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a claim about CPUs")
def test_a_step_is_ahead_of_the_best_eager_one_on_a_cpu() -> None:
    runs = {name: step(name) for name in ("mmcore", "transformers, AdamW(fused), EMA by foreach")}
    first = {name: run().item() for name, run in runs.items()}
    assert max(first.values()) == pytest.approx(min(first.values()), rel=1e-4), first
    medians = paired_medians(runs, 3, DEVICE)
    ratio = min(s for name, s in medians.items() if name != "mmcore") / medians["mmcore"]
    print(f"CLIP ViT-B/32 step, {SIZE} pairs: {medians}: {ratio:.2f}x")
    assert ratio >= 1.2
