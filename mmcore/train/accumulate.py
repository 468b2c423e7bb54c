"""A step in micro-batches: losses that are means over samples or tokens, and losses of the whole batch (GradCache)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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


@contextmanager
def without_tracking(module: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of BatchNorms as they are, for a forward that is run again."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def cached_backward(recipe: Any, model: Any, parts: Sequence[Any], step: Any) -> dict[str, Tensor]:
    """The loss of all samples of a step and its gradient, holding the activations of one micro-batch at a time.

    The features of all micro-batches are computed without gradient, the loss and their gradients once over the whole
    batch, and then each micro-batch is run again with its share of them (arXiv:2101.06983). The gradient is that of
    the whole batch, not the mean over micro-batches. Otherwise as `plain_backward`.
    """
    if len(parts) == 1:
        losses = recipe.objective(recipe.features(model, model.place(parts[0])), parts, step)
        model.backward(losses["loss"])
        return {name: x.detach() for name, x in losses.items()}
    with torch.no_grad(), without_tracking(model.module):
        outputs = list(zip(*(recipe.features(model, model.place(part)) for part in parts), strict=True))
    is_rows = [x[0].ndim > 1 for x in outputs]
    leaves = [torch.cat(x) if rows else x[0] for x, rows in zip(outputs, is_rows, strict=True)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    losses = recipe.objective(tuple(leaves), parts, step)
    gradients = torch.autograd.grad(losses["loss"], leaves)
    # a number of the model takes an equal share in each
    shares = [
        g.split([len(x) for x in of]) if rows else [g / len(parts)] * len(parts)
        for g, of, rows in zip(gradients, outputs, is_rows, strict=True)
    ]
    with model.accumulate():
        for i, part in enumerate(parts):
            products = zip(recipe.features(model, model.place(part)), shares, strict=True)
            surrogate = torch.stack([(x * share[i]).sum() for x, share in products]).sum()
            model.backward(surrogate, last=i == len(parts) - 1)
    return {name: x.detach() for name, x in losses.items()}
