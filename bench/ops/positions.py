"""`mmkernels.rotary` and `xpos` on queries and keys of Llama's 1B, beside transformers' and torchscale's expressions.

The roofline is a copy of what has to be read and written, twice for a gradient.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from bench.case import Case, dtype_id
from bench.harness import DEVICE, DTYPE, ON_GPU, Bench
from bench.measure import assert_agrees, machine_rates, relative_error
from mmkernels import rotary, xpos

BATCH, LENGTH, HEADS, KEY_HEADS, WIDTH = (8 if ON_GPU else 1), 2048, 32, 8, 64
THETA, SCALE_BASE = 10000.0, 512.0
Pair = tuple[Tensor, Tensor]


def our_rotary(q: Tensor, k: Tensor, positions: Tensor) -> Pair:
    return rotary(q, positions), rotary(k, positions)


def waves(positions: Tensor, dtype: torch.dtype) -> Pair:
    """transformers' LlamaRotaryEmbedding."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, WIDTH, 2, device=positions.device).to(wide) / WIDTH
    angles = positions[:, None].to(wide) * (1.0 / THETA**exponents)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def llamas(q: Tensor, k: Tensor, positions: Tensor) -> Pair:
    """transformers' `apply_rotary_pos_emb`."""
    cos, sin = (x[:, None] for x in waves(positions, q.dtype))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def our_xpos(q: Tensor, k: Tensor, positions: Tensor) -> Pair:
    return xpos(q, k, positions, positions, scale_base=SCALE_BASE)


def torchscales(q: Tensor, k: Tensor, positions: Tensor) -> Pair:
    """torchscale's XPOS: neighbours turn, and powers are of the distance to the middle."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    at = positions.to(wide)[:, None]
    even = torch.arange(0, WIDTH, 2, device=q.device).to(wide)
    scale = ((even + 0.4 * WIDTH) / (1.4 * WIDTH)) ** ((at - (at[0] + at[-1]) / 2) / SCALE_BASE)
    angles = at * (1.0 / THETA ** (even / WIDTH))

    def turned(x: Tensor, scale: Tensor) -> Tensor:
        cos, sin = ((y * scale).repeat_interleave(2, -1).to(x.dtype)[:, None] for y in (angles.cos(), angles.sin()))
        two_by_two = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos + two_by_two * sin

    return turned(q, scale), turned(k, 1 / scale)


OPS: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Pair]]] = {
    "rotary": {"mmkernels": our_rotary, "eager": llamas},
    "xpos": {"mmkernels": our_xpos, "eager": torchscales},
}
if ON_GPU:  # a compilation takes up to half a minute
    for contenders in OPS.values():
        contenders["compile"] = torch.compile(contenders["eager"], dynamic=False)


@cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k = (
        torch.randn(BATCH, LENGTH, heads, WIDTH, generator=generator, device=DEVICE).to(DTYPE)
        for heads in (HEADS, KEY_HEADS)
    )
    return q.requires_grad_(), k.requires_grad_(), torch.arange(LENGTH, device=DEVICE)


def total(call: Callable[[Tensor, Tensor, Tensor], Pair], q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """A loss with another gradient for each element."""
    found = torch.cat([x.flatten() for x in call(q, k, positions)])
    return found @ torch.linspace(-1, 1, len(found), device=found.device, dtype=found.dtype)


@cache
def gold(op: str) -> Tensor:
    """dq in float64, of the published expression."""
    q, k, positions = inputs()
    q, k = (x.detach().double().requires_grad_() for x in (q, k))
    return torch.autograd.grad(total(OPS[op]["eager"], q, k, positions), q)[0]


def _case(op: str, contender: str, mode: str) -> Case:
    q, k, positions = inputs()
    call = OPS[op][contender]
    (dq,) = torch.autograd.grad(total(call, q, k, positions), q)
    assert_agrees(dq, gold(op))
    moved = 2 * sum(x.numel() * x.element_size() for x in (q, k))
    seeds = [torch.ones_like(x) for x in (q, k)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(q, k, positions), (q, k), seeds)

    return Case(
        group=f"{op} {dtype_id(DTYPE)} B{BATCH}-L{LENGTH}-H{HEADS}-Hkv{KEY_HEADS}-K{WIDTH}",
        contender=contender,
        loss=both if mode == "both" else lambda: call(q, k, positions),
        wrt=(q, k),
        mode="step" if mode == "both" else mode,
        floor_s=(2 if mode == "both" else 1) * moved / machine_rates(DEVICE)[0],
        error=lambda: relative_error(dq, gold(op)),
    )


BENCHES = tuple(Bench(op, partial(_case, op), {"contender": tuple(OPS[op]), "mode": ("forward", "both")}) for op in OPS)
