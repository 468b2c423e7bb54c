"""`mmkernels.contrastive_loss` with its arguments, beside the same formulas written with whole matrices.

A rank's rows against the gathered batch, several captions an image, a queue, momentum targets, a locked tower.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id
from bench.harness import DEVICE, DTYPE, ON_GPU, Bench, gradient_case, of_mode
from bench.measure import gemm_flops_per_s
from bench.ops.contrastive import cost_of, features
from bench.spec import Shape, shape_id
from mmkernels import contrastive_loss, contrastive_loss_ref
from mmkernels._cost import Cost

Kwargs = dict[str, Any]


def rank(b: Tensor, num_rows: int) -> Kwargs:
    """The second rank's place in the gathered batch."""
    return {"positives": torch.arange(num_rows, device=b.device) + num_rows}


def captions(b: Tensor, num_rows: int) -> Kwargs:
    """As many captions of each image as the columns allow."""
    owner = torch.arange(len(b), device=b.device) % num_rows
    return {"labels": (owner[:num_rows], owner)}


def queue(b: Tensor, num_rows: int) -> Kwargs:
    """MoCo: the first columns are the batch's keys, the others the queue."""
    return {"negatives": b.detach()[num_rows:], "symmetric": False}


def momentum(b: Tensor, num_rows: int) -> Kwargs:
    """ALBEF, one direction, without its queue."""
    generator = torch.Generator(b.device).manual_seed(1)
    noise = torch.randn(b.shape, generator=generator, device=b.device, dtype=torch.float32)
    teacher = F.normalize(b.detach() + 0.3 * F.normalize(noise, dim=1), dim=1).to(b.dtype)
    positives = torch.arange(num_rows, device=b.device)
    return {"teacher": (teacher[:num_rows], teacher), "alpha": 0.4, "positives": positives, "symmetric": False}


def locked(b: Tensor, num_rows: int) -> Kwargs:
    """LiT: no gradient for the second tower."""
    return rank(b, num_rows)


VARIANTS: dict[str, Callable[[Tensor, int], Kwargs]] = {
    "rank": rank,
    "captions": captions,
    "queue": queue,
    "momentum": momentum,
    "locked": locked,
}
SHAPES = (
    ({"M": 4096, "N": 65536, "D": 768}, {"M": 8192, "N": 65536, "D": 768})
    if ON_GPU
    else ({"M": 512, "N": 4096, "D": 512}, {"M": 1023, "N": 6143, "D": 640})
)


def _case(variant: str, shape: Shape, contender: str, mode: str) -> Case:
    num_rows, num_cols, width = shape["M"], shape["N"], shape["D"]
    a, b, scale = features(num_cols, width, DTYPE, DEVICE)
    a = a.detach()[:num_rows].requires_grad_()
    kwargs = VARIANTS[variant](b, num_rows)
    if variant == "queue":
        b = b.detach()[:num_rows].requires_grad_()
    columns = b.detach() if variant == "locked" else b
    loss = {"mmkernels": contrastive_loss, "eager": contrastive_loss_ref}[contender]

    def gold() -> Tensor:
        gold_a = a.detach().double().requires_grad_()
        wide = {k: v.double() if k == "negatives" else v for k, v in kwargs.items()}
        if "teacher" in kwargs:
            wide["teacher"] = tuple(x.double() for x in kwargs["teacher"])
        value = contrastive_loss(gold_a, columns.detach().double(), scale.detach().double(), **wide)
        return torch.autograd.grad(value, gold_a)[0]

    forward, backward = cost_of(a, num_cols, 0 if variant == "locked" else len(b) / num_cols)
    if variant == "momentum":
        more = Cost(forward.flops, 0, forward.exps)
        forward, backward = forward + more, backward + more
    return gradient_case(
        f"contrastive_loss[{variant}] {dtype_id(DTYPE)} {shape_id(shape)}",
        contender,
        lambda: loss(a, columns, scale, **kwargs),
        (a, scale) if variant == "locked" else (a, b, scale),
        mode,
        of_mode(mode, forward, backward),
        rate=gemm_flops_per_s(num_rows, num_cols, width, DTYPE, DEVICE),
        gold=gold,
    )


BENCHES = tuple(
    Bench(
        f"contrastive_loss[{variant}]",
        partial(_case, variant),
        {"shape": SHAPES, "contender": ("mmkernels", "eager"), "mode": MODES},
    )
    for variant in VARIANTS
)
