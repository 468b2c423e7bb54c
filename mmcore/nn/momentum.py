"""An encoder that follows another, and a queue of what it has seen (MoCo, arXiv:1911.05722; DINO, arXiv:2104.14294)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.ema import EMA, Schedule
from mmcore.ema.weights import module_of
from mmcore.ops import require


class MomentumEncoder(nn.Module):
    """The student's moving average as a frozen module of its own, which runs without gradients.

    ```
    momentum = MomentumEncoder(student, cosine(0.996, 1.0, num_steps))
    loss = contrastive_loss(student(x), momentum(y), scale, negatives=queue.filled)
    ...
    optimizer.step()
    momentum.update()
    ```

    Its state is the teacher's, the averages behind it and the number of updates. The student is not part of it.

    Args:
        student: a module, or DeepSpeed's engine of one (stages 0 to 2; its state is then saved by `ema.save`).
        decay: from 0 to 1, or a schedule of `mmcore.ema`.

    Attributes:
        teacher: a copy of the student, of its dtypes.
        ema: averages into it, in float32.
    """

    def __init__(self, student: Any, decay: float | Schedule = 0.996) -> None:
        super().__init__()
        module = module_of(student)
        parts = [name for name, p in module.named_parameters() if hasattr(p, "ds_id")]
        require("MomentumEncoder", not parts, "student must hold its weights, got {} cut up by ZeRO-3", parts[:1])
        self.teacher = copy.deepcopy(module)
        self.ema = EMA(student, decay, teacher=self.teacher)
        self._followed = student, decay  # a tuple, so that it is no part of this module
        self._has_moved = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output, without gradients."""
        with torch.no_grad():
            return self.teacher(*args, **kwargs)

    def update(self) -> None:
        """Averages the student of now; call it after each optimizer step. Raises as `mmcore.ema.EMA.update`."""
        self._follow_moves()
        self.ema.update()

    def get_extra_state(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._follow_moves()
        self.ema.load_state_dict(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MomentumEncoder":
        self._has_moved = True
        return super()._apply(fn, recurse)

    def _follow_moves(self) -> None:
        """After `to` and its like the averages go on beside the teacher; the student may have moved later than it."""
        if self._has_moved:
            state = self.ema.state_dict()
            self.ema = EMA(*self._followed, teacher=self.teacher)
            self.ema.load_state_dict(state)
            self._has_moved = False


class FeatureQueue(nn.Module):
    """The last N = `num_features` features [N, D = `dim`] that were enqueued, for
    `mmkernels.contrastive_loss(..., negatives=)`; of another `dtype`, such as int64, what belongs to them."""

    copied_buffers = ("features",)  # by `EMA`, since an average of rows is nobody's feature

    def __init__(self, num_features: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, size in (("num_features", num_features), ("dim", dim)):
            require("FeatureQueue", size >= 1, "{} must be at least 1, got {}", name, size)
        self.features = nn.Buffer(torch.zeros(num_features, dim, dtype=dtype))
        self.num_enqueued = 0

    @property
    def filled(self) -> Tensor:
        """[n, D]: the features enqueued so far, in no order; a copy, so that `enqueue` may come before `backward`."""
        return self.features[: self.num_enqueued].clone()

    @torch.no_grad()
    def enqueue(self, features: Tensor, *, group: dist.ProcessGroup | None = None) -> None:
        """Puts features [B, D], of any dtype, in the place of the oldest; of more than N the last. Those of the ranks
        of a `group` are taken too, in the order of ranks, the same B on each, so that all hold one queue."""
        held = self.features
        size, dim = held.shape
        is_like = features.ndim == 2 and features.shape[1] == dim
        require("FeatureQueue", is_like, "features must be [B, {}], got {}", dim, list(features.shape))
        if group is not None:
            parts = features.new_empty(dist.get_world_size(group), *features.shape)
            dist.all_gather(list(parts.unbind()), features.contiguous(), group=group)
            features = parts.flatten(0, 1)
        count = len(features)
        self.num_enqueued += count
        if count > size:
            features, count = features[-size:], size
        first = (self.num_enqueued - count) % size
        behind = size - first  # what fits before the ring's end
        if count <= behind:
            held[first : first + count] = features
        else:
            held[first:], held[: count - behind] = features[:behind], features[behind:]

    def get_extra_state(self) -> int:
        return self.num_enqueued

    def set_extra_state(self, state: int) -> None:
        self.num_enqueued = state
