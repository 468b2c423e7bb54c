"""Every kernel with the flags it is launched with, to be compiled ahead of time at each row of its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmkernels._launch import Table
from mmkernels.contrastive import kernel as contrastive
from mmkernels.contrastive import launch as contrastive_launch
from mmkernels.token_contrastive import kernel as token_contrastive
from mmkernels.token_contrastive import launch as token_launch


@dataclass(frozen=True, eq=False)
class Case:
    """A kernel as it is launched.

    Attributes:
        name: the op.
        kernel: the jitted function.
        row: the name of its rows in the table.
        table: its op's launch table.
        constants: its flags and its inner strides.
        operands: pointers to the inputs' dtype.
        pointers: types of pointers that are neither that nor float32.
        odd: sizes that need not be multiples of 16.
        products: whether it multiplies matrices.
    """

    name: str
    kernel: Any
    row: str
    table: Table
    constants: Mapping[str, Any]
    operands: tuple[str, ...]
    pointers: Mapping[str, str] = field(default_factory=dict)
    odd: tuple[str, ...] = ("M", "N")
    products: bool = True

    def rows(self) -> list[tuple[str, int, int]]:
        return [row for row in self.table if row[0] == self.row]


UNIT_STRIDES = {"stride_ad": 1, "stride_bd": 1}
TOKEN_STRIDES = {"stride_td": 1, "stride_bd": 1}
TOKEN_FLAGS = ("HAS_MASK", "HAS_LABELS", "HAS_TOTALS")
TOKEN_INDICES = {
    "mask_ptr": "*u8",
    "positives_ptr": "*i64",
    "row_labels_ptr": "*i64",
    "col_labels_ptr": "*i64",
}
CASES = (
    Case(
        name="contrastive",
        kernel=contrastive._contrastive_fwd_kernel,
        row="fwd",
        table=contrastive_launch.TABLE,
        constants=UNIT_STRIDES,
        operands=("a_ptr", "b_ptr"),
        odd=("M", "N", "offset"),
    ),
    Case(
        name="contrastive",
        kernel=contrastive._contrastive_bwd_kernel,
        row="bwd",
        table=contrastive_launch.TABLE,
        constants={**UNIT_STRIDES, "HAS_GRAD": True, "HAS_DSCALE": True},
        operands=("a_ptr", "b_ptr", "grad_ptr"),
        odd=("M", "N", "offset"),
    ),
    *(
        Case(
            name=f"token_contrastive-{block_q}",
            kernel=kernel,
            row=row,
            table=token_launch.TABLE,
            constants={
                **TOKEN_STRIDES,
                **dict.fromkeys(TOKEN_FLAGS, flag),
                **dict.fromkeys(("HAS_POSITIVES", "HAS_GRAD", "HAS_DSCALE"), True),
                "BLOCK_Q": block_q,
            },
            operands=("tokens_ptr", "b_ptr", "grad_ptr"),
            pointers=TOKEN_INDICES,
            odd=("M", "N", "Q"),
        )
        for kernel, row in (
            (token_contrastive._token_contrastive_fwd_kernel, "fwd"),
            (token_contrastive._token_contrastive_bwd_kernel, "bwd"),
        )
        for flag, block_q in ((False, 32), (True, 16))
    ),
)
