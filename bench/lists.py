"""What the multi-tensor updates have in common: lists of the contract test, as functions of new tensors, and the
parameters of models, which updates are timed on beside torch's foreach and the loops of others.

The roofline is a copy of as many bytes as an update has to read and write.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.case import Case, step
from bench.harness import CPU, DEVICE, Bench
from bench.measure import machine_rates, paired_medians
from bench.spec import Inputs, OpSpec, Shape
from mmkernels._cost import Cost
from mmkernels.multi_tensor.table import CHUNK

Tensors = tuple[Tensor, ...]


def _elements(shape: Shape) -> list[int]:
    """Of N tensors up to L elements: a whole list, then ever fewer, of which one has none."""
    return [shape["L"] * (i + 1) // shape["N"] for i in range(shape["N"])] + [0]


def normal_of(shape: Shape, seed: int) -> Callable[[], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: [torch.randn(n, generator=generator, dtype=torch.float64) for n in _elements(shape)]


def joined(tensors: Tensors) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _draw(draw: Callable[[int, int], int]) -> Shape:
    return {"N": draw(1, 4), "L": draw(0, 2 * CHUNK)}


SHAPES = ({"N": 1, "L": 1}, {"N": 3, "L": 37}, {"N": 2, "L": CHUNK}, {"N": 3, "L": 2 * CHUNK + 5})


def list_spec(
    name: str, op: Any, ref: Any, inputs: Callable[..., Inputs], cases: tuple[str, ...], backward: tuple[str, ...] = ()
) -> OpSpec:
    return OpSpec(
        name=name,
        op=op,
        ref=ref,
        make_inputs=inputs,
        shapes=SHAPES,
        draw_shape=_draw,
        cases=cases,
        differentiable=backward,
        casts_under_autocast=False,
    )


@cache
def sizes(name: str) -> tuple[int, ...]:
    """Elements of each tensor: of a CLIP, of 10,000 tensors of up to 4,096, or of few large ones."""
    if name == "many":
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randint(1, 4097, (10_000,), generator=generator).tolist())
    if name == "few":
        return (2**24,) * 4
    # not at the top: the kernels' own tests import this module, and need nothing of mmcore
    clip = pytest.importorskip("mmcore.systems.clip.model", exc_type=ImportError)
    shapes = pytest.importorskip("mmcore.systems.clip.shapes", exc_type=ImportError)
    with torch.device("meta"):
        model = clip.CLIP(shapes.CLIP_CONFIGS[name])
    return tuple(p.numel() for p in model.parameters())


def tensors(name: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of a list's sizes, each a repeated draw: to draw all would take longer than to time them."""
    longest = max(sizes(name))
    drawn = torch.randn(min(longest, 1 << 20), device=device, dtype=dtype)
    drawn = drawn.repeat(-(-longest // len(drawn)))
    return [drawn[:n].clone() for n in sizes(name)]


def shape_words(name: str) -> str:
    return f"{name}-{len(sizes(name))}x{sum(sizes(name)) / 1e6:.0f}M"


def update_case(
    group: str, contender: str, run: Callable[[], object], bytes_moved: int, leaves: tuple[Tensor, ...] = ()
) -> Case:
    """Of an update, or of what has leaves with its gradients."""
    cost = Cost(bytes_moved=bytes_moved)
    return Case(
        group=group,
        contender=contender,
        loss=run,
        wrt=leaves,
        mode="both" if leaves else "update",
        floor_s=cost.bytes_moved / machine_rates(DEVICE)[0],
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=1.0,
    )


class Call(NamedTuple):
    """What is timed, and with its gradients if it has leaves."""

    run: Callable[[], object]
    leaves: tuple[Tensor, ...] = ()


Contenders = Mapping[str, Callable[[str, torch.device], Call]]


def normal(name: str, device: torch.device) -> list[Tensor]:
    return [torch.randn(n, device=device) for n in sizes(name)]


def bench_of(op: str, element_bytes: int, contenders: Contenders) -> Bench:
    """Of an op on float32 parameters, which reads and writes so many bytes an element."""

    def case(name: str, contender: str) -> Case:
        call = contenders[contender](name, DEVICE)
        bytes_moved = element_bytes * sum(sizes(name))
        return update_case(f"{op} {shape_words(name)}", contender, call.run, bytes_moved, call.leaves)

    return Bench(op, case, {"name": ("many", "ViT-B-16"), "contender": tuple(contenders)})


def assert_not_slower(op: str, contenders: Contenders) -> None:
    """On a CLIP on a CPU, than what torch has; a twentieth is what the noise of a pair comes to."""
    calls = {who: make("ViT-B-16", CPU) for who, make in contenders.items()}
    runs = {
        who: step(Case(op, who, call.run, call.leaves, "both" if call.leaves else "update", 0.0))
        for who, call in calls.items()
    }
    medians = paired_medians(runs, 15, CPU)
    best = min(time for who, time in medians.items() if who != "mmkernels")
    print(f"{op}: {medians}: {best / medians['mmkernels']:.2f}x")
    assert medians["mmkernels"] <= 1.05 * best
