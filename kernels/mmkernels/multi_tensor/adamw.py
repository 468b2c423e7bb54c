"""A step of AdamW, and of the average of what it makes, in one pass over memory."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._checks import require
from mmkernels.multi_tensor import paths
from mmkernels.multi_tensor.paths import ADDRESSED, WIDE, check_captured, path_of, prepared, scalar, table_in_op
from mmkernels.multi_tensor.table import Table

WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "averages", "copies", "shadows")


@torch.no_grad()
def adamw_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    step: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clamp: tuple[float, float] | None = None,
    averages: Sequence[Tensor] | None = None,
    decay: float | Tensor = 0.9999,
    copies: Sequence[Tensor] | None = None,
    shadows: Sequence[Tensor] | None = None,
) -> None:
    """AdamW, `p -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p)`, then `average = decay
    average + (1 - decay) p`, of every tensor, in place and in one launch.

    Computed in float32 (float64 where a parameter is float64), whatever the dtypes; lists may mix dtypes and sizes.

    Args:
        params: distinct tensors of one device, float32, float16, bfloat16 or float64, any shapes; dense.
        grads: their gradients, of any of these dtypes; where strides differ, one is copied first.
        exp_avgs, exp_avg_sqs: the moments m and v, zero before the first step.
        lr: the learning rate; a float, or a tensor of one element on the device, which a captured graph reads anew and
            has to be given: it keeps the numbers below of its capture.
        step: t, from 1; a number or a tensor like `lr`.
        betas: each from 0 to less than 1.
        eps: at least 0.
        weight_decay: decoupled, at least 0.
        clamp: (low, high) that every parameter is brought between after the step; None = none.
        averages: averaged with the new parameters, float32 or float64; None = none.
        decay: of the averages, from 0 to 1; a number or a tensor like `lr`.
        copies: written with the new parameters, in their own dtypes: the model of a float32 master; None = none.
        shadows: written with the new averages: the model of a teacher; None = none.

    Raises:
        ValueError: lists that do not match, a dtype, a device, memory in common, or a setting out of its range.

    Reference: `adamw_update_ref_`. Papers: arXiv:1711.05101 (AdamW), arXiv:1703.01780 (the average).
    """
    op = "adamw_update_"
    given = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    given |= {"averages": averages, "copies": copies, "shadows": shadows}
    require(op, shadows is None or averages is not None, "shadows must come with averages, got {}", "none")
    lists, table = prepared(op, given, WRITTEN, {"averages": WIDE})
    if not lists[0]:
        return
    _check_settings(op, betas, eps, weight_decay, clamp)
    numbers = {"lr": (lr, math.inf), "step": (step, math.inf), "decay": (decay, 1.0)}
    for name, (value, most) in numbers.items():
        _check_number(op, name, value, most)
    check_captured(op, lists[0][0], lr=lr, step=step, **({} if averages is None else {"decay": decay}))
    device = lists[0][0].device
    factors = adamw_factors(lr, step, betas, eps, weight_decay, clamp, decay, device)
    if torch.compiler.is_compiling():
        _adamw_update(*lists, factors)
    else:
        _update(lists, factors, table)
        torch.autograd.graph.increment_version([x for part in (lists[0], *lists[2:]) for x in part])


def adamw_factors(
    lr: float | Tensor,
    step: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clamp: tuple[float, float] | None,
    decay: float | Tensor,
    device: torch.device,
) -> Tensor:
    """What a step makes of its settings, float64 `[10]` on the device: `param *= keep`, `m += rise (grad - m)`,
    `v = beta2 v + fall grad^2`, `param -= size m / (root sqrt(v) + eps)`, low, high, the weight of the average."""
    low, high = clamp or (-math.inf, math.inf)
    beta1, beta2 = betas
    numbers: list[Any] = [lr, step, decay]
    if any(isinstance(x, Tensor) and x.device == device and x.is_cuda for x in numbers):
        lr, step, decay = (scalar(x, torch.float64, device) for x in numbers)
    else:
        lr, step, decay = (float(x) for x in numbers)
    size, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    factors = [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, size, root, eps, low, high, 1 - decay]
    if isinstance(size, Tensor):
        return torch.stack([scalar(x, torch.float64, device).reshape(()) for x in factors])
    found = torch.tensor(factors, dtype=torch.float64, device="cpu")
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _check_settings(
    op: str, betas: tuple[float, float], eps: float, weight_decay: float, clamp: tuple[float, float] | None
) -> None:
    in_range = all(0 <= beta < 1 for beta in betas)
    require(op, in_range, "betas must be from 0 to less than 1, got {}", betas)
    require(op, 0 <= eps < math.inf, "eps must be at least 0, got {}", eps)
    require(op, 0 <= weight_decay < math.inf, "weight_decay must be at least 0, got {}", weight_decay)
    ordered = clamp is None or clamp[0] <= clamp[1]
    require(op, ordered, "clamp must be (low, high), got {}", clamp)


def _check_number(op: str, name: str, value: float | Tensor, most: float) -> None:
    """From 0 (a step: 1) to `most`; a tensor on a GPU is not waited for."""
    if isinstance(value, Tensor):
        require(op, value.numel() == 1, "{} must be one number, got shape {}", name, list(value.shape))
        if value.is_cuda or torch.compiler.is_compiling():
            return
        value = float(value)
    least = 1 if name == "step" else 0
    in_range = least <= value <= most and value < math.inf
    require(op, in_range, "{} must be from {} to {}, got {}", name, least, most, value)


def _update(lists: Sequence[list[Tensor]], factors: Tensor, table: Table | None) -> None:
    if table is None:
        paths.blockwise.adamw_update_(lists, factors)
    else:
        path_of(lists[0][0]).adamw_update_table(table, factors)


@torch.library.custom_op("mmkernels::adamw_update", mutates_args=WRITTEN, tags=ADDRESSED)
def _adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    copies: list[Tensor],
    shadows: list[Tensor],
    factors: Tensor,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs, averages, copies, shadows)
    _update(lists, factors, table_in_op(lists))
