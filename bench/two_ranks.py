"""A second rank beside this process: it runs what this one runs, on gloo, with a thread each."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.multiprocessing.spawn import start_processes

from bench.ops.contrastive import features
from mmcore.losses import global_contrastive_loss

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
