"""Bugs to plant in the sigmoid loss's paths: each is one edit of a path's source, which the contract must see."""

from mmkernels.sigmoid import blockwise, kernel, op
from mmkernels.sigmoid.spec import LABELS, LOSS, ROWS
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "wrong factor on da and db": ("            dx.mul_(alpha)\n", "            pass\n"),
    "bias left out": ("float(scale), float(bias)", "float(scale), 0.0"),
    "unwritten columns": ("for c in range(0, len(b), TILE)", "for c in range(0, len(b) - 1, TILE)"),
    "missing cast": (
        "tile = matmul_nt(a[of_rows], b[of_cols])",
        "tile = matmul_nt(a[of_rows], b[of_cols]).half().to(a.dtype)",
    ),
    "row's labels of another tile": ("row_label[of_rows], col", "row_label[: of_rows.stop - r], col"),
    "loss of the last tile alone": ("loss[of_rows] += row_loss", "loss[of_rows] = row_loss"),
    "da of the last tile alone": ("da[of_rows] += matmul", "da[of_rows] = matmul"),
    "db of the last tile alone": ("db[of_cols] += matmul", "db[of_cols] = matmul"),
    "upstream gradient ignored": ("tile.mul_(coef[of_rows, None])", "tile.mul_(1)"),
    "scale's gradient of the first row alone": ("dscale += sums[2]", "dscale += sums[2] * (r == 0)"),
    "gradients of scale and bias exchanged": (
        "dscale if needs[2] else None, dbias if needs[3]",
        "dbias if needs[2] else None, dscale if needs[3]",
    ),
}
KERNEL = {
    "wrong factor on da and db": ("scale / GRAD_CEILING", "1 / GRAD_CEILING"),
    "gradient's unit not taken back": ("scale / GRAD_CEILING", "scale"),
    "bias left out": ("logits = acc * scale + bias", "logits = acc * scale"),
    # rounding the logits stands for an accumulator of the operands' dtype, which the interpreter ignores
    "missing cast": (
        "logits = acc * scale + bias",
        "logits = (acc * scale + bias).to(tl.float16).to(tl.float32)",
    ),
    "unwritten column": (
        "mask_m[:, None] & (offs_n < stride_gm)[None, :]",
        "mask_m[:, None] & (offs_n < N - 1)[None, :]",
    ),
    "unwritten row": ("tl.sum(losses, 1), mask=mask_m)", "tl.sum(losses, 1), mask=offs_m < M - 1)"),
    "columns outside counted": ("is_positive | (offs_n >= N)[None, :]", "is_positive"),
    "columns outside counted, with labels": ("tl.where(mask_n[None, :], tl.where", "tl.where(True, tl.where"),
    "positive counted twice": ("is_positive | (offs_n >= N)[None, :]", "(offs_n >= N)[None, :]"),
    "sign of a labelled positive lost": ("tl.where(is_positive, -grad, grad)", "grad"),
    "labels cut to 32 bits": (
        "torch.searchsorted(ordered, x.contiguous(), out_int32=True) for x",
        "x.int() for x",
    ),
    "upstream gradient ignored": ("grad * coef[:, None]", f"grad * {2.0**14}"),
    "second chunk's offset forgotten": ("of_rows, grad, first, any", "of_rows, grad, 0, any"),
    "db of the last chunk alone": ("db.add_(matmul_fp32", "db.copy_(matmul_fp32"),
    "positive's share of the sums lost": ("sums[:, rows] += _add", "sums[:, rows] += 0 * _add"),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    checks=(
        (LOSS, LOSS.shapes[-1]),
        (ROWS, ROWS.shapes[-1]),
        (LABELS, LABELS.shapes[1]),
        (LABELS, LABELS.shapes[-1]),
    ),
)
