"""Bugs to plant in the token-contrastive paths: each is one edit of a path's source, which the contract must see."""

from dataclasses import replace

from mmkernels.token_contrastive import blockwise, kernel, op
from mmkernels.token_contrastive.spec import LOSS, RECTANGLE, STATS
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "wrong factor on gradients": ("            dx.mul_(scale)\n", "            dx.mul_(1)\n"),
    "wrong factor on logits": ("logits = cosines.mul_(float(problem.scale))", "logits = cosines"),
    "last column left out": ("range(0, num_cols, cols)", "range(0, num_cols - 1, cols)"),
    "missing cast": (".view(num_rows, num_tokens, -1)", ".half().float().view(num_rows, num_tokens, -1)"),
    "positive's gradient lost": ("torch.where(inside, weight, 0)", "torch.where(inside, 0 * weight, 0)"),
    "gradient to the last of the best": (
        "torch.arange(size, 0, -1, dtype",
        "torch.arange(1, size + 1, dtype",
    ),
    "gradient to another row's token": ("alpha=stride", "alpha=0"),
    "columns' totals ignored": ("grad += weights.col_total", "grad += 0 * weights.col_total"),
    "rows' labels ignored": ("weights.row_matched[:, None], 0)", "weights.row_matched[:, None] * 0, 0)"),
    "mean of the scale's gradient lost": ("center * grad_total", "0 * grad_total"),
    "masked tokens compete": ("products.masked_fill_(~block.tokens_mask[:, :, None], -torch.inf)", ""),
    "a masked row keeps its logits": (
        ".masked_fill_(~block.tokens_mask.any(1, keepdim=True), 0)\n\n",
        "\n\n",
    ),
}
KERNEL = {
    "wrong factor on dtokens": ("product.mul_(problem.scale)", "product"),
    "wrong factor on logits": ("logits = best * scale", "logits = best"),
    "unwritten column": (
        "tl.store(col_ptrs + stride_ck, col_sum, mask=mask_n)",
        "tl.store(col_ptrs + stride_ck, col_sum, mask=offs_n < N - 1)",
    ),
    # rounding the logits stands for an accumulator of the operands' dtype, which the interpreter ignores
    "missing cast": ("logits = best * scale", "logits = (best * scale).to(tl.float16).to(tl.float32)"),
    "rows outside counted in column sums": (
        "tl.where(mask_m[None, :], logits, float",
        "tl.where(True, logits, float",
    ),
    "columns outside counted in row sums": (
        "tl.where(mask_n[:, None], logits, float",
        "tl.where(True, logits, float",
    ),
    "sums not rescaled to the new maximum": ("row_sum * tl.exp(row_max - new_max)", "row_sum"),
    "gradient to the last of the best": (
        "tl.min(tl.where(products == largest[:, :, None], offs_q[None, None, :], Q - 1), 2)",
        "tl.minimum(tl.max(tl.where(products == largest[:, :, None], offs_q[None, None, :], 0), 2), Q - 1)",
    ),
    "a later block of tokens wins ties": ("largest > best", "largest >= best"),
    "gradient's unit not taken back": ("db.div_(unit)", "db.div_(1)"),
    "second chunk's rows forgotten": ("stats.of_rows(rows), weights", "stats, weights"),
    "one split's columns skipped": (
        "first_n = pid_n * cols_per_split",
        "first_n = pid_n * cols_per_split + pid_n",
    ),
    "rows' labels ignored": ("row_matched[None, :] + col_matched", "0 * row_matched[None, :] + col_matched"),
    "columns' totals of the last program alone": ("[x[2].sum(0) for x", "[x[2][-1] for x"),
    "masked tokens compete": ("tl.where((counts != 0)[None, :]", "tl.where((counts >= 0)[None, :]"),
}
TIES = replace(STATS, cases=("ties",))
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    checks=(
        (STATS, STATS.shapes[-1]),
        (TIES, STATS.shapes[-2]),
        (RECTANGLE, RECTANGLE.shapes[0]),
        (LOSS, LOSS.shapes[-1]),
    ),
)
# of late interaction, which has one path: every device runs it
LATE_BUGS = {
    "wrong factor on gradients": ("dx.mul_(scale)", "dx.mul_(1)"),
    "wrong factor on the columns' logits": (
        "tile.col_cosines * scale\n        fold",
        "tile.col_cosines\n        fold",
    ),
    "rows' maximum over the wrong tokens": (
        "of_tokens = products.amax(3).masked",
        "of_tokens = products.amin(3).masked",
    ),
    "masked tokens count in the mean": (
        "token_share = counts_q /",
        "token_share = 1.0 * tokens_mask[:, :, None] /",
    ),
    "masked tokens compete": ("masked_fill_(~(tokens_mask[:, :, None, None] & b_mask), -torch.inf)", "abs()"),
    "columns' positives ignored": ("sums.add_cols(block, col_logits, of_rows, of_cols)", "pass"),
    "rows' gradient of b lost": ("scatter_sums(db, index.T", "scatter_sums(0 * db, index.T"),
    "columns' gradient of the tokens lost": (
        "scatter_sums(dtokens, index",
        "scatter_sums(0 * dtokens, index",
    ),
    "gradient to another row's token": ("tile.products.shape[1], 0)", "0, 0)"),
    "mean of the scale's gradient lost": ("center * grad_total", "0 * grad_total"),
}
