"""What the ranks tell each other before a loss: a header that must agree, so that a mistake on one is an error on
all of them, and small differentiable reductions."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.ops import require, untransformed

Group = dist.ProcessGroup | None
Checked = TypeVar("Checked")

HEADER_BYTES = 768
# where derivatives are asked for that a loss over ranks has not
OVER_RANKS = "the reference in mmkernels of gathered features"
# A message of one rank's error must leave room for JSON's escapes.
MESSAGE_CHARS = 240


def world_size_of(group: Group) -> int:
    """1 where no process group is set up."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class Header(NamedTuple):
    """How many rows of `a` and of `b` a rank has, what must be the same on all ranks, by name, and how many tokens each
    row of `b` has."""

    num_rows: int
    num_cols: int
    same: dict[str, Any]
    length: int = 0


@dataclass(frozen=True)
class Layout:
    """Where each rank's rows of `a` and of `b` lie in the global batch."""

    group: Group
    rows: tuple[int, ...]  # how many, by rank
    cols: tuple[int, ...]
    lengths: tuple[int, ...] = ()  # tokens of a row of `b`, likewise

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return len(self.rows)

    def rows_of(self, rank: int) -> slice:
        return _extent(self.rows, rank)

    def cols_of(self, rank: int) -> slice:
        return _extent(self.cols, rank)


def agree(
    op: str, group: Group, device: torch.device, check: Callable[[], tuple[Checked, Header]]
) -> tuple[Checked, Layout]:
    """What `check` returns on this rank, and all ranks' layout; one all-gather.

    A ValueError on every rank, where `check` raises one on any of them (its own there, its message on the others), or
    where the ranks differ in what must be the same.
    """
    checked = error = None
    told: dict[str, Any]
    try:
        checked, header = check()
        told = {"rows": header.num_rows, "cols": header.num_cols, "length": header.length}
        told |= {"same": {"loss": op} | header.same}
    except ValueError as refused:
        error, told = refused, {"error": str(refused).encode("ascii", "replace").decode()[:MESSAGE_CHARS]}
    headers = _exchanged(told, group, device)
    if error is not None:
        raise error
    assert checked is not None
    for rank, other in enumerate(headers):
        if "error" in other:
            raise ValueError(f"{op}: rank {rank} refused its arguments: {other['error']}")
    for name in told["same"]:
        ranks: dict[Any, int] = {}  # the first rank with each value
        for rank, other in enumerate(headers):
            ranks.setdefault(other["same"].get(name), rank)
        if len(ranks) > 1:
            values = ", ".join(f"{value} on rank {rank}" for value, rank in ranks.items())
            raise ValueError(f"{op}: {name} must be the same on every rank, got {values}")
    counts = (tuple(other[key] for other in headers) for key in ("rows", "cols", "length"))
    return checked, Layout(group, *counts)


def header(
    op: str,
    names: Sequence[str],
    inputs: Sequence[Tensor],
    labels: tuple[Tensor, Tensor] | None,
    gather_limit_bytes: int,
    **more: Any,
) -> Header:
    """Of a loss of `inputs` by name, of which the first are features of rows and of columns; of which a gradient is
    wanted is the same on all ranks, since a backward that some do not run would hang the others."""
    require(op, gather_limit_bytes >= 0, "gather_limit_bytes must be at least 0, got {}", gather_limit_bytes)
    untransformed(op, OVER_RANKS, {name: [x] for name, x in zip(names, inputs)})
    rows, cols, *_ = inputs
    wanted = [name for name, x in zip(names, inputs) if torch.is_grad_enabled() and x.requires_grad]
    same = {
        "D": rows.shape[-1],
        "dtype": str(rows.dtype),
        "labels": "none" if labels is None else "given",
        "gather_limit_bytes": gather_limit_bytes,
        "requires_grad": ", ".join(wanted) or "nothing",
    }
    return Header(len(rows), len(cols), same | more)


def gather_rows(x: Tensor, counts: tuple[int, ...], group: Group) -> Tensor:
    """The ranks' `x` `[counts[rank], ...]` one below the other, without a gradient; of one rank `x` itself."""
    if len(counts) == 1:
        return x
    most = max(counts)
    padded = x.new_empty(len(counts), most, *x.shape[1:])
    own = x.detach().contiguous()
    if len(own) < most:
        own = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
    dist.all_gather(list(padded.unbind()), own, group=group)
    if min(counts) == most:
        return padded.flatten(0, 1)
    return torch.cat([of_rank[:count] for of_rank, count in zip(padded, counts, strict=True)])


def scatter_sum(x: Tensor, counts: tuple[int, ...], group: Group) -> Tensor:
    """Of the sum of the ranks' `x` `[sum(counts), ...]`, this rank's rows."""
    padded = x.new_zeros(len(counts), max(counts), *x.shape[1:])
    for of_rank, part in zip(padded, x.split(counts), strict=True):
        of_rank[: len(part)] = part
    own = torch.empty_like(padded[0])
    dist.reduce_scatter(own, list(padded.unbind()), group=group)
    return own[: counts[dist.get_rank(group)]]


def global_mean(own: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' shares of a mean, with this rank's gradient times their number: data parallelism
    takes the mean of the ranks' gradients, and forms the gradient of the sum so."""
    untransformed("global_mean", OVER_RANKS, {"own": [own]})
    total = own.detach().clone()
    dist.all_reduce(total, group=group)
    scaled = own * dist.get_world_size(group)
    return total + (scaled - scaled.detach())


def _exchanged(told: dict[str, Any], group: Group, device: torch.device) -> list[dict[str, Any]]:
    """Every rank's header, JSON in a fixed number of bytes."""
    text = json.dumps(told).encode()
    assert len(text) <= HEADER_BYTES, text
    own = torch.tensor(list(text.ljust(HEADER_BYTES)), dtype=torch.uint8, device=device)
    headers = own.new_empty(dist.get_world_size(group), HEADER_BYTES)
    dist.all_gather(list(headers.unbind()), own, group=group)
    return [json.loads(bytes(header)) for header in headers.tolist()]


def _extent(counts: tuple[int, ...], rank: int) -> slice:
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])
