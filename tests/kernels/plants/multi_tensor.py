"""Bugs to plant in the multi-tensor paths: each is one edit of a path's source, which the contract must see."""

from collections.abc import Mapping

from mmkernels._spec import OpSpec, Shape
from mmkernels.multi_tensor import blockwise, kernel
from mmkernels.multi_tensor import paths as op
from mmkernels.multi_tensor.spec import AVERAGED, EMA, SHADOWED
from mmkernels.multi_tensor.table import CHUNK
from tests.kernels.plants.plant import Plants

Bugs = Mapping[str, tuple[str, str]]

EMA_BLOCKWISE = {
    "wrong factor": ("source.to(wide), weight.to(wide)", "source.to(wide), 1.01 * weight.to(wide)"),
    "unwritten part": ("range(0, like.numel(), PART)", "range(PART, like.numel(), PART)"),
    "missing cast": ("target.to(wide), source.to(wide)", "target.half().to(wide), source.to(wide)"),
    "a shadow of the source": ("shadow.copy_(mean)", "shadow.copy_(source)"),
    "first tensor alone": ("tensors[number]", "tensors[0]"),
}
ADAMW_BLOCKWISE = {
    "no weight decay": ("keep * param", "param"),
    "the new moment of the old gradient": ("g = grad.to(wide)", "g = param.to(wide)"),
    "a moment without its fall": ("fall * g * g", "g * g"),
    "no root": ("root * v.sqrt()", "root * v"),
    "no bias correction": ("root * v.sqrt()", "v.sqrt()"),
    "eps inside": ("v.sqrt() + eps", "(v + eps).sqrt()"),
    "no clamp": ("p = p.clamp(low, high)", "p = p * 1"),
    "an average of the old": (
        "mean = torch.lerp(average.to(wide), p",
        "mean = torch.lerp(average.to(wide), g",
    ),
}
EMA_KERNEL = {
    "wrong factor": ("target + weight * step", "target + 1.01 * weight * step"),
    "unwritten part": ("mask=offs < n)\n", "mask=offs < n - 1)\n"),
    "missing cast": (
        "tl.store(ptr + offs, x.to(ptr.dtype.element_ty)",
        "tl.store(ptr + offs, x.to(tl.float16).to(ptr.dtype.element_ty)",
    ),
    "a shadow of the source": ("mean, offs, n, 2", "source, offs, n, 2"),
    "whole chunks zeroed": ("x.to(ptr.dtype.element_ty))\n", "(0 * x).to(ptr.dtype.element_ty))\n"),
    "one kind alone": ("if kind == KINDS[i]:", "if kind == 9 and kind == KINDS[i]:"),
    "first chunk alone": ("tl.pointer_type(dtype)) + first", "tl.pointer_type(dtype))"),
}
ADAMW_KERNEL = {
    "no weight decay": ("p = keep * p", "p = p"),
    "a moment without its fall": ("fall * g * g", "g * g"),
    "no root": ("root * tl.sqrt_rn(v)", "root * v"),
    "no bias correction": ("root * tl.sqrt_rn(v)", "tl.sqrt_rn(v)"),
    "eps left out": ("tl.sqrt_rn(v) + eps", "tl.sqrt_rn(v) + 1e-3"),
    "no clamp": ("tl.where(p < low, low, tl.where(p > high, high, p))", "tl.where(p < low, low, p)"),
    "an average of the gradient": ("_mean(average, p", "_mean(average, g"),
    "copies of the average": ("_store(row_ptr, first, p, offs, n, 5", "_store(row_ptr, first, m, offs, n, 5"),
}


def _plants(blockwise_bugs: Bugs, kernel_bugs: Bugs, *checks: tuple[OpSpec, Shape]) -> Plants:
    paths = {"blockwise": blockwise, "kernel": kernel}
    return Plants(op, paths, {"blockwise": blockwise_bugs, "kernel": kernel_bugs}, checks)


EMA_PLANTS = _plants(
    EMA_BLOCKWISE, EMA_KERNEL, (EMA, {"N": 3, "L": CHUNK + 40}), (SHADOWED, {"N": 2, "L": 50})
)
ADAMW_PLANTS = _plants(ADAMW_BLOCKWISE, ADAMW_KERNEL, (AVERAGED, {"N": 2, "L": 500}))
