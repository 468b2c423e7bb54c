"""Bugs to plant in the multi-tensor paths: each is one edit of a path's source, which the contract must see."""

from mmkernels.multi_tensor import blockwise, kernel, op
from mmkernels.multi_tensor.spec import EMA, SHADOWED
from mmkernels.multi_tensor.table import CHUNK
from tests.kernels.plants.plant import Plants

BLOCKWISE = {
    "wrong factor": ("weight.to(wide))", "1.01 * weight.to(wide))"),
    "unwritten part": ("range(0, target.numel(), PART)", "range(PART, target.numel(), PART)"),
    "missing cast": ("target.to(wide), source.to(wide)", "target.half().to(wide), source.to(wide)"),
    "a shadow of the source": ("x.copy_(mean)", "x.copy_(source)"),
    "first tensor alone": ("tensors[number]", "tensors[0]"),
}
KERNEL = {
    "wrong factor": ("target + weight * step", "target + 1.01 * weight * step"),
    "unwritten part": ("mask=offs < n)\n", "mask=offs < n - 1)\n"),
    "missing cast": (
        "tl.store(ptr + offs, x.to(ptr.dtype.element_ty)",
        "tl.store(ptr + offs, x.to(tl.float16).to(ptr.dtype.element_ty)",
    ),
    "a shadow of the source": ("WHOLE), mean, offs, n", "WHOLE), source, offs, n"),
    "whole chunks zeroed": ("x.to(ptr.dtype.element_ty))\n", "(0 * x).to(ptr.dtype.element_ty))\n"),
    "one kind alone": ("if kind == KINDS[i]:", "if kind == 5 and kind == KINDS[i]:"),
}
PLANTS = Plants(
    op=op,
    paths={"blockwise": blockwise, "kernel": kernel},
    bugs={"blockwise": BLOCKWISE, "kernel": KERNEL},
    checks=((EMA, {"N": 3, "L": CHUNK + 40}), (SHADOWED, {"N": 2, "L": 50})),
)
