"""Bugs to plant in the paths of linear cross-entropy: each is one edit of a path's source, which the contract
must see."""

from mmkernels.linear_cross_entropy import blockwise, kernel, op
from mmkernels.linear_cross_entropy.spec import BIAS, PLAIN, ROWS, SMOOTHING_Z
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "wrong factor on dh": (
        "dh.addcmul_(widen(weight[targets]), coef[:, None])",
        "dh.addcmul_(widen(weight[targets]), 0.5 * coef[:, None])",
    ),
    "unwritten column": (
        "enumerate(range(0, len(weight), cols))",
        "enumerate(range(0, len(weight) - cols, cols))",
    ),
    # rounding the logits stands for an accumulator of the operands' dtype
    "missing cast": (
        "matmul_nt(h, widen(weight[of_cols]))",
        "matmul_nt(h, widen(weight[of_cols])).bfloat16().to(h.dtype)",
    ),
    "target counted twice": ("None, of_rows - c, None, tile)", "None, None, None, tile)"),
    "a later chunk overwrites dw": ("out.add_(part) if first_row else out.copy_(part)", "out.copy_(part)"),
    "half of the z-loss's gradient lost": ("of_z = 2 * z_loss * lse", "of_z = z_loss * lse"),
    "smoothing of the target lost": (".add_(label_smoothing)", ""),
    "first tile's bias in every tile": ("widen(bias[of_cols])", "widen(bias[: tile.shape[1]])"),
    "target's logit from a later tile": ("(at >= 0) & (at <= last)", "at <= last"),
    "target's share of db lost": ("_add_rows(db, targets, coef)", "_add_rows(db, targets, 0 * coef)"),
    "a repeated target counted once": ("out.index_add_(0, index, rows)", "out[index] += rows"),
    "z-loss of the loss lost": ("loss.add_(lse.square(), alpha=z_loss)", "loss"),
}
KERNEL = {
    "wrong factor on dh": ("out=dh_part, beta=0.0, alpha=1 / unit", "out=dh_part, beta=0.0, alpha=2 / unit"),
    "bias left out of the logits": (
        "logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]",
        "logits += 0.0",
    ),
    "unwritten column": (
        "mask=mask_m[:, None] & mask_v[None, :])",
        "mask=mask_m[:, None] & (offs_v < V - 1)[None, :])",
    ),
    "missing cast": (
        "grad.to(grad_ptr.dtype.element_ty)",
        "grad.to(tl.float16).to(grad_ptr.dtype.element_ty)",
    ),
    "sums not rescaled to the new maximum": ("row_sum * tl.exp(old_shift - shift)", "row_sum"),
    "target counted twice": ("tl.where(offs_v[None, :] == target[:, None], 0.0, grad)", "grad"),
    "columns outside counted in the sums": ('other=float("-inf"))', "other=0.0)"),
    "gradient's unit not taken back": (
        "grad.sum(0, dtype=db.dtype).div_(unit)",
        "grad.sum(0, dtype=db.dtype)",
    ),
    "a later chunk overwrites dw": ("beta=float(first > 0)", "beta=0.0"),
    "half of the z-loss's gradient lost": ("(1 + 2 * z_loss * lse)", "(1 + z_loss * lse)"),
    "second chunk's targets forgotten": (
        "h, of_rows = hidden[rows], targets[rows]",
        "h, of_rows = hidden[rows], targets[: len(hidden[rows])]",
    ),
    "upstream gradient ignored": ("coef[rows] * unit", "coef[rows] * 0 + unit"),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    checks=tuple((spec, spec.shapes[-1]) for spec in (PLAIN, BIAS, SMOOTHING_Z, ROWS)),
)
