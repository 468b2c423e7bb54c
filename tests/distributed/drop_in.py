"""The drop-in classes beside the formulas that their originals publish, written with torch's own collectives."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from mmcore.losses import ClipLoss, ContrastiveLossWithTemperature, SigLipLoss
from tests.distributed import cases

BIAS = -3.0


def clip(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """open_clip, local_loss and gather_with_grad."""
    logits_per_image = log_scale.exp() * a @ torch.cat(all_gather(b)).T
    logits_per_text = log_scale.exp() * b @ torch.cat(all_gather(a)).T
    labels = torch.arange(len(a)) + dist.get_rank() * len(a)
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def siglip(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """open_clip, dist_impl "gather": the own texts are partners, all other pairs are not."""
    loss = torch.zeros((), dtype=a.dtype)
    for rank, texts in enumerate(all_gather(b)):
        signs = -torch.ones(len(a), len(texts), dtype=a.dtype)
        if rank == dist.get_rank():
            signs += 2 * torch.eye(len(a), dtype=a.dtype)
        loss = loss - F.logsigmoid(signs * (log_scale.exp() * a @ texts.T + BIAS)).sum() / len(a)
    return loss


def with_temperature(a: Tensor, b: Tensor, log_scale: Tensor, **kwargs: Any) -> Tensor:
    """TorchMultimodal, BackpropType.GLOBAL."""
    mask = kwargs.pop("mask", torch.ones(len(a), dtype=torch.bool))
    logits_a = (a @ torch.cat(all_gather(b)).T * log_scale.exp())[mask]
    logits_b = (b @ torch.cat(all_gather(a)).T * log_scale.exp())[mask]
    labels = (len(a) * dist.get_rank() + torch.arange(len(a)))[mask]
    return (F.cross_entropy(logits_a, labels, **kwargs) + F.cross_entropy(logits_b, labels, **kwargs)) / 2


def compared() -> dict[str, Any]:
    """Of each class and of its formula this rank's loss and gradients of a, b and the logarithm of the scale."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = cases.extent(cases.LAYOUTS[size]["even"], rank)
    mask = torch.arange(rows.stop - rows.start) != 1
    smoothing = {"label_smoothing": 0.1}

    def temperature(a: Tensor, b: Tensor, log_scale: Tensor, **kwargs: Any) -> Tensor:
        return ContrastiveLossWithTemperature(log_scale)(a, b, **kwargs)  # pyright: ignore[reportArgumentType]

    pairs: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        f"ClipLoss{flags}": (
            lambda a, b, s, flags=flags: ClipLoss(*flags, rank=rank, world_size=size)(a, b, s.exp()),
            clip,
        )
        for flags in ((False, False), (True, False), (False, True), (True, True, True))
    }
    pairs["SigLipLoss"] = (
        lambda a, b, s: SigLipLoss(rank=rank, world_size=size)(a, b, s.exp(), torch.tensor(BIAS)),
        siglip,
    )
    pairs["with temperature"] = (temperature, with_temperature)
    pairs["with temperature, smoothed and masked"] = (
        lambda a, b, s: temperature(a, b, s, cross_entropy_kwargs=smoothing, mask=mask),
        lambda a, b, s: with_temperature(a, b, s, mask=mask, **smoothing),
    )
    return {
        name: {"ours": run(ours, rows), "published": run(published, rows)} for name, (ours, published) in pairs.items()
    }


def run(loss: Callable[..., Tensor], rows: slice) -> dict[str, Any]:
    batch = cases.batch()
    a, b = batch["a"][rows].clone().requires_grad_(), batch["b"][rows].clone().requires_grad_()
    log_scale = torch.nn.Parameter(torch.tensor(cases.SCALE, dtype=a.dtype).log())
    value = loss(a, b, log_scale)
    value.backward()
    grads = [a.grad, b.grad]
    # of a rank's own loss there; here and there it is the mean over ranks that counts
    assert log_scale.grad is not None
    dist.all_reduce(log_scale.grad)
    return {"loss": value.item(), "grads": [x.tolist() for x in (*grads, log_scale.grad) if x is not None]}


def misplaced() -> None:
    """All ranks take themselves for the first."""
    ClipLoss(rank=0, world_size=dist.get_world_size())(torch.eye(2), torch.eye(2), 1.0)
