"""What every op checks of its arguments before it launches anything."""

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPE_NAMES = "float32, float16, bfloat16 or float64"


def require(op: str, holds: bool, sentence: str, *values: object) -> None:
    """Raise `ValueError("op: sentence")`, the values filled into its braces, unless the contract holds."""
    if not holds:
        raise ValueError(f"{op}: {sentence.format(*values)}")


def check_dtype(op: str, name: str, x: Tensor) -> None:
    require(op, x.dtype in DTYPES, "{} must be {}, got {}", name, DTYPE_NAMES, x.dtype)


def check_beside(op: str, name: str, x: Tensor, of_name: str, of: Tensor) -> None:
    """`x` must be on the device of `of`."""
    require(op, x.device == of.device, "{} must be on the device of {}, {}, got {}", name, of_name, of.device, x.device)


def check_index(op: str, name: str, x: Tensor, size: int, of_name: str, of: Tensor) -> None:
    """`x` must be int64 `[size]` on the device of `of`."""
    require(
        op,
        x.dtype == torch.int64 and list(x.shape) == [size],
        "{} must be int64 [{}], got {} {}",
        name,
        size,
        x.dtype,
        list(x.shape),
    )
    check_beside(op, name, x, of_name, of)


def in_range(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """An index whose values are not read, for ops of torch that stop the device at a wrong one: brought into 0 to
    `size - 1`, and 1 where it was there before, else NaN, to be multiplied with."""
    safe = index.clamp(0, max(size - 1, 0))
    return safe, torch.where(safe == index, 1.0, torch.nan)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products and sums of `dtype` are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar_tensor(op: str, name: str, value: float | Tensor, of_name: str, of: Tensor) -> Tensor:
    """A scale, a bias or a temperature as a tensor of one element on the device of `of`, checked to be finite.

    A tensor on a GPU is not read: that would wait for the device.
    """
    if not isinstance(value, Tensor):
        # a comparison, because a compiled graph may hold the float as a symbol
        require(op, -math.inf < value < math.inf, "{} must be finite, got {}", name, value)
        return torch.full((), value, dtype=accumulator(of.dtype), device=of.device)
    shape = list(value.shape)
    require(op, shape in ([], [1]), "{} must be a float or a tensor of one element, got shape {}", name, shape)
    require(op, value.dtype in DTYPES, "{} must be floating point, got {}", name, value.dtype)
    check_beside(op, name, value, of_name, of)
    is_batched = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    if not (value.is_cuda or torch.compiler.is_compiling() or is_batched):
        number = value.item()
        require(op, math.isfinite(number), "{} must be finite, got {}", name, number)
    return value


def autocast_operands(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands as autocast would hand them to a matrix product; float64 is left alone, as there."""
    first = operands[0]
    device = first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or first.dtype == torch.float64:
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in operands)
