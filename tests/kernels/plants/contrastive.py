"""Bugs to plant in the contrastive paths: each is one edit of a path's source, which the contract must see."""

from mmkernels.contrastive import blockwise, kernel, op
from mmkernels.contrastive.spec import LOSS, STATS
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "wrong factor on da": (
        "da.addcmul_(b[of_positives], coef).mul_(alpha)",
        "da.addcmul_(b[of_positives], coef)",
    ),
    "wrong factor on logits": ("matmul_nt(a_tile, b_tile).mul_(alpha)", "matmul_nt(a_tile, b_tile)"),
    "unwritten column": ("for c in range(0, num_cols, cols)", "for c in range(0, num_cols - 1, cols)"),
    "missing cast": ("    a, b, alpha = widen(a), widen(b), float(scale)\n", "    alpha = float(scale)\n"),
    "sums not rescaled to the new maximum": ("mul_(running_max.sub_(new_max).exp_())", "mul_(1)"),
    "positive counted twice": ("            diagonal.zero_()\n", ""),
    "column share of the positive lost": ("from_rows.add_(from_cols)", "from_rows"),
    "upstream gradient of columns ignored": ("col_coef = d_col *", "col_coef = 0 * d_col *"),
    "offset ignored in db": ("db[of_positives].addcmul_", "db[:num_rows].addcmul_"),
    "mean of the scale's gradient lost": ("dscale *= center", "dscale *= 0"),
}
KERNEL = {
    "wrong factor on da": ("da[rows] = product.mul_(scale)", "da[rows] = product"),
    "wrong factor on logits": ("            logits = acc * scale\n", "            logits = acc\n"),
    "unwritten column": (
        "tl.store(col_sum_ptr + col_base + offs_n, col_sum, mask=mask_n)",
        "tl.store(col_sum_ptr + col_base + offs_n, col_sum, mask=offs_n < N - 1)",
    ),
    # rounding the logits stands for an accumulator of the operands' dtype, which the interpreter ignores
    "missing cast": (
        "            logits = acc * scale\n",
        "            logits = (acc * scale).to(tl.float16).to(tl.float32)\n",
    ),
    "rows outside counted in column sums": (
        "tl.where(mask_m[:, None], logits, float",
        "tl.where(True, logits, float",
    ),
    "columns outside counted in row sums": (
        "tl.where(mask_n[None, :], logits, float",
        "tl.where(True, logits, float",
    ),
    "sums not rescaled to the new maximum": ("row_sum * tl.exp(row_max - new_max)", "row_sum"),
    "positive counted twice": ("tl.where(is_positive, 0.0, grad)", "grad"),
    "gradient's unit not taken back": ("matmul_fp32(part, b).div_(unit)", "matmul_fp32(part, b)"),
    "second chunk's offset forgotten": ("                first + offset,\n", "                offset,\n"),
    "one split's columns skipped": (
        "first_n = pid_n * cols_per_split",
        "first_n = pid_n * cols_per_split + pid_n",
    ),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    checks=((STATS, STATS.shapes[1]), (STATS, STATS.shapes[-1]), (LOSS, LOSS.shapes[-1])),
)
