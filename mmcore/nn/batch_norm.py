"""BatchNorm over the batches of all ranks, on a GPU and on a CPU (torch's SyncBatchNorm refuses the latter)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmcore.ops import untransformed


class BatchNorm(_BatchNorm):
    """Normalises each channel by the mean and variance of all ranks' batches: y = (x - mean) / sqrt(var + eps) w + b.

    Statistics are at least float32, whatever the weights are: a momentum of .1 would stall in bfloat16. In evaluation
    mode, and in a single process, it is torch's (arXiv:1502.03167). Ranks may hold batches of different sizes.

    Args:
        num_features: C of inputs [B, C] or [B, C, ...].
        eps, momentum, affine, track_running_stats: as of torch.nn.BatchNorm1d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C] or [B, C, ...] to the same shape and dtype."""
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        held = self.running_mean
        # torch's takes statistics wider than the input only beside weights as wide as they
        is_torchs = held is None or held.dtype in (input.dtype, None if self.weight is None else self.weight.dtype)
        if is_torchs and (is_alone or not self.training):
            return super().forward(input)
        wide, axes = _wide(input), [0, *range(2, input.ndim)]
        if self.training:
            count = wide.new_full((1,), input.numel() / max(1, input.shape[1]))
            sums = torch.cat([wide.sum(axes), (wide * wide).sum(axes), count])
            sums = sums if is_alone else all_sum(sums)
            total, squares, count = sums.split([self.num_features, self.num_features, 1])
            mean = total / count
            var = (squares / count - mean * mean).clamp_min(0)
            self._track(mean.detach(), (var * count / (count - 1).clamp_min(1)).detach())
        else:
            mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        shape = [1, -1, *[1] * (input.ndim - 2)]
        y = (wide - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"BatchNorm: input must be [B, {self.num_features}, ...], got {list(input.shape)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchNorm":
        super()._apply(fn, recurse)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean, self.running_var = _wide(self.running_mean), _wide(self.running_var)
        return self


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def all_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of the ranks' `x`; its gradient sums what each rank's loss makes of it."""
    untransformed("all_sum", "a single process", {"x": [x]})
    return _AllSum.apply(x, group)  # pyright: ignore[reportReturnType]


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_sum(grad, ctx.group), None
