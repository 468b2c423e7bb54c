"""Every kernel with the flags it is launched with, to be compiled ahead of time at each row of its table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mmkernels._launch import Launch, Table
from mmkernels.attention import device as attention
from mmkernels.attention import device_bwd as attention_bwd
from mmkernels.attention import device_rows as attention_rows
from mmkernels.attention.kernel import READ_ROWS
from mmkernels.attention.kernel import TABLE as ATTENTION_TABLE
from mmkernels.contrastive import device as contrastive
from mmkernels.contrastive import device_state as contrastive_state
from mmkernels.contrastive import device_vectors as contrastive_vectors
from mmkernels.contrastive.kernel import BLOCK as CONTRASTIVE_BLOCK
from mmkernels.contrastive.kernel import COMBINE_WARPS
from mmkernels.contrastive.launches import BLOCK_D as CONTRASTIVE_BLOCK_D
from mmkernels.contrastive.launches import BLOCK_R as CONTRASTIVE_BLOCK_R
from mmkernels.contrastive.launches import TABLE as CONTRASTIVE_TABLE
from mmkernels.distill import device as distill
from mmkernels.distill.kernel import LAUNCH as DISTILL_LAUNCH
from mmkernels.linear_cross_entropy import device as linear_cross_entropy
from mmkernels.linear_cross_entropy.kernel import LAUNCH as CROSS_ENTROPY_LAUNCH
from mmkernels.maxsim import device as maxsim
from mmkernels.maxsim.kernel import BWD_Q as MAXSIM_BWD_Q
from mmkernels.maxsim.kernel import TABLE as MAXSIM_TABLE
from mmkernels.multi_tensor import device as lists
from mmkernels.multi_tensor.kernel import ADAMW_WARPS, NUM_WARPS
from mmkernels.multi_tensor.table import CHUNK, DIGIT_BITS
from mmkernels.sigmoid import device as sigmoid
from mmkernels.sigmoid.kernel import BLOCK_D as SIGMOID_BLOCK_D
from mmkernels.sigmoid.kernel import BLOCK_R as SIGMOID_BLOCK_R
from mmkernels.sigmoid.kernel import TABLE as SIGMOID_TABLE
from mmkernels.token_contrastive import device as token_contrastive
from mmkernels.token_contrastive import device_vectors as token_vectors
from mmkernels.token_contrastive.kernel import BLOCK as TOKENS_BLOCK
from mmkernels.token_contrastive.kernel import TABLE as TOKENS_TABLE

# of arguments, by their names in every kernel: pointers to the inputs' dtype, those of another that is not float32,
# scalars that are floats, and sizes that need not be multiples of 16
OPERANDS = set(
    "a b out_a out_b d dd teacher_a teacher_b tokens student teacher dstudent grad bias q k v k2 v2 out d_out".split()
    + "dq dk dv dk2 dv2".split()
)
POINTERS = {"mask": "*u8", "seen": "*u8"} | {
    name: dtype
    for dtype, names in (
        ("*i32", "row_label col_label lo hi lo2 hi2 spans"),
        ("*i64", "positives exclude row_labels col_labels targets seed chunks tensors"),
    )
    for name in names.split()
}
FLOATS = set("scale keep_scale unit smoothing z_loss max_norm weight decay share positive_share".split())
ODD = set(
    "M N T N1 first_row first_part tiles_m tiles_n total_rows rows_a rows_b K H groups threshold offset".split()
    + "V B C Q first_owner last_owner".split()
)


def matrix_tiles(config: Launch, flags: Mapping[str, Any]) -> dict[str, list[int]]:
    """By argument, the blocks of descriptors where tiles are read or written by those."""
    rows, columns = [config.block_m, config.block_d], [config.block_n, config.block_d]
    width = config.block_n // (2 if flags["IN_HALVES"] else 1)
    return {"a": rows, "teacher_a": rows, "b": columns, "teacher_b": columns, "grad": [config.block_m, width]}


def token_tiles(config: Launch, flags: Mapping[str, Any]) -> dict[str, list[int]]:
    """As `matrix_tiles`."""
    of_rows = [config.block_m // flags["BLOCK_Q"], flags["BLOCK_Q"]]
    tiles = {"tokens": [*of_rows, config.block_d], "b": [config.block_n, config.block_d]}
    return tiles | ({"grad": [config.block_n, *of_rows]} if flags["IN_VECTORS"] else {})


@dataclass(frozen=True, eq=False)
class Case:
    """A kernel as it is launched.

    Attributes:
        name: the op, and its variant.
        kernel: the jitted function.
        row: the name of its rows in the table.
        table: its op's launch table.
        constants: its flags and its inner strides.
        pointers: of names that elsewhere are of another type.
        is_odd: whether sizes that are no multiples of 16 are compiled too.
        products: whether it multiplies matrices.
        product_rows: which side of the tile is the rows of its products.
        elements: the operands' dtypes; bfloat16 and float16 differ in nothing that costs.
        tiles: the blocks of its descriptors.
    """

    name: str
    kernel: Any
    row: str
    table: Table
    constants: Mapping[str, Any]
    pointers: Mapping[str, str] = field(default_factory=dict)
    is_odd: bool = True
    products: bool = True
    product_rows: str = "block_m"
    elements: tuple[str, ...] = ("bf16", "fp16", "fp32", "i64")
    tiles: Callable[[Launch, Mapping[str, Any]], dict[str, list[int]]] = matrix_tiles

    def rows(self) -> list[tuple[str, int, int]]:
        return [row for row in self.table if row[0] == self.row]

    def type_of(self, argument: str, element: str, config: Launch, flags: Mapping[str, Any]) -> str:
        """A tile that is read or written by a descriptor, or as all that is, by a pointer."""
        if not argument.endswith("_ptr") and argument in OPERANDS:
            tiles = self.tiles(config, flags) if flags["DESCRIBED"] else {}
            return f"tensordesc<{element}{tiles[argument]}>" if argument in tiles else f"*{element}"
        if not argument.endswith("_ptr"):
            return "fp32" if argument in FLOATS else "i32"
        name = argument.removesuffix("_ptr")
        return {**POINTERS, **self.pointers}.get(name, f"*{element}" if name in OPERANDS else "*fp32")


def named(op: str, flags: Mapping[str, Any]) -> str:
    return op + "".join(f"-{flag}={value}" for flag, value in flags.items())


def on(flags: str) -> dict[str, bool]:
    return dict.fromkeys(flags.split(), True)


def constant_table(row: str, sizes: tuple[int, ...], config: Launch) -> Table:
    """The rows of a kernel that is launched alike for dtypes of these sizes and for every architecture."""
    return {(row, size, arch): config for size in sizes for arch in (80, 90, 100)}


def contrastive_case(row: str, **flags: bool) -> Case:
    """A contrastive kernel with positives anywhere, in both directions, of all columns, but for the flags."""
    constants = on("SYMMETRIC HAS_POSITIVES HAS_GRAD") | {"HAS_EXCLUDE": False, "DIAGONAL": False, "PARTS": 128}
    constants |= {"HAS_TEACHER": row.endswith("teacher"), "ALWAYS": row.endswith("teacher"), "EXACT": "_" in row}
    kernel = contrastive._contrastive_fwd_kernel if row.startswith("fwd") else contrastive._contrastive_bwd_kernel
    name = named("contrastive", flags)
    elements = ("bf16", "fp32") if "HAS_EXCLUDE" in flags else Case.elements
    return Case(name, kernel, row, CONTRASTIVE_TABLE, constants | flags, {"scale": "*fp64"}, elements=elements)


def contrastive_vector_case(row: str, sizes: tuple[int, ...], **flags: Any) -> Case:
    """A kernel beside those of tiles."""
    constants = on("SYMMETRIC HAS_POSITIVES HAS_GRAD NEEDS_A NEEDS_B") | {"DIAGONAL": False, "HAS_TEACHER": False}
    constants |= {
        "EXACT": False,
        "ALWAYS": False,
        "PARTS": 128,
        "PAIRS": True,
        "BLOCK": CONTRASTIVE_BLOCK,
        "BLOCK_M": 128,
    }
    constants |= {"BLOCK_N": 256, "BLOCK_R": CONTRASTIVE_BLOCK_R, "BLOCK_D": CONTRASTIVE_BLOCK_D}
    module = contrastive_state if row == "bounds" else contrastive_vectors
    table = constant_table(row, sizes, Launch(16, 16, 16, COMBINE_WARPS if row == "combine" else 4, 3))
    pointers = {"da": "*fp32", "db": "*fp32"} | ({} if row == "pairs_grad" else {"scale": "*fp64"})
    kernel = getattr(module, f"_contrastive_{row}_kernel")
    return Case(named("contrastive", flags), kernel, row, table, constants | flags, pointers, products=False)


def attention_case(row: str, size: int, few: str = "", /, **flags: Any) -> Case:
    """An attention kernel at the largest head dimension of a row, which it has with a vector of keys too."""
    off = dict.fromkeys(("HAS_SLOPES", "HAS_DROPOUT", "HAS_SEGMENTS", "HAS_SEEN", "HEADS_FIRST"), False)
    rich = "_rich" if "BIAS" in flags else ""
    return Case(
        named("attention", flags),
        ATTENTION[row],
        f"{row}{rich}{few}_{size}",
        ATTENTION_TABLE,
        {"NUM_ENDS": 2, "BIAS": "none", **off, **flags, "BLOCK_K": size},
        {"bias": "*u8"},
        is_odd=not flags,
        product_rows="block_n" if row == "bwd_k" else "block_m",
        elements=("bf16",) if "HAS_SEEN" in flags else ("bf16", "fp32"),
    )


def rows_case(row: str, kernel: Any, **constants: Any) -> Case:
    """A kernel of attention that only reads rows."""
    table = constant_table(row, (2, 4), Launch(READ_ROWS, 16, 16, 4, 1))
    return Case(f"attention-{row}", kernel, row, table, {**constants, "HEADS_FIRST": False}, products=False)


def lists_case(row: str, dtypes: str, name: str = "", **constants: Any) -> Case:
    """Of all combinations of the lists' dtypes: 0 for none, 1 float32, 2 float16, 3 bfloat16, 4 bytes."""
    digits = product(*(map(int, kinds) for kinds in dtypes.split()))
    kinds = tuple(sum(d << (DIGIT_BITS * i) for i, d in enumerate(combination)) for combination in digits)
    constants = {"KINDS": kinds, "BLOCK": CHUNK, **constants}
    kernel = getattr(lists, f"_{row}_kernel")
    pointers = {"factors": "*fp64", "sums": "*fp64"}
    num_warps = ADAMW_WARPS if row == "adamw_update" else NUM_WARPS
    table = constant_table(row, (8,), Launch(CHUNK, 16, 16, num_warps, 1))
    return Case(f"{row}{name}", kernel, row, table, constants, pointers, products=False)


def sigmoid_case(row: str, **flags: Any) -> Case:
    """With the gradient of a mean or a sum, all of it, but for the flags."""
    constants = on("HAS_GRAD HAS_SUMS") | {"HAS_LABELS": False, "HAS_COEF": False, "UNIT": 1.0, **flags}
    return Case(named("sigmoid", flags), sigmoid._sigmoid_fwd_kernel, row, SIGMOID_TABLE, constants)


def sigmoid_vector_case(row: str, **flags: Any) -> Case:
    """A kernel beside that of tiles."""
    constants = on("HAS_SUMS NEEDS_A NEEDS_B NEEDS_SCALE NEEDS_BIAS") | {"HAS_LABELS": False, "UNIT": 2.0**14, **flags}
    constants |= {"HAS_COEF": False, "BLOCK_M": 128, "BLOCK_R": SIGMOID_BLOCK_R, "BLOCK_D": SIGMOID_BLOCK_D}
    pointers = {"da": "*fp32", "db": "*fp32", "out": "*fp64", "totals": "*fp64"}
    table = constant_table(row, (2, 4), Launch(16, 16, 16, 4, 3))
    kernel = getattr(sigmoid, f"_sigmoid_{row}_kernel")
    return Case(named("sigmoid", flags), kernel, row, table, constants, pointers, products=False)


def token_case(row: str, block_q: int, *, is_whole: bool, is_single: bool) -> Case:
    """Of tokens that come in whole blocks, or do not, and in one block; the latter's gradient by a descriptor."""
    constants = dict.fromkeys(("HAS_MASK", "HAS_LABELS", "HAS_TOTALS"), not is_whole) | {"BLOCK_Q": block_q}
    constants |= on("HAS_POSITIVES HAS_GRAD") | {"IS_WHOLE": is_whole, "IS_SINGLE": is_single}
    constants["IN_VECTORS"] = is_single
    name = f"token_contrastive-{block_q}{'' if is_single else '-blocks'}"
    return Case(name, TOKENS[row], row, TOKENS_TABLE, constants, tiles=token_tiles)


def token_combine_case() -> Case:
    constants = on("HAS_POSITIVES HAS_LABELS HAS_TOTALS") | {"BLOCK_N": 128, "ROWS": 4, "BLOCK": TOKENS_BLOCK}
    table, kernel = (
        constant_table("combine", (4,), Launch(16, 16, 16, 4, 3)),
        token_vectors._token_contrastive_combine_kernel,
    )
    return Case("token_contrastive", kernel, "combine", table, constants, products=False)


def cross_entropy_case(name: str, flag: bool) -> Case:
    constants: dict[str, Any] = dict.fromkeys(("HAS_BIAS", "HAS_MEAN", "HAS_GRAD"), flag)
    kernel = linear_cross_entropy._linear_cross_entropy_fwd_kernel
    table = constant_table("fwd", (2, 4), CROSS_ENTROPY_LAUNCH)
    return Case(f"linear_cross_entropy[{name}]", kernel, "fwd", table, constants, products=False)


def maxsim_case(row: str, has_mask: bool = True) -> Case:
    """A gradient's upstream is float32, as are its parts for the queries."""
    constants: dict[str, Any] = {"HAS_MASK": has_mask, "HAS_BEST": has_mask, "IS_WHOLE": row != "fwd_wide"}
    pointers = {"best": "*i16" if has_mask else "*i32", "grad": "*fp32", "dq": "*fp32"}
    if row == "bwd_q":
        table = constant_table(row, (2, 4), MAXSIM_BWD_Q)
        return Case("maxsim", maxsim._maxsim_bwd_q_kernel, row, table, {}, pointers, products=False)
    kernel = maxsim._maxsim_bwd_d_kernel if row.startswith("bwd_d") else maxsim._maxsim_fwd_kernel
    # of the documents' gradient a tile's rows are its width
    of_rows = "block_d" if row.startswith("bwd_d") else "block_m"
    return Case(f"maxsim[{has_mask}]", kernel, row, MAXSIM_TABLE, constants, pointers, product_rows=of_rows)


def distill_case(row: str, centered: bool) -> Case:
    name, constants = f"distill[HAS_CENTER={centered}]", {"HAS_CENTER": centered}
    table = constant_table(row, (2, 4), DISTILL_LAUNCH)
    return Case(name, DISTILL[row], row, table, constants, {"grad": "*fp32"}, products=False)


EVERYTHING = {"NUM_ENDS": 4, "BIAS": "bool"} | on("HAS_SLOPES HAS_DROPOUT HAS_SEGMENTS")
ATTENTION = {
    "fwd": attention._attention_fwd_kernel,
    "bwd_q": attention_bwd._attention_bwd_q_kernel,
    "bwd_k": attention_bwd._attention_bwd_k_kernel,
}
TOKENS = {
    "fwd": token_contrastive._token_contrastive_fwd_kernel,
    "bwd": token_contrastive._token_contrastive_bwd_kernel,
}
DISTILL = {"fwd": distill._distillation_loss_fwd_kernel, "bwd": distill._distillation_loss_bwd_kernel}
MULTI_TENSOR = (
    lists_case("ema_update", "13 123 03", STOCHASTIC=False),
    lists_case("ema_update", "3 13 03", "-stochastic", STOCHASTIC=True),
    lists_case("adamw_update", "1 13 1 1 01 0 0"),
    lists_case("adamw_update", "1 3 1 1 1 3 03", "-copies"),
    lists_case("squares", "123"),
    lists_case("clip", "123"),
    lists_case("fisher_accumulate", "1 123"),
    lists_case("ewc_penalty_fwd", "13 13 1"),
    lists_case("ewc_penalty_bwd", "1 1 1 1"),
    lists_case("ewc_penalty_bwd", "3 13 1 3", "-bfloat16"),
    lists_case("apply_masks", "123 4"),
)
NO_GRAD = {"HAS_GRAD": False, "HAS_SUMS": False}
SIGMOID = on("HAS_LABELS HAS_COEF")
# the loss of pairs, whose positives are on the diagonal, and statistics
CONTRASTIVE = ({"DIAGONAL": True}, {}, {"SYMMETRIC": False})
COMBINED = ({"DIAGONAL": True}, {"EXACT": True}, {"EXACT": True, "HAS_TEACHER": True, "ALWAYS": True})
CASES = (
    *(attention_case(*row, **flags) for row in product(ATTENTION, (64, 128, 256)) for flags in ({}, EVERYTHING)),
    *(attention_case(*row, HAS_SEEN=True) for row in product(ATTENTION, (64, 128, 256))),
    *(attention_case(row, 64, "_few", **flags) for row in ATTENTION for flags in ({}, EVERYTHING)),
    rows_case("rows", attention_rows._attention_rows_kernel, HAS_DLSE=True, BLOCK_K=256),
    rows_case("spans", attention_rows._attention_spans_kernel, NUM_ENDS=4),
    *MULTI_TENSOR,
    *(contrastive_case(row, **flags) for row in ("fwd", "bwd") for flags in CONTRASTIVE),
    *(contrastive_case(f"{row}_exact", ALWAYS=flag) for row in ("fwd", "bwd") for flag in (True, False)),
    *(contrastive_case(f"{row}_teacher") for row in ("fwd", "bwd")),
    *(contrastive_case(row, HAS_EXCLUDE=True) for row in ("fwd", "bwd")),
    *(contrastive_case(f"{row}_exact", HAS_EXCLUDE=True, ALWAYS=False) for row in ("fwd", "bwd")),
    *(contrastive_case(f"{row}_teacher", HAS_EXCLUDE=True) for row in ("fwd", "bwd")),
    contrastive_vector_case("bounds", (2, 4), HAS_TEACHER=True),
    *(contrastive_vector_case("combine", (4,), **flags) for flags in COMBINED),
    contrastive_vector_case("weights", (4,)),
    contrastive_vector_case("weights", (4,), HAS_TEACHER=True, ALWAYS=True),
    contrastive_vector_case("pairs_grad", (2, 4)),
    *(sigmoid_case("fwd", **flags) for flags in ({}, NO_GRAD)),
    *(sigmoid_case("fwd_rich", **flags) for flags in ({"HAS_LABELS": True}, {"HAS_COEF": True}, SIGMOID)),
    *(sigmoid_vector_case(row) for row in ("rows", "bwd")),
    cross_entropy_case("gradient", True),
    cross_entropy_case("statistics", False),
    *(maxsim_case(f"fwd_{size}", flag) for size in (64, 128, 256, "wide") for flag in (True, False)),
    maxsim_case("bwd_q"),
    maxsim_case("bwd_d"),
    maxsim_case("bwd_d", False),
    maxsim_case("bwd_d_64"),
    *(distill_case(*case) for case in product(DISTILL, (True, False))),
    *(token_case(row, 32, is_whole=True, is_single=True) for row in TOKENS),
    *(token_case(row, 16, is_whole=False, is_single=True) for row in TOKENS),
    *(token_case(row, 32, is_whole=False, is_single=False) for row in TOKENS),
    token_combine_case(),
)
