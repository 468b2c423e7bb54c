"""Launchers of the Triton kernels: one launch for all tensors."""

# triton types no launch
# pyright: reportCallIssue=false
from typing import Any

import torch
from torch import Tensor

from mmkernels._launch import launch_config
from mmkernels.multi_tensor.device import (
    _adamw_update_kernel,
    _apply_masks_kernel,
    _clip_kernel,
    _ema_update_kernel,
    _ewc_penalty_bwd_kernel,
    _ewc_penalty_fwd_kernel,
    _fisher_accumulate_kernel,
    _squares_kernel,
)
from mmkernels.multi_tensor.launch import TABLE
from mmkernels.multi_tensor.table import CHUNK, Table


def ema_update_table(table: Table, weight: Tensor, seed: Tensor | None) -> None:
    """`target + weight (source - target)`, rounded by the bits of `seed` if there is one."""
    key = table.chunks if seed is None else seed
    _launch(_ema_update_kernel, "ema_update", table, weight, key, STOCHASTIC=seed is not None)


def adamw_update_table(table: Table, factors: Tensor) -> None:
    """A step of AdamW and of the averages, see `mmkernels.multi_tensor.adamw.adamw_factors`."""
    _launch(_adamw_update_kernel, "adamw_update", table, factors)


def squares_table(table: Table) -> Tensor:
    """The sum of squares, float64 `[]`."""
    return _launch_sum(_squares_kernel, "squares", table)


def clip_table(table: Table, norm: Tensor, max_norm: float) -> None:
    """Each tensor times `min(1, max_norm / (norm + 1e-6))`."""
    _launch(_clip_kernel, "clip", table, norm, float(max_norm))


def fisher_accumulate_table(table: Table, weight: float, decay: float) -> None:
    """`decay fisher + weight grad^2`."""
    _launch(_fisher_accumulate_kernel, "fisher_accumulate", table, float(weight), float(decay))


def ewc_penalty_fwd_table(table: Table) -> Tensor:
    """The sum of `fisher (param - anchor)^2`, float64 `[]`."""
    return _launch_sum(_ewc_penalty_fwd_kernel, "ewc_penalty_fwd", table)


def ewc_penalty_bwd_table(table: Table, factor: Tensor) -> None:
    """Into the fourth list, `factor fisher (param - anchor)`."""
    _launch(_ewc_penalty_bwd_kernel, "ewc_penalty_bwd", table, factor)


def apply_masks_table(table: Table, first: int, last: int) -> None:
    """Zero where the mask is not between the two."""
    _launch(_apply_masks_kernel, "apply_masks", table, first, last)


def _launch_sum(kernel: Any, row: str, table: Table) -> Tensor:
    """The sum of what each program writes in a place of its own, always in the same order."""
    sums = torch.empty(len(table.chunks), dtype=torch.float64, device=table.chunks.device)
    _launch(kernel, row, table, sums)
    return sums.sum()


def _launch(kernel: Any, row: str, table: Table, *args: Tensor | float, **constants: Any) -> None:
    chunks, tensors, kinds = table
    if len(chunks):
        num_warps = launch_config(TABLE, row, chunks).num_warps
        grid = (len(chunks),)
        kernel[grid](chunks, tensors, *args, **constants, KINDS=kinds, BLOCK=CHUNK, num_warps=num_warps)
