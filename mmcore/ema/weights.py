"""Where a model holds what is averaged: whole in a module, or cut up by ZeRO."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from mmcore.ema.watch import Watch, check_teacher, kept_buffers, overwrite
from mmcore.ema.zero import Follower, Shards
from mmcore.ops import require
from mmcore.tensor_file import Layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUANTISATION = ("torch.ao.quantization", "torchao.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, without torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_engine(model: Any) -> bool:
    return callable(getattr(model, "zero_optimization_stage", None))


def module_of(model: Any) -> nn.Module:
    """The module itself, of an engine or within wrappers."""
    return unwrapped(model.module if is_engine(model) else model)


def weights_of(model: Any) -> "Whole | Shards":
    """The trainable weights of a module, or of DeepSpeed's engine; a ValueError of a module that ZeRO-3 cut up, without
    its engine."""
    module = module_of(model)
    if is_engine(model):
        return Whole(module) if model.zero_optimization_stage() == 0 else Shards(model, module)
    parts = [name for name, p in module.named_parameters() if hasattr(p, "ds_id")]
    require("EMA", not parts, "model must be DeepSpeed's engine, got a module with {} cut up by ZeRO-3", parts[:1])
    return Whole(module)


def averaged_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers whose average means something."""
    copied = {f"{prefix}.{name}".lstrip(".") for prefix, part in module.named_modules() for name in _copied_of(part)}
    return [
        name
        for name, x in kept_buffers(module).items()
        if name not in copied and x.dtype in DTYPES and x.isfinite().all()
    ]


def _copied_of(part: nn.Module) -> Iterator[str]:
    """Names of a module's own buffers that are taken as they are: each goes with the others of now, or with none."""
    kinds = [kind.__module__ for kind in type(part).__mro__]
    if isinstance(part, _SpectralNorm) or any(kind.startswith(QUANTISATION) for kind in kinds):
        yield from part._buffers
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            yield from (f"{hook.name}_u", f"{hook.name}_v")
        elif isinstance(hook, BasePruningMethod):
            yield f"{hook._tensor_name}_mask"
    yield from getattr(part, "copied_buffers", ())


class Whole:
    """The trainable weights of a module that holds them whole, with the methods of `mmcore.ema.zero.Shards`; `flats`
    are the parameters themselves."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.flats: list[Tensor] = list(self.params.values())
        devices = [x.device for x in (*self.flats, *module.buffers())]
        self.device = devices[0] if devices else torch.device("cpu")
        self._watch = Watch(module)

    def refresh(self) -> bool:
        """Takes what was put in a parameter's or buffer's place; whether anything was. Raises as
        `Watch.has_replaced`."""
        if not self._watch.has_replaced():
            return False
        held = dict(self.module.named_parameters())
        self.params = {name: held[name] for name in self.params}
        self.flats = list(self.params.values())
        return True

    def layout(self, of: Sequence[Tensor]) -> Layout:
        return {name: (x.dtype, x.shape) for name, x in self.whole(of)}

    def parts(self, of: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.params, of, strict=True))

    def whole(self, of: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.params, of, strict=True)

    def scatter(self, tensors: Mapping[str, Tensor], into: Sequence[Tensor]) -> None:
        held = self.parts(into)
        for name, x in tensors.items():
            held[name].detach().copy_(x)

    @contextmanager
    def shown(self, of: Sequence[Tensor]) -> Iterator[None]:
        held = [p.detach() for p in self.flats]
        before = [x.clone() for x in held]
        try:
            overwrite(held, of)
            yield
        finally:
            overwrite(held, before)

    def follow(self, teacher: nn.Module) -> Follower:
        """The teacher's parameters, to be written beside what they follow."""
        held = check_teacher(teacher, self.module, self.device)
        for name, p in self.params.items():
            dense, strides = held[name].stride() == p.stride(), list(p.stride())
            require("EMA", dense, "teacher's {} must have strides {}, got {}", name, strides, held[name].stride())
        return [held[name].detach() for name in self.params], lambda: None
