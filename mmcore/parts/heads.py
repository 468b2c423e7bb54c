"""Heads of self-supervision: projections with BatchNorm over the batches of all ranks, prototypes, and a centre."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.nn import BatchNorm, Linear
from mmcore.ops import require


def projection_head(sizes: Sequence[int], *, ends_normalised: bool = False) -> nn.Sequential:
    """`layer1`, `bn1`, `relu1`, ..., of widths `sizes`, two or more; behind the last layer nothing, or its BatchNorm.
    The names are SLIP's; MoCo v3, SimSiam and DeCLIP have the same layers."""
    fits = len(sizes) >= 2 and min(sizes) >= 1
    require("projection_head", fits, "sizes must be two or more widths, got {}", list(sizes))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (width, following) in enumerate(pairwise(sizes), 1):
        layers[f"layer{i}"] = Linear(width, following)
        is_last = i == len(sizes) - 1
        if not is_last or ends_normalised:
            layers[f"bn{i}"] = BatchNorm(following)
        if not is_last:
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)


def check_batch(op: str, batch_size: int) -> None:
    """Raises a ValueError where a BatchNorm over all ranks would have one row alone."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    require(op, batch_size * ranks >= 2, "--batch-size must be at least 2, which BatchNorm needs, got {}", batch_size)


class Prototypes(nn.Module):
    """x W^T with rows of W of norms `g`, 1 at first: g v / |v| (weight normalisation, arXiv:1602.07868).

    Args:
        width: D of inputs [..., D].
        count: K of outputs [..., K].
        learns_norm: whether `g` [K, 1] is a weight; else it is a buffer that stays 1.
    """

    def __init__(self, width: int, count: int, *, learns_norm: bool) -> None:
        super().__init__()
        self.v = nn.Parameter(nn.Linear(width, count, bias=False).weight.detach())
        ones = torch.ones(count, 1)
        self.g = nn.Parameter(ones) if learns_norm else nn.Buffer(ones)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., K]."""
        weight = self.v * (self.g / self.v.norm(dim=1, keepdim=True))
        return F.linear(x, weight.to(self.v.dtype))  # a buffer stays float32 under bf16 weights


class PrototypeHead(nn.Module):
    """DINO's head: three layers, unit norm, cosines with prototypes (arXiv:2104.14294). Its parts have the names of the
    published code: `mlp.0`, `mlp.2`, `mlp.4`, `last_layer`.

    Args:
        width: D of inputs [..., D].
        hidden: width of the two layers between.
        bottleneck: width of what is normalised.
        count: prototypes K.
        learns_norm: of `Prototypes`.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, count: int, *, learns_norm: bool) -> None:
        super().__init__()
        for name, size in {"hidden": hidden, "bottleneck": bottleneck, "count": count}.items():
            require("PrototypeHead", size >= 1, "{} must be at least 1, got {}", name, size)
        layers = Linear(width, hidden), nn.GELU(), Linear(hidden, hidden), nn.GELU(), Linear(hidden, bottleneck)
        self.mlp = nn.Sequential(*layers)
        self.last_layer = Prototypes(bottleneck, count, learns_norm=learns_norm)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to logits [..., K]."""
        x = self.mlp(x)
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        return self.last_layer(x.to(self.last_layer.v.dtype))


class Centre(nn.Module):
    """A running mean of rows of all ranks, `mean` [W], 0 at first: c <- m c + (1 - m) (mean of a step's rows).

    Args:
        width: W.
        momentum: m, from 0 to 1.
    """

    def __init__(self, width: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(width))
        self.momentum = momentum
        self._sums: Tensor | None = None  # of this rank's rows since the last update, and their number

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Takes rows [N, W] of this rank into account, N of any size; `mean` stays until `update`."""
        sums = torch.cat([rows.sum(0, dtype=self.mean.dtype), self.mean.new_full((1,), len(rows))])
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def update(self) -> None:
        """Moves `mean` by the rows of all ranks that were added; collective."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        if dist.is_initialized():
            dist.all_reduce(sums)
        count = sums[-1]
        share = (count > 0).to(count.dtype) * (1 - self.momentum)
        self.mean.lerp_(sums[:-1] / count.clamp_min(1), share)
