"""Forward and backward of the layers of `mmcore.nn`, with gradients of inputs and weights, beside torch's and
transformers' own and a compiled one.

The roofline is the layer's bare products, those of attention without regard to its mask.
"""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.case import Case, dtype_id, time_case
from bench.layers import LAYERS, Contender
from bench.measure import assert_agrees, gemm_flops_per_s, relative_error
from bench.peers import missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# a CPU's forward is in its forward and backward, and a compilation takes up to half a minute
MODES = ("both",) if DEVICE == "cpu" else ("forward", "both")
COMPILED = ("CrossAttention",) if DEVICE == "cpu" else ("CrossAttention", "QFormerBlock")
# where torch has no such layer, or another way of ours is timed too
OTHERS = {
    "PerceiverResampler": ("transformers",),
    "QFormerBlock": ("transformers",),
    # on a CPU ours is layer by layer
    "shared_keys_values": ("eager",) if DEVICE == "cpu" else ("mmcore, layer by layer", "eager"),
}
PAIRS = [
    (name, contender)
    for name in LAYERS
    for contender in ("mmcore", *OTHERS.get(name, ("eager",)), *(("compile",) if name in COMPILED else ()))
]


def _attention_flops(products: int, *shapes: Any) -> int:
    q, k, _, k2 = shapes[:4]
    num_keys = k[1] + (k2[1] if k2 else 0)
    return 2 * products * max(q[0], k[0]) * q[1] * q[2] * q[3] * num_keys


ATTENTION_FLOPS = {
    torch.ops.mmkernels.attention_fwd: lambda *shapes, **_: _attention_flops(2, *shapes),
    torch.ops.mmkernels.attention_bwd: lambda *shapes, **_: _attention_flops(5, *shapes),
}


@functools.cache
def layer(name: str) -> tuple[tuple[Tensor, ...], dict[str, Contender]]:
    """Leaves, and who is timed."""
    make, on_cpu, on_gpu = LAYERS[name]
    torch.manual_seed(0)
    made = make(on_gpu if DEVICE == "cuda" else on_cpu)
    inputs = tuple(x.to(DEVICE, DTYPE).requires_grad_() for x in made.inputs)
    contenders = {who: found._replace(module=found.module.to(DEVICE, DTYPE)) for who, found in made.contenders.items()}
    if name in COMPILED and (other := contenders.get(OTHERS.get(name, ("eager",))[-1])):
        contenders["compile"] = other._replace(call=torch.compile(other.call, dynamic=False))
    return inputs, contenders


@functools.cache
def upstream(size: int, dtype: torch.dtype) -> Tensor:
    """Without a mean or a slope, of which a LayerNorm would leave little more than rounding."""
    return torch.arange(size, dtype=torch.float64, device=DEVICE).cos().to(dtype)


def total(found: Contender, inputs: tuple[Tensor, ...]) -> Tensor:
    """A loss with another gradient for each element."""
    out = found.call(found.module, *inputs)
    return out.flatten() @ upstream(out.numel(), out.dtype)


@functools.cache
def gold(name: str) -> tuple[Tensor, int]:
    """The first input's gradient by ours in float64, which its tests hold to the published formula; FLOP of it all."""
    inputs, contenders = layer(name)
    ours = contenders["mmcore"]
    wide = ours._replace(module=copy.deepcopy(ours.module).double())
    leaves = tuple(x.detach().double().requires_grad_() for x in inputs)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        total(wide, leaves).backward()
    assert leaves[0].grad is not None
    return leaves[0].grad, counter.get_total_flops()


def gemm_rate() -> float:
    return gemm_flops_per_s(2048, 768, 768, DTYPE, torch.device(DEVICE))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "contender"), PAIRS)
def test_layers(benchmark: Any, device: torch.device, name: str, contender: str, mode: str) -> None:
    inputs, contenders = layer(name)
    if contender not in contenders:
        pytest.skip(f"transformers {missing('transformers')}")
    found = contenders[contender]
    wrt = (*inputs, *(p for p in found.module.parameters() if p.requires_grad))
    (dx,) = torch.autograd.grad(total(found, inputs), inputs[:1])
    expected, flops = gold(name)
    assert_agrees(dx, expected)
    case = Case(
        group=f"{name} {dtype_id(DTYPE)} {'-'.join('x'.join(map(str, x.shape)) for x in inputs)}",
        contender=contender,
        loss=lambda: total(found, inputs),
        wrt=wrt,
        mode=mode,
        floor_s=flops / (3 if mode == "forward" else 1) / gemm_rate(),
        error=lambda: relative_error(dx, expected),
    )
    time_case(benchmark, device, case)
