"""A step in micro-batches: losses that are means over samples or tokens, and losses of the whole batch (GradCache)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.losses.cached import CachedStep, Run


def plain_backward(recipe: Any, model: Any, parts: Sequence[Any], step: Any) -> dict[str, Tensor]:
    """The mean of the micro-batches' losses, each counted by its `weight` over all ranks, at the memory of one: makes
    the gradient in `model`, an `Engine`, of `parts`, as many on every rank; returns the losses by name, detached."""
    if len(parts) == 1:
        losses = recipe.loss(model, model.place(parts[0]), step)
        model.backward(losses["loss"])
        return {name: x.detach() for name, x in losses.items()}
    weights = _on_device([recipe.weight(x) for x in parts], model.device)
    if dist.is_initialized():
        dist.all_reduce(weights)
    total: dict[str, Tensor] = {}
    with model.accumulate():
        for i, (part, share) in enumerate(zip(parts, weights / weights.sum(), strict=True), 1):
            losses = {name: x * share.to(x.dtype) for name, x in recipe.loss(model, model.place(part), step).items()}
            model.backward(losses["loss"], last=i == len(parts))
            total = {name: total.get(name, 0.0) + x.detach() for name, x in losses.items()}
    return total


def _on_device(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """float64 `[numbers]`; those of the host in one copy, which does not wait for a GPU."""
    made = torch.stack(
        [torch.as_tensor(x, dtype=torch.float64, device=None if isinstance(x, Tensor) else "cpu") for x in numbers]
    )
    is_upload = made.device.type == "cpu" and device.type == "cuda"
    return made.pin_memory().to(device, non_blocking=True) if is_upload else made.to(device)


def cached_backward(recipe: Any, model: Any, parts: Sequence[Any], step: Any) -> dict[str, Tensor]:
    """The loss of all samples of a step and its gradient, holding the activations of one micro-batch at a time, as
    `mmcore.losses.cached_contrastive_step`: the gradient is that of the whole batch, not the mean over micro-batches.
    Otherwise as `plain_backward`."""
    losses: dict[str, Tensor] = {}

    def objective(*features: Tensor) -> Tensor:
        losses.update(recipe.objective(features, parts, step))
        return losses["loss"]

    runs = [Run(lambda part=part: recipe.features(model, model.place(part))) for part in parts]
    cached = CachedStep([runs], objective, [model.module])
    with nullcontext() if cached.is_whole else model.accumulate():
        cached.backward(lambda loss, is_last: model.backward(loss, last=is_last))
    return {name: x.detach() for name, x in losses.items()}
