"""Bugs to plant in the contrastive paths: each is one edit of a path's source, which the contract must see."""

from mmkernels.contrastive import blockwise, kernel, op
from mmkernels.contrastive.spec import LOSS, STATS, VARIANTS
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "wrong factor on da": ("            dx.mul_(scale)", "            dx.mul_(1.001 * scale)"),
    "wrong factor on logits": ("fold_tile(cosines, scale,", "fold_tile(cosines, 1.001 * scale,"),
    "unwritten column": ("for c in range(0, num_cols, width)", "for c in range(0, num_cols - 1, width)"),
    # in the accumulator's dtype: an operand that is not widened has no such tile
    "missing cast": (
        "        cosines = _cosines(problem, of_rows, of_cols)\n        if",
        "        cosines = _cosines(problem, of_rows, of_cols).half().to(a.dtype)\n        if",
    ),
    "wrong factor on the teacher's expectation": (
        "scale * teacher_row.cross / teacher_row.sum",
        "1.001 * scale * teacher_row.cross / teacher_row.sum",
    ),
    "the teacher's expectation of its own logits": (
        "values=cosines",
        "values=of_teacher",
    ),
    "positive counted twice": (
        "None if problem.positives is None else problem.positives[of_rows] - of_cols.start,",
        "None,",
    ),
    "positives of the first tile taken for all": (
        "problem.positives[of_rows] - of_cols.start, scale",
        "problem.positives[of_rows], scale",
    ),
    "teacher's share of dL/dS lost": ("    out.add_(of_teacher)\n", ""),
    "teacher's share of the scale's gradient lost": ("return total + cosines", "return total + 0 * cosines"),
    "positives' gradient of b lost": (
        "add_positives(problem, coefs, da, db, center)",
        "add_positives(problem, coefs, da, None, center)",
    ),
    "mean of the scale's gradient lost": ("+ center * grad_total(grads)", ""),
}
KERNEL = {
    "wrong factor on da": (
        "            dx.mul_(problem.scale)",
        "            dx.mul_(1.001 * problem.scale)",
    ),
    "wrong factor on logits": ("            logits = acc * scale\n", "            logits = acc\n"),
    "unwritten column": (
        "tl.store(col_ptrs + stride_plane, col_sum, mask=mask_n)",
        "tl.store(col_ptrs + stride_plane, col_sum, mask=mask_n & (tl.arange(0, 32) < 31))",
    ),
    # rounding the logits stands for an accumulator of the operands' dtype, which the interpreter ignores
    "missing cast": (
        "            logits = acc * scale\n",
        "            logits = (acc * scale).to(tl.float16).to(tl.float32)\n",
    ),
    "rows outside counted in column sums": (
        "logits = tl.where(inside, logits,",
        "logits = tl.where(mask_n[None, :], logits,",
    ),
    "columns outside counted in row sums": (
        "logits = tl.where(inside, logits,",
        "logits = tl.where(mask_m[:, None], logits,",
    ),
    "sums not rescaled to the new maximum": ("new_sum = old_sum * shrink", "new_sum = old_sum"),
    "expectation not rescaled to the new maximum": (
        "new_cross = old_cross * shrink",
        "new_cross = old_cross",
    ),
    "positive counted twice": ("tl.where(offs_n[None, :] == place[:, None], 0.0, grad)", "grad"),
    "gradient's unit not taken back": (
        "torch.div(matmul_fp32(part, b), unit,",
        "torch.div(matmul_fp32(part, b), 1,",
    ),
    "second chunk's rows those of the first": (
        "part = problem.of_rows(rows)",
        "part = problem.of_rows(slice(0, rows.stop - rows.start))",
    ),
    "one split's columns skipped": (
        "first_n = pid_n * cols_per_split",
        "first_n = pid_n * cols_per_split + pid_n",
    ),
    "teacher's share of dL/dS lost": ("        grad += _softmaxes(", "        _softmaxes("),
    "shift forgotten": ("tl.exp(logits - tl.load(shift_ptr))", "tl.exp(logits)"),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    checks=(
        (STATS, STATS.shapes[1]),
        (STATS, STATS.shapes[-1]),
        (LOSS, LOSS.shapes[-1]),
        (VARIANTS[-1], VARIANTS[-1].shapes[-1]),
    ),
)
