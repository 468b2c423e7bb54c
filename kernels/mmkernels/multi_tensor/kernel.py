"""Launchers of the Triton kernels: one launch for all tensors."""

# triton types no launch
# pyright: reportCallIssue=false
from typing import Any

from torch import Tensor

from mmkernels._launch import launch_config
from mmkernels.multi_tensor.device import _adamw_update_kernel, _ema_update_kernel
from mmkernels.multi_tensor.launch import TABLE
from mmkernels.multi_tensor.table import CHUNK, Table


def ema_update_table(table: Table, weight: Tensor, seed: Tensor | None) -> None:
    """`target + weight (source - target)`, rounded by the bits of `seed` if there is one."""
    key = table.chunks if seed is None else seed
    _launch(_ema_update_kernel, "ema_update", table, weight, key, STOCHASTIC=seed is not None)


def adamw_update_table(table: Table, factors: Tensor) -> None:
    """A step of AdamW and of the averages, see `mmkernels.multi_tensor.adamw.adamw_factors`."""
    _launch(_adamw_update_kernel, "adamw_update", table, factors)


def _launch(kernel: Any, row: str, table: Table, *args: Tensor, **constants: Any) -> None:
    chunks, tensors, kinds = table
    if len(chunks):
        num_warps = launch_config(TABLE, row, chunks).num_warps
        grid = (len(chunks),)
        kernel[grid](chunks, tensors, *args, **constants, KINDS=kinds, BLOCK=CHUNK, num_warps=num_warps)
