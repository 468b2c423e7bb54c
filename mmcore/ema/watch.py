"""Models that must stay what they were when something was made of them."""

from collections.abc import Iterable
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from mmcore.ops import require


class Watch:
    """Sees that a module's weights and buffers stay what they were: names, shapes, devices, frozen or not."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._expected = _described(module)
        self._seen = _look(module)

    def has_replaced(self) -> bool:
        """Whether another tensor, that serves as well, stands in the place of one since the last call; a ValueError
        names one that does not serve."""
        now = _look(self._module)
        if now[1:] == self._seen[1:] and all(map(is_, now[0], self._seen[0])):
            return False
        found = _described(self._module)
        new, gone = sorted(found.keys() - self._expected.keys()), sorted(self._expected.keys() - found.keys())
        require("EMA", not new, "model must have the weights it had, got new ones, {}", new[:3])
        require("EMA", not gone, "model must have the weights it had, got it without {}", gone[:3])
        for name, (shape, device, was_trained) in self._expected.items():
            now_shape, now_device, is_trained = found[name]
            thawed = is_trained and not was_trained
            require("EMA", now_shape == shape, "model's {} must be {}, got {}", name, list(shape), list(now_shape))
            require("EMA", now_device == device, "model's {} must be on {}, got {}", name, device, now_device)
            require("EMA", not thawed, "model's {} must be frozen as it was, got {}", name, "it trained")
        self._seen = now
        return True


def check_teacher(teacher: nn.Module, student: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """The teacher's parameters by name: a ValueError unless they have the student's shapes, on the device of what is
    averaged, and are not the student's own."""
    held, wanted = dict(teacher.named_parameters()), dict(student.named_parameters())
    differ = sorted(held.keys() ^ wanted.keys())
    require("EMA", not differ, "teacher must have the model's weights, got a difference in {}", differ[:3])
    for name, p in wanted.items():
        x = held[name]
        require("EMA", x.shape == p.shape, "teacher's {} must be {}, got {}", name, list(p.shape), list(x.shape))
        require("EMA", x.device == device, "teacher's {} must be on {}, got {}", name, device, x.device)
        own = x is not p and (x.numel() == 0 or x.data_ptr() != p.data_ptr())
        require("EMA", own, "teacher's {} must be a copy, got {}", name, "the model's own")
    return held


def overwrite(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies tensors, one by one, in place."""
    for x, y in zip(targets, sources, strict=True):
        x.copy_(y)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers but caches, shared ones as often as they occur: of ten thousand in a millisecond or
    two."""
    found: list[Tensor | None] = []
    parts: list[nn.Module | None] = [module]
    while parts:
        part = parts.pop()
        if part is not None:
            found += part._parameters.values()
            found += [x for name, x in part._buffers.items() if name not in part._non_persistent_buffers_set]
            parts += part._modules.values()
    return [x for x in found if x is not None]


def kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's buffers by name, without those that are not persistent: caches that it makes and drops at will."""
    caches = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return {name: x for name, x in module.named_buffers() if name not in caches}


def _look(module: nn.Module) -> tuple[list[Tensor], list[int], list[int], list[bool]]:
    """What is others where a tensor was replaced, moved, resized or thawed."""
    tensors = tensors_of(module)
    trained = list(map(attrgetter("requires_grad"), tensors))
    return tensors, list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors)), trained


def _described(module: nn.Module) -> dict[str, tuple[torch.Size, torch.device, bool]]:
    named = [*module.named_parameters(), *kept_buffers(module).items()]
    # under ZeRO-3 a parameter itself is empty
    return {name: (getattr(x, "ds_shape", x.shape), x.device, x.requires_grad) for name, x in named}
