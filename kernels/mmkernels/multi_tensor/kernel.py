"""Launchers of the Triton kernels: one launch for all tensors."""

# triton types no launch
# pyright: reportCallIssue=false
from typing import Any

import torch
from torch import Tensor

from mmkernels._launch import launch
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
from mmkernels.multi_tensor.table import CHUNK, Table

# A program takes a chunk, a thread 16 elements of it: of float32 four accesses of 16 bytes a list.
NUM_WARPS = 8
# Of AdamW's seven lists 16 elements are 164 to 208 registers, 8 are 80 to 106: twice the warps fit a processor.
ADAMW_WARPS = 16


def ema_update_table(table: Table, weight: Tensor, seed: Tensor | None) -> None:
    """`target + weight (source - target)`, rounded by the bits of `seed` if there is one."""
    key = table.chunks if seed is None else seed
    _launch(_ema_update_kernel, table, weight, key, STOCHASTIC=seed is not None)


def adamw_update_table(table: Table, factors: Tensor) -> None:
    """A step of AdamW and of the averages, see `mmkernels.multi_tensor.adamw.adamw_factors`."""
    _launch(_adamw_update_kernel, table, factors, num_warps=ADAMW_WARPS)


def squares_table(table: Table) -> Tensor:
    """The sum of squares, float64 `[]`."""
    return _launch_sum(_squares_kernel, table)


def clip_table(table: Table, norm: Tensor, max_norm: float) -> None:
    """Each tensor times `min(1, max_norm / (norm + 1e-6))`."""
    _launch(_clip_kernel, table, norm, float(max_norm))


def fisher_accumulate_table(table: Table, weight: float, decay: float) -> None:
    """`decay fisher + weight grad^2`."""
    _launch(_fisher_accumulate_kernel, table, float(weight), float(decay))


def ewc_penalty_fwd_table(table: Table) -> Tensor:
    """The sum of `fisher (param - anchor)^2`, float64 `[]`."""
    return _launch_sum(_ewc_penalty_fwd_kernel, table)


def ewc_penalty_bwd_table(table: Table, factor: Tensor) -> None:
    """Into the fourth list, `factor fisher (param - anchor)`."""
    _launch(_ewc_penalty_bwd_kernel, table, factor)


def apply_masks_table(table: Table, first: int, last: int) -> None:
    """Zero where the mask is not between the two."""
    _launch(_apply_masks_kernel, table, first, last)


def _launch_sum(kernel: Any, table: Table) -> Tensor:
    """The sum of what each program writes in a place of its own, always in the same order."""
    sums = torch.empty(len(table.chunks), dtype=torch.float64, device=table.chunks.device)
    _launch(kernel, table, sums)
    return sums.sum()


def _launch(kernel: Any, table: Table, *args: Tensor | float, num_warps: int = NUM_WARPS, **constants: Any) -> None:
    chunks, tensors, kinds = table
    if len(chunks):
        flags = {**constants, "KINDS": kinds, "BLOCK": CHUNK, "num_warps": num_warps}
        launch(kernel, (len(chunks),), chunks, tensors, *args, **flags)
