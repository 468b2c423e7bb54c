"""Positions in attention: rotary and xPos on queries and keys, and the slopes of ALiBi."""

import math

import torch
from torch import Tensor

from mmkernels._checks import accumulator, check_beside, check_dtype, require


def rotary(
    x: Tensor, positions: Tensor, *, theta: float = 10000.0, interleaved: bool = False, dims: int | None = None
) -> Tensor:
    """`(a + bi) e^(i p theta^(-2 d / dims))` of each pair d of dimensions (a, b), at position p.

    The product of a query and a key so turned depends on the distance of their positions alone. Patches of an
    image turn half of their dimensions by the row and half by the column, one call for each.

    Args:
        x: queries or keys `[B, L, H, K]`, float32, float16, bfloat16 or float64, any strides.
        positions: integers or floating point, `[L]` or `[B, L]`, on the device of `x`.
        theta: the base of the frequencies, above 0.
        interleaved: pairs are neighbours, (0, 1), (2, 3), as published; False pairs the first half with the
            second, as Llama's weights in transformers.
        dims: how many dimensions turn, the first ones; even; None = K.

    Returns:
        `[B, L, H, K]` in the dtype of `x`, computed in float32 (float64 for float64); differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device or number.

    Paper: arXiv:2104.09864.
    """
    op = "rotary"
    _check_rank(op, "x", x, "L, H")
    head_dim = x.shape[3]
    dims = head_dim if dims is None else dims
    require(op, dims % 2 == 0 and 0 < dims <= head_dim, "dims must be even, from 2 to K = {}, got {}", head_dim, dims)
    _check_above_0(op, "theta", theta)
    _check_positions(op, "positions", positions, "x", x)
    cos, sin = _waves(positions.to(accumulator(x.dtype)), theta, dims)
    return _turned(x, cos, sin, interleaved)


def xpos(
    q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, *, theta: float = 10000.0, scale_base: float = 512.0
) -> tuple[Tensor, Tensor]:
    """Interleaved `rotary`, and pair d times `zeta_d^(p / scale_base)` in queries, its inverse in keys.

    With `zeta_d = (2 d / K + 0.4) / 1.4` the product of a query and a key decays with the distance of the key
    before the query, as torchscale has it; it grows for keys behind, so it goes with causal masks. Powers are of
    positions less the middle of all that the call is given, which cancels in the product: up to
    `3.5^(span / (2 scale_base))`, span from the first position to the last, must fit the dtype. A cache keeps
    keys as they were before.

    Args:
        q: queries `[B or 1, Lq, H, K]`, float32, float16, bfloat16 or float64, any strides; K is even.
        k: keys `[B, Lk, Hkv, K]`, the dtype and device of `q`.
        q_positions: integers or floating point, `[Lq]` or, a row for each of `q`, `[B, Lq]`, on its device.
        k_positions: of the keys, `[Lk]` or `[B, Lk]`.
        theta: the base of the frequencies, above 0.
        scale_base: positions to a power of zeta, above 0.

    Returns:
        `q` and `k` turned and scaled, in their shapes and dtype, computed in float32 (float64 for float64);
        differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device or number.

    Paper: arXiv:2212.10554.
    """
    op = "xpos"
    _check_rank(op, "q", q, "Lq, H")
    _check_rank(op, "k", k, "Lk, Hkv")
    head_dim = q.shape[3]
    require(op, head_dim % 2 == 0 and head_dim > 0, "q must have an even K, got {}", head_dim)
    require(op, k.shape[3] == head_dim, "k must have q's K of {}, got {}", head_dim, k.shape[3])
    require(op, k.dtype == q.dtype, "k must have the dtype of q, {}, got {}", q.dtype, k.dtype)
    check_beside(op, "k", k, "q", q)
    _check_positions(op, "q_positions", q_positions, "q", q)
    _check_positions(op, "k_positions", k_positions, "k", k)
    _check_above_0(op, "theta", theta)
    _check_above_0(op, "scale_base", scale_base)
    wide = accumulator(q.dtype)
    places = q_positions.to(wide), k_positions.to(wide)
    every = torch.cat([x.flatten() for x in places])
    middle = sum(every.aminmax()) / 2 if every.numel() else 0.0
    log_zeta = ((torch.arange(0, head_dim, 2, device=q.device, dtype=wide) / head_dim + 0.4) / 1.4).log()
    found = []
    for x, at, sign in ((q, places[0], 1), (k, places[1], -1)):
        scale = ((at - middle)[..., None, None] * (log_zeta * sign / scale_base)).exp()
        cos, sin = _waves(at, theta, head_dim)
        found.append(_turned(x, cos * scale, sin * scale, True))
    return found[0], found[1]


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """`2^(-8 h / H)` for head h from 1 to H, the slopes of `attention`'s `alibi_slopes`.

    Where H is no power of two: those of the power below it, then every other one of the power above.

    Args:
        num_heads: H, at least 1.
        device: of the result.

    Returns:
        float32 `[H]`.

    Raises:
        ValueError: no head.

    Paper: arXiv:2108.12409.
    """
    require("alibi_slopes", num_heads >= 1, "num_heads must be at least 1, got {}", num_heads)
    power = 2 ** int(math.log2(num_heads))
    # in steps of the power above
    steps = [*range(2, 2 * power + 1, 2), *range(1, 2 * (num_heads - power), 2)]
    return torch.tensor([2.0 ** (-4 * step / power) for step in steps], dtype=torch.float32, device=device)


def _waves(positions: Tensor, theta: float, dims: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's angle, `[1 or B, L, 1, dims / 2]`."""
    exponents = torch.arange(0, dims, 2, device=positions.device, dtype=positions.dtype) / dims
    angles = positions[..., None, None] * (1.0 / theta**exponents)  # to the bit as transformers has them
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first `2 * cos.shape[-1]` dimensions of `x` turned: each times its cosine, and its partner times the sine."""
    dims, wide = 2 * cos.shape[-1], x.to(cos.dtype)
    part = wide[..., :dims]
    if interleaved:
        cos, sin = (wave.repeat_interleave(2, -1) for wave in (cos, sin))
        partners = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((wave, wave), -1) for wave in (cos, sin))
        first, second = part.chunk(2, -1)
        partners = torch.cat((-second, first), -1)
    turned = (part * cos).add_(partners * sin)
    return (turned if dims == x.shape[-1] else torch.cat((turned, wide[..., dims:]), -1)).to(x.dtype)


def _check_rank(op: str, name: str, x: Tensor, middle: str) -> None:
    require(op, x.ndim == 4, "{} must be [B, {}, K], got shape {}", name, middle, list(x.shape))
    check_dtype(op, name, x)


def _check_above_0(op: str, name: str, value: float) -> None:
    require(op, 0 < value < math.inf, "{} must be above 0, got {}", name, value)


def _check_positions(op: str, name: str, positions: Tensor, of_name: str, of: Tensor) -> None:
    """One for each of `[L]`, or of `[B, L]`."""
    batch, length = of.shape[:2]
    shape = list(positions.shape)
    require(
        op,
        shape in ([length], [batch, length]),
        "{} must be [{}] or [{}, {}], got shape {}",
        name,
        length,
        batch,
        length,
        shape,
    )
    known = positions.dtype != torch.bool and not positions.is_complex()
    require(op, known, "{} must be integers or floating point, got {}", name, positions.dtype)
    check_beside(op, name, positions, of_name, of)
