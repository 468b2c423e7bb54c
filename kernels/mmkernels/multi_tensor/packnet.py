"""Zeros where a task may not write or read, of lists of tensors in one launch, checked and registered with torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._checks import require
from mmkernels.multi_tensor import paths
from mmkernels.multi_tensor.paths import ADDRESSED, path_of, prepared, table_in_op
from mmkernels.multi_tensor.table import Table

# A mask in bool holds 0 and 1.
TRUE = (1, 255)


@torch.no_grad()
def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor], *, owners: tuple[int, int] | None = None) -> None:
    """`x = x if mask else 0` of every element, in place and in one launch.

    Zero is written, not multiplied by: NaN and infinity go too, and what is kept keeps its bits. A chunk of 4,096
    elements that is kept whole is neither read nor written.

    Args:
        tensors: weights or gradients, distinct tensors of one device, float32, float16, bfloat16 or float64, any
            shapes; dense.
        masks: of their shapes; bool, or with `owners` uint8: the number of the task that each weight belongs to.
        owners: (first, last), from 0 to 255: kept is what belongs to one of these tasks, both included. With 0 for
            weights that are still free, (t, t) keeps the gradients of task t's weights, (1, t) the weights that it
            is evaluated with; None = the masks are bool. A captured graph keeps those of its capture.

    Raises:
        ValueError: lists that do not match, a dtype, a device, memory in common, or `owners`.

    Reference: `apply_masks_ref_`. Paper: arXiv:1711.05769 (PackNet).
    """
    op = "apply_masks_"
    first, last = TRUE if owners is None else owners
    require(op, 0 <= first <= last <= 255, "owners must be 0 <= first <= last <= 255, got {}", owners)
    allowed = ((torch.bool,), "bool") if owners is None else ((torch.uint8,), "uint8 with owners")
    (tensors, masks), table = prepared(op, {"tensors": tensors, "masks": masks}, ("tensors",), {"masks": allowed})
    if not tensors:
        return
    if torch.compiler.is_compiling():
        _apply_masks(tensors, masks, first, last)
    else:
        _update(tensors, masks, first, last, table)
        torch.autograd.graph.increment_version(tensors)


def _update(tensors: list[Tensor], masks: list[Tensor], first: int, last: int, table: Table | None) -> None:
    if table is None:
        paths.blockwise.apply_masks_((tensors, masks), first, last)
    else:
        path_of(tensors[0]).apply_masks_table(table, first, last)


@torch.library.custom_op("mmkernels::apply_masks", mutates_args=("tensors",), tags=ADDRESSED)
def _apply_masks(tensors: list[Tensor], masks: list[Tensor], first: int, last: int) -> None:
    _update(tensors, masks, first, last, table_in_op((tensors, masks)))
