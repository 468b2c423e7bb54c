"""Every kernel with the flags it is launched with, to be compiled ahead of time at each row of its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mmkernels._launch import Table
from mmkernels.attention import device as attention
from mmkernels.attention import device_bwd as attention_bwd
from mmkernels.attention import launch as attention_launch
from mmkernels.contrastive import device as contrastive
from mmkernels.contrastive import launch as contrastive_launch
from mmkernels.distill import kernel as distill
from mmkernels.distill import launch as distill_launch
from mmkernels.linear_cross_entropy import kernel as linear_cross_entropy
from mmkernels.linear_cross_entropy import launch as linear_cross_entropy_launch
from mmkernels.multi_tensor import device as multi_tensor
from mmkernels.multi_tensor import launch as multi_tensor_launch
from mmkernels.multi_tensor import table as multi_tensor_table
from mmkernels.sigmoid import kernel as sigmoid
from mmkernels.sigmoid import launch as sigmoid_launch
from mmkernels.token_contrastive import device as token_contrastive
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
        odd: sizes that need not be multiples of 16; if none, that is not compiled.
        floats: scalars that are floats.
        products: whether it multiplies matrices.
        product_rows: which side of the tile is the rows of its products.
        elements: the operands' dtypes; bfloat16 and float16 differ in nothing that costs.
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
    product_rows: str = "block_m"
    elements: tuple[str, ...] = ("bf16", "fp16", "fp32", "i64")

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


def contrastive_case(row: str, kernel: Any, **flags: bool) -> Case:
    """A contrastive kernel with every flag on but the named ones."""
    on = ("SYMMETRIC", "HAS_POSITIVES", "HAS_GRAD", "HAS_DSCALE")
    return Case(
        name="contrastive" + "".join(f"-{flag}={value}" for flag, value in flags.items()),
        kernel=kernel,
        row=row,
        table=contrastive_launch.TABLE,
        constants={
            **UNIT_STRIDES,
            **dict.fromkeys(on, True),
            "HAS_TEACHER": row.endswith("teacher"),
            "SHIFTED": False,
            **flags,
        },
        operands=("a_ptr", "b_ptr", "teacher_a_ptr", "teacher_b_ptr", "grad_ptr"),
        pointers={"positives_ptr": "*i64", "scale_ptr": "*fp64"},
    )


def sigmoid_case(has_labels: bool, wants_gradients: bool) -> Case:
    return Case(
        name="sigmoid" if wants_gradients else "sigmoid-loss",
        kernel=sigmoid._sigmoid_fwd_kernel,
        row="fwd_labels" if has_labels else "fwd",
        table=sigmoid_launch.TABLE,
        constants={
            **UNIT_STRIDES,
            "HAS_LABELS": has_labels,
            "HAS_GRAD": wants_gradients,
            "HAS_SUMS": wants_gradients,
        },
        operands=("a_ptr", "b_ptr", "grad_ptr"),
        pointers={"row_label_ptr": "*i32", "col_label_ptr": "*i32"},
        odd=("M", "N", "offset"),
    )


def attention_case(kernel: Any, row: str, size: int, **flags: Any) -> Case:
    """An attention kernel at the largest head dimension of a row."""
    plain = {"NUM_ENDS": 2, "BIAS": "none"} | dict.fromkeys(
        ("HAS_SLOPES", "HAS_DROPOUT", "HAS_SEGMENTS"), False
    )
    rich = "_rich" if flags.keys() - {"NUM_ENDS"} else ""
    return Case(
        name="attention" + "".join(f"-{flag}={value}" for flag, value in flags.items()),
        kernel=kernel,
        row=f"{row}{rich}_{size}",
        table=attention_launch.TABLE,
        constants={**plain, **flags, "BLOCK_K": size},
        operands=tuple(f"{name}_ptr" for name in "q k v k2 v2 out d_out dq dk dv dk2 dv2".split()),
        pointers={
            **dict.fromkeys(("lo_ptr", "hi_ptr", "lo2_ptr", "hi2_ptr", "queries_ptr"), "*i32"),
            "seed_ptr": "*i64",
            "bias_ptr": "*u8",
        },
        product_rows="block_n" if row == "bwd_k" else "block_m",
        odd=() if rich else ("M", "N", "N1", "K", "H", "groups", "threshold"),
        floats=("scale", "keep_scale"),
        elements=("bf16", "fp32"),
    )


EVERYTHING = {"NUM_ENDS": 4, "BIAS": "bool", "HAS_SLOPES": True, "HAS_DROPOUT": True, "HAS_SEGMENTS": True}
ATTENTION = tuple(
    attention_case(kernel, row, size, **flags)
    for kernel, row in (
        (attention._attention_fwd_kernel, "fwd"),
        (attention_bwd._attention_bwd_q_kernel, "bwd_q"),
        (attention_bwd._attention_bwd_k_kernel, "bwd_k"),
    )
    for size in (64, 128, 256)
    for flags in ({}, EVERYTHING)
)


def multi_tensor_case(
    row: str, kernel: Any, dtypes: tuple[tuple[int, ...], ...], name: str = "", **constants: Any
) -> Case:
    """Of all combinations of the lists' dtypes: 0 for none, 1 float32, 2 float16, 3 bfloat16, 4 bytes."""
    bits = multi_tensor_table.DIGIT_BITS
    kinds = tuple(sum(d << (bits * i) for i, d in enumerate(combination)) for combination in product(*dtypes))
    return Case(
        name=f"{row}{name}",
        kernel=kernel,
        row=row,
        table=multi_tensor_launch.TABLE,
        constants={"KINDS": kinds, "BLOCK": multi_tensor_launch.CHUNK, **constants},
        operands=(),
        pointers={
            "chunks_ptr": "*i64",
            "tensors_ptr": "*i64",
            "seed_ptr": "*i64",
            "factors_ptr": "*fp64",
            "sums_ptr": "*fp64",
        },
        odd=("first_owner", "last_owner"),
        floats=("max_norm", "weight", "decay"),
        products=False,
    )


MULTI_TENSOR = (
    multi_tensor_case(
        "ema_update", multi_tensor._ema_update_kernel, ((1, 3), (1, 2, 3), (0, 3)), STOCHASTIC=False
    ),
    multi_tensor_case(
        "ema_update", multi_tensor._ema_update_kernel, ((3,), (1, 3), (0, 3)), "-stochastic", STOCHASTIC=True
    ),
    multi_tensor_case(
        "adamw_update", multi_tensor._adamw_update_kernel, ((1,), (1, 3), (1,), (1,), (0, 1), (0,), (0,))
    ),
    multi_tensor_case(
        "adamw_update",
        multi_tensor._adamw_update_kernel,
        ((1,), (3,), (1,), (1,), (1,), (3,), (0, 3)),
        "-copies",
    ),
    multi_tensor_case("squares", multi_tensor._squares_kernel, ((1, 2, 3),)),
    multi_tensor_case("clip", multi_tensor._clip_kernel, ((1, 2, 3),)),
    multi_tensor_case("fisher_accumulate", multi_tensor._fisher_accumulate_kernel, ((1,), (1, 2, 3))),
    multi_tensor_case("ewc_penalty_fwd", multi_tensor._ewc_penalty_fwd_kernel, ((1, 3), (1, 3), (1,))),
    multi_tensor_case("ewc_penalty_bwd", multi_tensor._ewc_penalty_bwd_kernel, ((1,), (1,), (1,), (1,))),
    multi_tensor_case(
        "ewc_penalty_bwd", multi_tensor._ewc_penalty_bwd_kernel, ((3,), (1, 3), (1,), (3,)), "-bfloat16"
    ),
    multi_tensor_case("apply_masks", multi_tensor._apply_masks_kernel, ((1, 2, 3), (4,))),
)
FWD, BWD = contrastive._contrastive_fwd_kernel, contrastive._contrastive_bwd_kernel
CASES = (
    *ATTENTION,
    *MULTI_TENSOR,
    contrastive_case("fwd", FWD),
    contrastive_case("fwd", FWD, SHIFTED=True),
    contrastive_case("fwd", FWD, SYMMETRIC=False),
    contrastive_case("fwd_teacher", FWD),
    contrastive_case("bwd", BWD),
    contrastive_case("bwd", BWD, SYMMETRIC=False),
    contrastive_case("bwd_teacher", BWD),
    sigmoid_case(has_labels=False, wants_gradients=True),
    sigmoid_case(has_labels=False, wants_gradients=False),
    sigmoid_case(has_labels=True, wants_gradients=True),
    sigmoid_case(has_labels=True, wants_gradients=False),
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
    *(
        Case(
            name=f"distill[HAS_CENTER={centered}]",
            kernel=kernel,
            row=row,
            table=distill_launch.TABLE,
            constants={"HAS_CENTER": centered},
            operands=("student_ptr", "teacher_ptr", "dstudent_ptr"),
            odd=("B", "C"),
            products=False,
        )
        for row, kernel in (
            ("fwd", distill._distillation_loss_fwd_kernel),
            ("bwd", distill._distillation_loss_bwd_kernel),
        )
        for centered in (True, False)
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
