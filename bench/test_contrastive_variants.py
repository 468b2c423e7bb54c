"""`mmkernels.contrastive_loss` with its arguments, beside the same formulas written with whole matrices.

A rank's rows against the gathered batch, several captions an image, a queue, momentum targets, a locked tower.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import MODES, Case, dtype_id, time_case
from bench.contrastive import cost as cost_of
from bench.contrastive import features
from bench.measure import gemm_flops_per_s, relative_error
from mmkernels import contrastive_loss, contrastive_loss_ref
from mmkernels._spec import Cost, shape_id

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
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
SHAPES = {
    "cpu": ({"M": 512, "N": 4096, "D": 512}, {"M": 1023, "N": 6143, "D": 640}),
    "cuda": ({"M": 4096, "N": 65536, "D": 768}, {"M": 8192, "N": 65536, "D": 768}),
}[DEVICE]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", ["mmkernels", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_contrastive_loss_variant(benchmark, device, shape, variant, contender, mode):
    num_rows, num_cols, width = shape["M"], shape["N"], shape["D"]
    a, b, scale = features(num_cols, width, DTYPE, device)
    a = a.detach()[:num_rows].requires_grad_()
    kwargs = VARIANTS[variant](b, num_rows)
    if variant == "queue":
        b = b.detach()[:num_rows].requires_grad_()
    wrt = (a, scale) if variant == "locked" else (a, b, scale)
    columns = b.detach() if variant == "locked" else b
    loss = {"mmkernels": contrastive_loss, "eager": contrastive_loss_ref}[contender]

    def error() -> float:
        da = torch.autograd.grad(loss(a, columns, scale, **kwargs), a)[0]
        gold_a = a.detach().double().requires_grad_()
        wide = {k: v.double() if k == "negatives" else v for k, v in kwargs.items()}
        if "teacher" in kwargs:
            wide["teacher"] = tuple(x.double() for x in kwargs["teacher"])
        gold = contrastive_loss(gold_a, columns.detach().double(), scale.detach().double(), **wide)
        return relative_error(da, torch.autograd.grad(gold, gold_a)[0])

    forward, backward = cost_of(a, num_cols, 0 if variant == "locked" else len(b) / num_cols)
    if variant == "momentum":
        more = Cost(forward.flops, 0, forward.exps)
        forward, backward = forward + more, backward + more
    cost = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    rate = gemm_flops_per_s(num_rows, num_cols, width, DTYPE, device)
    case = Case(
        group=f"contrastive_loss[{variant}] {dtype_id(DTYPE)} {shape_id(shape)}",
        contender=contender,
        loss=lambda: loss(a, columns, scale, **kwargs),
        wrt=wrt,
        mode=mode,
        floor_s=cost.flops / rate,
        cost=cost if contender == "mmkernels" else None,
        gemm_rate=rate,
        error=error,
    )
    time_case(benchmark, device, case)
