"""Bugs to plant in the multi-tensor paths: each is one edit of a path's source, which the contract must see."""

from collections.abc import Mapping

from mmkernels._spec import OpSpec, Shape
from mmkernels.multi_tensor import blockwise, kernel
from mmkernels.multi_tensor import paths as op
from mmkernels.multi_tensor.spec import AVERAGED, CLIP, EMA, EWC, FISHER, MASKS, NORM, SHADOWED
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

NORM_BLOCKWISE = {
    "no squares": ("x.double().square().sum()", "x.double().sum()"),
    "last part alone": ("total += x.double()", "total = x.double()"),
    "no bound": ("(max_norm / (norm + 1e-6)).clamp(max=1)", "max_norm / (norm + 1e-6)"),
    "no eps": ("norm + 1e-6", "norm + 1e-3"),
    "clipped twice": ("factor.to(wide) * x.to(wide)", "factor.to(wide) ** 2 * x.to(wide)"),
    "what is clipped is kept": ("factor.is_cpu and factor == 1", "factor.is_cpu and factor < 1"),
}
NORM_KERNEL = {
    "no squares": ("tl.sum(x * x)", "tl.sum(x)"),
    "all chunks in one place": ("sums_ptr + tl.program_id(0), tl.sum(x", "sums_ptr, tl.sum(x"),
    "a scale that is not undone": (".to(tl.float64) * size * size", ".to(tl.float64) * size"),
    "a scale that is not done": ("x *= ((254 - exponent) << 23)", "x *= (127 + (exponent & 0) << 23)"),
    "no bound": ("tl.where(factor > 1, 1.0, factor)", "factor + 0"),
    "no eps": ("tl.load(norm_ptr) + 1e-6", "tl.load(norm_ptr) + 1e-3"),
    "clipped twice": ("first, factor * x", "first, factor * factor * x"),
    "what is clipped is kept": ("if factor != 1:", "if factor == 1:"),
}
EWC_BLOCKWISE = {
    "nothing fades": ("fisher.mul_(decay)", "fisher.mul_(1)"),
    "no weight": ("weight * g * g", "g * g"),
    "no squares of gradients": ("weight * g * g", "weight * g"),
    "no squares of steps": ("(fisher.double() * step * step)", "(fisher.double() * step)"),
    "all weights matter": ("(fisher.double() * step * step)", "(step * step)"),
    "missing cast": ("param.double() - anchor.double()", "param.half().double() - anchor.double()"),
    "no strength in the gradient": ("factor.to(wide) * fisher", "fisher"),
    "a gradient towards zero": ("param.to(wide) - anchor.to(wide)", "param.to(wide)"),
}
EWC_KERNEL = {
    "nothing fades": ("decay * fisher + weight", "fisher + weight"),
    "no weight": ("weight * grad * grad", "grad * grad"),
    "no squares of gradients": ("weight * grad * grad", "weight * grad"),
    "no squares of steps": ("tl.sum(fisher * step * step)", "tl.sum(fisher * step)"),
    "all weights matter": ("tl.sum(fisher * step * step)", "tl.sum(step * step)"),
    "all chunks in one place": ("sums_ptr + tl.program_id(0), tl.sum(f", "sums_ptr, tl.sum(f"),
    "no strength in the gradient": ("factor * fisher * (param", "fisher * (param"),
    "a gradient towards zero": ("factor * fisher * (param - anchor)", "factor * fisher * param"),
    "a gradient in place of the anchor": ("(param - anchor), offs, n, 3", "(param - anchor), offs, n, 1"),
}
MASKS_BLOCKWISE = {
    "nothing goes": ("x.masked_fill_(", "x.masked_fill("),
    "the first owner goes": ("mask < first", "mask <= first"),
    "the last owner goes": ("mask > last", "mask >= last"),
    "later owners stay": ("(mask < first) | (mask > last)", "mask < first"),
}
MASKS_KERNEL = {
    "nothing goes": ("tl.where(goes, 0, x)", "x"),
    "the first owner goes": ("owner < first_owner", "owner <= first_owner"),
    "the last owner goes": ("owner > last_owner", "owner >= last_owner"),
    "later owners stay": ("(owner > last_owner)", "(owner > 255)"),
    "every chunk is kept": ("tl.max(goes.to(tl.int32)) != 0", "tl.max(goes.to(tl.int32)) > 1"),
    "elements of the tensor's first": (
        "_load_stored(row_ptr, first, offs, n, 0",
        "_load_stored(row_ptr, 0, offs, n, 0",
    ),
}


def _plants(
    blockwise_bugs: Bugs, kernel_bugs: Bugs, *checks: tuple[OpSpec, Shape], cases: tuple[str, ...] = ()
) -> Plants:
    paths = {"blockwise": blockwise, "kernel": kernel}
    return Plants(op, paths, {"blockwise": blockwise_bugs, "kernel": kernel_bugs}, checks, cases)


EMA_PLANTS = _plants(
    EMA_BLOCKWISE, EMA_KERNEL, (EMA, {"N": 3, "L": CHUNK + 40}), (SHADOWED, {"N": 2, "L": 50})
)
ADAMW_PLANTS = _plants(ADAMW_BLOCKWISE, ADAMW_KERNEL, (AVERAGED, {"N": 2, "L": 500}))
PAIR = {"N": 2, "L": CHUNK + 40}
NORM_PLANTS = _plants(
    NORM_BLOCKWISE, NORM_KERNEL, (NORM, PAIR), (CLIP, {"N": 1, "L": 3}), cases=("clipped", "kept")
)
EWC_PLANTS = _plants(EWC_BLOCKWISE, EWC_KERNEL, (FISHER, {"N": 2, "L": 50}), (EWC, PAIR))
MASKS_PLANTS = _plants(MASKS_BLOCKWISE, MASKS_KERNEL, (MASKS, PAIR), cases=("bool", "owners"))
