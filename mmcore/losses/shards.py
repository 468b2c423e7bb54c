"""The ranks' shards of the columns, brought to every rank: all at once, or one after the other around a ring."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from mmcore.losses.ranks import Layout, gather_rows, scatter_sum

# Above 1 GiB (half a million features of 1,024 in bfloat16) one collective no longer gains on the hops of a ring,
# and the float32 gradient of what was gathered takes twice as much again.
GATHER_LIMIT_BYTES = 2**30


class Gathered:
    """All columns at once: one all-gather in their own dtype, one reduce-scatter of their gradient."""

    def __init__(self, layout: Layout, own: list[Tensor]) -> None:
        self.layout = layout
        self.all = [gather_rows(x, layout.cols, layout.group) for x in own]
        self.grad: Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Which columns, and the tensors of these columns."""
        yield slice(0, sum(self.layout.cols)), self.all

    def add_grad(self, grad: Tensor) -> None:
        """This rank's gradient of the block that `blocks` has just yielded."""
        self.grad = scatter_sum(grad, self.layout.cols, self.layout.group)

    def own_grad(self) -> Tensor:
        """The gradient of this rank's shard, summed over all ranks."""
        assert self.grad is not None
        return self.grad


class Ring:
    """One shard at a time: the next is on its way while this one is computed on, and a rank never holds more than two.
    A shard's gradient travels one step behind it, gathers each rank's part, and arrives home."""

    def __init__(self, layout: Layout, own: list[Tensor]) -> None:
        self.layout = layout
        self.own = [x.detach().contiguous() for x in own]
        self.step = 0
        self.grad: Tensor | None = None
        self.transfers: list[dist.Work] = []

    def blocks(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Which columns, and the tensors of these columns, the own ones first."""
        held, size = self.own, self.layout.world_size
        self.grad, self.transfers = None, []
        for self.step in range(size):
            owner = (self.layout.rank - self.step) % size
            coming, transfers = held, []
            if self.step + 1 < size:
                coming, transfers = self._pass_on(held, (owner - 1) % size)
            yield self.layout.cols_of(owner), held
            _wait(transfers)
            held = coming

    def add_grad(self, grad: Tensor) -> None:
        if self.grad is not None:
            _wait(self.transfers)
            grad = grad + self.grad
        owner = (self.layout.rank - self.step - 1) % self.layout.world_size
        (self.grad,), self.transfers = self._pass_on([grad.contiguous()], owner)

    def own_grad(self) -> Tensor:
        assert self.grad is not None
        _wait(self.transfers)
        return self.grad

    def _pass_on(self, held: list[Tensor], owner: int) -> tuple[list[Tensor], list[dist.Work]]:
        """Start to send `held` to the next rank and to receive the shard of `owner` from the one before."""
        group, rank, size = self.layout.group, self.layout.rank, self.layout.world_size
        coming = [x.new_empty(self.layout.cols[owner], *x.shape[1:]) for x in held]
        ops = [dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size) for x in held if len(x)]
        ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=(rank - 1) % size) for x in coming if len(x)]
        return coming, dist.batch_isend_irecv(ops) if ops else []


Shards = Gathered | Ring


def shards_of(layout: Layout, own: list[Tensor], limit_bytes: int) -> Shards:
    """The ring where all columns together would be more than `limit_bytes`."""
    total = sum(x[:1].nbytes if len(x) else x.new_empty(1, *x.shape[1:]).nbytes for x in own)
    return (Gathered if total * sum(layout.cols) <= limit_bytes else Ring)(layout, own)


def _wait(transfers: list[dist.Work]) -> None:
    for transfer in transfers:
        transfer.wait()
