"""The norm of all tensors of a list together, and its clipping, checked and registered with torch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._checks import require
from mmkernels.multi_tensor import paths
from mmkernels.multi_tensor.paths import ADDRESSED, check_captured, path_of, prepared, scalar, table_in_op, total_dtype
from mmkernels.multi_tensor.table import Table


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`sqrt(sum x^2)` over every element of every tensor, in one launch.

    No float32 or half-precision value is too large or too small for its square; reruns give the same bits; a GPU is
    not waited for.

    Args:
        tensors: of one device, float32, float16, bfloat16 or float64, any shapes and strides; may mix them.

    Returns:
        `[]` on their device, float32, or float64 where a tensor is; squares are added in float32 by up to 4,096, and
        those sums in float64. Zero of no tensors. Without a gradient.

    Raises:
        ValueError: a dtype, or tensors on several devices.

    Reference: `global_norm_ref`.
    """
    (tensors,), table = prepared("global_norm", {"tensors": tensors}, ())
    return _norm_of(tensors, table)


@torch.no_grad()
def clip_(
    tensors: Sequence[Tensor], max_norm: float, *, norm: float | Tensor | None = None, error_if_nonfinite: bool = False
) -> Tensor:
    """`x *= min(1, max_norm / (norm + 1e-6))`, in place and in one launch after the norm's: what
    `torch.nn.utils.clip_grad_norm_` does to gradients.

    Where that factor is 1, nothing is read or written. A GPU is not waited for, but see `error_if_nonfinite`.

    Args:
        tensors: distinct tensors of one device, float32, float16, bfloat16 or float64, any shapes; dense.
        max_norm: at least 0; a captured graph keeps that of its capture.
        norm: that of all tensors, where these are a part of them: one which was reduced across ranks, a float or a
            tensor of one element on the device (on a GPU it is not checked), which a captured graph has to be given;
            None = `global_norm(tensors)`.
        error_if_nonfinite: refuse a norm that is NaN or infinite, before anything is written; it waits for a GPU, and
            no graph can be compiled or captured with it.

    Returns:
        The norm before, `[]` on their device, of `global_norm`'s dtype.

    Raises:
        ValueError: a dtype, tensors on several devices or in shared memory, `max_norm`, `norm`.

    Reference: `clip_ref_`. Paper: arXiv:1211.5063.
    """
    op = "clip_"
    (tensors,), table = prepared(op, {"tensors": tensors}, ("tensors",))
    require(op, max_norm >= 0, "max_norm must be at least 0, got {}", max_norm)
    if norm is None:
        norm = _norm_of(tensors, table)
    else:
        _check_norm(op, norm)
        if tensors:
            check_captured(op, tensors[0], norm=norm)
        norm = scalar(norm, total_dtype([tensors]), tensors[0].device if tensors else torch.device("cpu"))
        norm = norm.reshape(())
    if error_if_nonfinite:
        require(op, math.isfinite(norm), "tensors must have a finite norm, got {}", float(norm))
    if not tensors:
        return norm
    if torch.compiler.is_compiling():
        _clip(tensors, norm, max_norm)
    else:
        _update(tensors, norm, max_norm, table)
        torch.autograd.graph.increment_version(tensors)
    return norm


def _check_norm(op: str, norm: float | Tensor) -> None:
    """One number, not negative; NaN and infinity are what gradients may have."""
    if isinstance(norm, Tensor):
        require(op, norm.numel() == 1, "norm must be one number, got shape {}", list(norm.shape))
        if norm.is_cuda or torch.compiler.is_compiling():
            return
        norm = float(norm)
    require(op, not norm < 0, "norm must be at least 0, got {}", norm)


def _norm_of(tensors: list[Tensor], table: Table | None) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return _global_norm(tensors) if torch.compiler.is_compiling() else _norm(tensors, table)


def _norm(tensors: list[Tensor], table: Table | None) -> Tensor:
    if table is None:
        return paths.blockwise.squares([tensors]).sqrt().to(total_dtype([tensors]))
    return path_of(tensors[0]).squares_table(table).sqrt().float()


@torch.library.custom_op("mmkernels::global_norm", mutates_args=(), tags=ADDRESSED)
def _global_norm(tensors: list[Tensor]) -> Tensor:
    return _norm(tensors, table_in_op([tensors]))


@_global_norm.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=total_dtype([tensors]))


def _update(tensors: list[Tensor], norm: Tensor, max_norm: float, table: Table | None) -> None:
    if table is None:
        paths.blockwise.clip_([tensors], norm, max_norm)
    else:
        path_of(tensors[0]).clip_table(table, norm, max_norm)


@torch.library.custom_op("mmkernels::clip", mutates_args=("tensors",), tags=ADDRESSED)
def _clip(tensors: list[Tensor], norm: Tensor, max_norm: float) -> None:
    _update(tensors, norm, max_norm, table_in_op([tensors]))
