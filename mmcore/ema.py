"""The exponential moving average of a model's weights, kept in float32 beside it."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmcore.ops import ema_update_, require

# The decay of update t, counted from 0.
Schedule = Callable[[int], float]


def warmed_up(decay: float) -> Schedule:
    """`min(decay, (1 + t) / (10 + t))`, which forgets the first weights quickly, as TensorFlow and timm have it."""
    _check_decay("warmed_up", "decay", decay)
    return lambda t: min(decay, (1 + t) / (10 + t))


def cosine(start: float, end: float, num_updates: int) -> Schedule:
    """From `start` to `end` along half a cosine over `num_updates`, then `end`: DINO's teacher (arXiv:2104.14294)."""
    _check_decay("cosine", "start", start)
    _check_decay("cosine", "end", end)
    require("cosine", num_updates >= 1, "num_updates must be at least 1, got {}", num_updates)

    def decay(t: int) -> float:
        return end - (end - start) * (math.cos(math.pi * min(t / num_updates, 1.0)) + 1) / 2

    return decay


class EMA:
    """`average = decay average + (1 - decay) weight` of all trainable weights, in one launch an update.

    ```
    ema = EMA(model, 0.9999)
    for batch in batches:
        ...
        optimizer.step()
        ema.update()
    with ema.swapped():
        evaluate(model)
    ```

    Args:
        model: a module, on its device, compiled or under DistributedDataParallel or not. Weights that want no
            gradient when this is made are not averaged: they stay what they are. Under ZeRO the weights are the
            optimizer's, and `mmcore.train.optim.AdamW` averages them.
        decay: from 0 to 1, or its schedule: `warmed_up`, `cosine`, or any function of the number of updates.
        buffers: "copy" takes them as they are (BatchNorm's statistics are averages already), "average" averages
            those in floating point.

    Attributes:
        averages: float32 (float64 of float64), by the parameter's name.
        num_updates: so far.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule = 0.9999,
        *,
        buffers: Literal["copy", "average"] = "copy",
    ) -> None:
        op = "EMA"
        if not callable(decay):
            _check_decay(op, "decay", decay)
        require(op, buffers in ("copy", "average"), "buffers must be 'copy' or 'average', got {!r}", buffers)
        self.model = unwrapped(model)
        parts = [name for name, p in self.model.named_parameters() if hasattr(p, "ds_id")]
        require(op, not parts, "model must hold its weights, got {} cut up by ZeRO-3", parts[:1])
        self.decay = decay
        self.buffers = buffers
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {
            name: _widened(p) for name, p in self.model.named_parameters() if p.requires_grad
        }
        self.buffer_averages: dict[str, Tensor] = {
            name: _widened(x) if self._is_averaged(x) else x.detach().clone()
            for name, x in self.model.named_buffers()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Averages the model's weights of now; call it after each optimizer step.

        Raises:
            ValueError: a model that was moved, or whose weights have other names or shapes than before.
        """
        decay = self.decay(self.num_updates) if callable(self.decay) else self.decay
        weights = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        averaged = [name for name, x in buffers.items() if self._is_averaged(x)]
        targets = [*self.averages.values(), *(self.buffer_averages[name] for name in averaged)]
        sources = [*(weights[name] for name in self.averages), *(buffers[name] for name in averaged)]
        ema_update_(targets, sources, decay)
        for name in buffers.keys() - set(averaged):
            self.buffer_averages[name].copy_(buffers[name])
        self.num_updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the model's weights and buffers, in place and in their dtypes, for as long as the block
        lasts; what was there comes back however it ends."""
        held = self._held()
        before = {name: x.detach().clone() for name, x in held.items()}
        self.copy_to(self.model)
        try:
            yield
        finally:
            _copy(before, held)

    def copy_to(self, model: nn.Module) -> None:
        """Writes the averages into a model of the same names and shapes.

        Raises:
            ValueError: a name that it lacks, or another shape.
        """
        model = unwrapped(model)
        into = dict(model.named_parameters()) | dict(model.named_buffers())
        _copy(self.averages | self.buffer_averages, into)

    def state_dict(self) -> dict[str, Any]:
        """The averages by name, and the number of updates."""
        return {
            "num_updates": self.num_updates,
            "averages": dict(self.averages),
            "buffers": dict(self.buffer_averages),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, on whatever device it lies.

        Raises:
            ValueError: names or shapes other than this model's.
        """
        for kind, held in (("averages", self.averages), ("buffers", self.buffer_averages)):
            differ = sorted(held.keys() ^ state[kind].keys())
            require(
                "EMA.load_state_dict", not differ, "state must have this model's {}, got {}", kind, differ[:3]
            )
            _copy(state[kind], held)
        self.num_updates = state["num_updates"]

    def _held(self) -> dict[str, Tensor]:
        """The model's weights and buffers that have averages."""
        everything = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: everything[name] for name in self.averages | self.buffer_averages}

    def _is_averaged(self, buffer: Tensor) -> bool:
        return self.buffers == "average" and buffer.is_floating_point()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, without torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = (
            model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        require("EMA", name in into, "model must have {}, got {}", name, "none")
        same = into[name].shape == x.shape
        require("EMA", same, "{} must be {}, got {}", name, list(x.shape), list(into[name].shape))
    for name, x in tensors.items():
        into[name].copy_(x)


def _check_decay(op: str, name: str, decay: float) -> None:
    require(op, 0 <= decay <= 1, "{} must be from 0 to 1, got {}", name, decay)
