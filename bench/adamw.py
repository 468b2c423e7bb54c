"""What `mmkernels.adamw_update_` is measured on and against: a model's step and the average of its weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.ema import tensors
from mmkernels import adamw_update_

LR, DECAY, STEP = 1e-6, 0.9999, 100
# Bytes an update reads and writes a parameter: of float32 throughout; of bfloat16 gradients, models and teachers.
BYTES = {"fp32": 36, "bf16": 38}


class Lists:
    """Float32 masters, moments and averages; "fp32" has float32 gradients, "bf16" has bfloat16 gradients and copies of
    the new weights and of their averages."""

    def __init__(self, name: str, kind: str, device: torch.device) -> None:
        def made(dtype: torch.dtype = torch.float32) -> list[Tensor]:
            return tensors(name, dtype, device)

        half = torch.bfloat16 if kind == "bf16" else None
        self.params, self.exp_avgs, self.averages = made(), made(), made()
        self.exp_avg_sqs = [x.abs() for x in made()]
        self.grads = made(half or torch.float32)
        self.copies = made(half) if half else None
        self.shadows = made(half) if half else None


def ours(lists: Lists) -> Callable[[], None]:
    def update() -> None:
        adamw_update_(
            lists.params,
            lists.grads,
            lists.exp_avgs,
            lists.exp_avg_sqs,
            lr=LR,
            step=STEP,
            averages=lists.averages,
            decay=DECAY,
            copies=lists.copies,
            shadows=lists.shadows,
        )

    return update


def torchs(lists: Lists, **choice: Any) -> Callable[[], None]:
    """torch.optim.AdamW, then the average by foreach; what it refuses in bfloat16 is cast before and after."""
    params = [torch.nn.Parameter(x) for x in lists.params]
    optimizer = torch.optim.AdamW(params, lr=LR, **choice)
    for p, m, v in zip(params, lists.exp_avgs, lists.exp_avg_sqs, strict=True):
        step = torch.tensor(float(STEP), device=p.device if choice.get("fused") else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    def update() -> None:
        for p, g in zip(params, lists.grads, strict=True):
            p.grad = g.float()
        optimizer.step()
        torch._foreach_lerp_(lists.averages, lists.params, 1 - DECAY)
        if lists.copies and lists.shadows:
            torch._foreach_copy_(lists.copies, lists.params)
            torch._foreach_copy_(lists.shadows, lists.averages)

    return update


def fused(lists: Lists) -> Callable[[], None]:
    return torchs(lists, fused=True)


def foreach(lists: Lists) -> Callable[[], None]:
    """torch's own choice on a GPU; on a CPU it must be asked for."""
    return torchs(lists, foreach=True)


CONTENDERS: Mapping[str, Callable[[Lists], Callable[[], None]]] = {
    "mmkernels": ours,
    "AdamW(fused)+foreach_lerp": fused,
    "AdamW(foreach)+foreach_lerp": foreach,
}
