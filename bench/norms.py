"""What `global_norm`, `clip_`, `fisher_accumulate_`, `ewc_penalty` and `apply_masks_` are measured on and against: the
parameters of models in float32, and what torch has for them or people write."""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bench.ema import sizes
from mmkernels import apply_masks_, clip_, ewc_penalty, fisher_accumulate_, global_norm

STRENGTH, WEIGHT, DECAY = 0.5, 0.1, 0.9


class Call(NamedTuple):
    """What is timed, and with its gradients if it has leaves."""

    run: Callable[[], object]
    leaves: tuple[Tensor, ...] = ()


class Op(NamedTuple):
    """Contenders by name, of which "mmkernels" is ours, and the bytes that an element's has to read and write."""

    element_bytes: int
    contenders: Mapping[str, Callable[[str, torch.device], Call]]


def normal(name: str, device: torch.device) -> list[Tensor]:
    return [torch.randn(n, device=device) for n in sizes(name)]


def our_norm(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    return Call(lambda: global_norm(grads))


def torch_norm(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    return Call(lambda: torch.nn.utils.get_total_norm(grads, foreach=True))


def our_clip(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    norm = float(global_norm(grads))
    # every call has something to clip
    bounds = (norm * 0.999**i for i in itertools.count(1))
    return Call(lambda: clip_(grads, next(bounds)))


def our_clip_below(name: str, device: torch.device) -> Call:
    grads = normal(name, device)
    return Call(lambda: clip_(grads, 1e9))


def torch_clip(name: str, device: torch.device) -> Call:
    params = [torch.nn.Parameter(x) for x in normal(name, device)]
    for param in params:
        param.grad = torch.randn_like(param)
    # it multiplies even by 1
    return Call(lambda: torch.nn.utils.clip_grad_norm_(params, 1e9, foreach=True))


def our_fisher(name: str, device: torch.device) -> Call:
    fishers, grads = normal(name, device), normal(name, device)
    return Call(lambda: fisher_accumulate_(fishers, grads, weight=WEIGHT, decay=DECAY))


def foreach_fisher(name: str, device: torch.device) -> Call:
    fishers, grads = normal(name, device), normal(name, device)

    def run() -> None:
        torch._foreach_mul_(fishers, DECAY)
        torch._foreach_addcmul_(fishers, grads, grads, WEIGHT)

    return Call(run)


def penalty_lists(name: str, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params = [x.requires_grad_() for x in normal(name, device)]
    return params, normal(name, device), [x.square_() for x in normal(name, device)]


def our_penalty(name: str, device: torch.device) -> Call:
    lists = penalty_lists(name, device)
    return Call(lambda: ewc_penalty(*lists, STRENGTH), tuple(lists[0]))


def loop_penalty(name: str, device: torch.device) -> Call:
    """Avalanche's and most others'."""
    lists = penalty_lists(name, device)

    def run() -> Tensor:
        penalty = torch.zeros((), device=device)
        for param, anchor, fisher in zip(*lists, strict=True):
            penalty += (fisher * (param - anchor).pow(2)).sum()
        return STRENGTH / 2 * penalty

    return Call(run, tuple(lists[0]))


def our_masks(name: str, device: torch.device) -> Call:
    weights, masks = normal(name, device), [x > 0 for x in normal(name, device)]
    return Call(lambda: apply_masks_(weights, masks))


def foreach_masks(dtype: torch.dtype) -> Callable[[str, torch.device], Call]:
    def make(name: str, device: torch.device) -> Call:
        weights, masks = normal(name, device), [(x > 0).to(dtype) for x in normal(name, device)]
        return Call(lambda: torch._foreach_mul_(weights, masks))

    return make


OPS: Mapping[str, Op] = {
    "global_norm": Op(4, {"mmkernels": our_norm, "get_total_norm": torch_norm}),
    "clip_": Op(12, {"mmkernels": our_clip, "clip_grad_norm_": torch_clip}),
    "clip_[nothing to do]": Op(4, {"mmkernels": our_clip_below, "clip_grad_norm_": torch_clip}),
    "fisher_accumulate_": Op(12, {"mmkernels": our_fisher, "foreach": foreach_fisher}),
    "ewc_penalty": Op(28, {"mmkernels": our_penalty, "loop": loop_penalty}),
    "apply_masks_": Op(
        9,
        {
            "mmkernels": our_masks,
            "foreach_mul bool": foreach_masks(torch.bool),
            "foreach_mul float32": foreach_masks(torch.float32),
        },
    ),
}
