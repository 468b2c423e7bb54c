"""Every kernel with the flags it is launched with, to be compiled ahead of time at each row of its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmkernels._launch import Table
from mmkernels.contrastive import kernel as contrastive
from mmkernels.contrastive import launch as contrastive_launch
from mmkernels.linear_cross_entropy import kernel as linear_cross_entropy
from mmkernels.linear_cross_entropy import launch as linear_cross_entropy_launch


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
        floats: scalars that are floats.
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
    floats: tuple[str, ...] = ()
    products: bool = True

    def rows(self) -> list[tuple[str, int, int]]:
        return [row for row in self.table if row[0] == self.row]


UNIT_STRIDES = {"stride_ad": 1, "stride_bd": 1}
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
            name=f"linear_cross_entropy[{name}]",
            kernel=linear_cross_entropy._linear_cross_entropy_fwd_kernel,
            row="fwd",
            table=linear_cross_entropy_launch.TABLE,
            constants=flags,
            operands=("grad_ptr", "bias_ptr"),
            pointers={"targets_ptr": "*i64"},
            odd=("M", "V"),
            floats=("z_loss",),
            products=False,
        )
        for name, flags in (
            ("gradient", {"HAS_BIAS": True, "HAS_GRAD": True}),
            ("statistics", {"HAS_BIAS": False, "HAS_GRAD": False}),
        )
    ),
)
