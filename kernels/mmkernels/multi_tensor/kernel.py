"""Launchers of the Triton kernels: one launch for all tensors."""

# triton types no launch
# pyright: reportCallIssue=false
from torch import Tensor

from mmkernels._launch import launch_config
from mmkernels.multi_tensor.device import _ema_update_kernel
from mmkernels.multi_tensor.launch import TABLE
from mmkernels.multi_tensor.table import CHUNK, Table


def ema_update_table(table: Table, weight: Tensor, seed: Tensor | None) -> None:
    """`target + weight (source - target)`, rounded by the bits of `seed` if there is one."""
    rows, kinds = table
    if len(rows):
        _ema_update_kernel[(len(rows),)](
            rows,
            weight,
            rows if seed is None else seed,
            NUM_LISTS=3,
            KINDS=kinds,
            STOCHASTIC=seed is not None,
            BLOCK=CHUNK,
            num_warps=launch_config(TABLE, "ema_update", weight).num_warps,
        )
