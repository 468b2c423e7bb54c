"""A second model whose weights are the averages of the first's, and which runs forward."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmcore.ema.watch import tensors_of
from mmcore.ema.weights import Whole
from mmcore.ema.zero import Shards
from mmcore.ops import require


class Teacher:
    """A frozen copy of a model, written by the pass that averages the model's weights.

    Args:
        averaged: the buffers that are averaged.

    Attributes:
        shadows: its weights laid out like `weights.flats`, then its averaged buffers.
    """

    def __init__(self, module: nn.Module, weights: Whole | Shards, averaged: Sequence[str]) -> None:
        self._module, self._buffers = module, dict(module.named_buffers())
        shapes = {name: x.shape for name, x in self._buffers.items()}
        same = shapes == {name: x.shape for name, x in weights.module.named_buffers()}
        require("EMA", same, "teacher must have the model's buffers, got {}", sorted(shapes))
        follower = weights.follow(module)
        self.shadows = [*follower.shadows, *(self._buffers[name] for name in averaged)]
        self._finish = follower.finish
        theirs = dict(module.named_parameters())
        with torch.no_grad():
            for name, p in weights.module.named_parameters():
                if name not in weights.params:
                    theirs[name].copy_(p)
        module.requires_grad_(False)
        self._places = _places(module)

    def check(self) -> None:
        """Sees that its weights lie where they are written: a ValueError where they were moved, cast or replaced."""
        same = _places(self._module) == self._places
        require("EMA", same, "teacher must stay as it was given, got {}", "weights moved, cast or replaced")

    def finish(self, copies: Mapping[str, Tensor]) -> None:
        """Behind an update: the buffers that are no averages, and under ZeRO the other ranks' weights."""
        for name, x in copies.items():
            self._buffers[name].copy_(x)
        self._finish()


def _places(module: nn.Module) -> list[object]:
    return [(x.data_ptr(), x.dtype) for x in tensors_of(module)]
