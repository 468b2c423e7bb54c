"""`mmcore.losses.global_contrastive_loss` on two ranks of a CPU, forward and backward with what is sent, beside
open_clip's ways with torch's differentiable collectives.

`bench/scale.py` has many ranks, simulated. The roofline is a rank's share of three bare products: logits as
few as these are kept.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.multiprocessing.spawn import start_processes

from bench.case import Case, time_case
from bench.measure import assert_agrees, gemm_flops_per_s, relative_error
from bench.ops.contrastive import cost_of, features
from mmcore.losses import global_contrastive_loss
from mmkernels import contrastive_loss

ROWS, WIDTH, NUM_RANKS = 512, 512, 2
STOP = -1
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def gathered(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return global_contrastive_loss(a, b, scale)


def ring(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return global_contrastive_loss(a, b, scale, gather_limit_bytes=0)


def open_clip_local(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss with local_loss and gather_with_grad: a rank's logits of both directions."""
    per_image = scale * a @ torch.cat(all_gather(b)).T
    per_text = scale * b @ torch.cat(all_gather(a)).T
    target = torch.arange(len(a)) + dist.get_rank() * len(a)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def open_clip_global(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss with gather_with_grad alone: all logits on each rank."""
    logits = scale * torch.cat(all_gather(a)) @ torch.cat(all_gather(b)).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


CONTENDERS: Mapping[str, Loss] = {
    "mmcore": gathered,
    "mmcore, ring": ring,
    "open_clip, local_loss": open_clip_local,
    "open_clip": open_clip_global,
}


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    return features(NUM_RANKS * ROWS, WIDTH, torch.float32, torch.device("cpu"))


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows, and the scale."""
    a, b, scale = whole_batch()
    own = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    return *(x.detach()[own].clone().requires_grad_() for x in (a, b)), scale  # pyright: ignore[reportReturnType]


def told(contender: int) -> int:
    """What the first rank says is next."""
    place = torch.tensor(contender)
    dist.broadcast(place, 0)
    return int(place)


def join(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=300)
    )


def follow(_: int, file: str) -> None:
    """The second rank: the loss that it is told, and its gradients, until it is told to stop."""
    join(1, file)
    mine = leaves()
    while (contender := told(STOP)) != STOP:
        torch.autograd.grad(list(CONTENDERS.values())[contender](*mine), mine)
    dist.destroy_process_group()


@contextmanager
def two_ranks() -> Iterator[None]:
    """This process is the first rank for as long as the block lasts."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "ranks")
        second = start_processes(follow, (file,), nprocs=1, join=False, start_method="spawn")
        assert second is not None
        join(0, file)
        try:
            yield
            told(STOP)
            second.join()
        finally:
            for process in second.processes:
                if process is not None:
                    process.kill()
            dist.destroy_process_group()
            torch.set_num_threads(threads)


def first_rank(contender: str, mine: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss, which the second rank computes too, and its gradients behind it."""
    told(list(CONTENDERS).index(contender))
    return CONTENDERS[contender](*mine)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    with two_ranks():
        yield


@functools.cache
def gold() -> torch.Tensor:
    """da of the first rank's rows in float64; data parallelism takes the mean over ranks."""
    a, b, scale = (x.detach().double().requires_grad_() for x in whole_batch())
    return torch.autograd.grad(contrastive_loss(a, b, scale), a)[0][:ROWS] * NUM_RANKS


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo's ranks are a CPU's, and NCCL's want a GPU each")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_global_contrastive_loss(benchmark: Any, ranks: None, contender: str) -> None:
    mine = leaves()
    da = torch.autograd.grad(first_rank(contender, mine), mine)[0]
    assert_agrees(da, gold())
    forward, backward = cost_of(mine[0], NUM_RANKS * ROWS)
    case = Case(
        group=f"global_contrastive_loss float32 W{NUM_RANKS}-B{ROWS}-D{WIDTH}",
        contender=contender,
        loss=lambda: first_rank(contender, mine),
        wrt=mine,
        mode="both",
        floor_s=(forward + backward).flops / gemm_flops_per_s(ROWS, ROWS, WIDTH, torch.float32, CPU),
        error=lambda: relative_error(da, gold()),
    )
    time_case(benchmark, CPU, case)
