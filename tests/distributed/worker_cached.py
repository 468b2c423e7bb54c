"""Cached steps under DDP, FSDP2, accelerate and DeepSpeed: the loss and the gradient that data parallelism forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmcore.integrations.sentence_transformers import GlobalRankingLoss
from mmcore.losses import cached_contrastive_step, global_assignment_losses
from mmcore.parts.heads import Centre
from mmcore.train.engine import init_distributed
from tests.distributed import cached
from tests.distributed.cases import extent
from tests.distributed.launch import serve

CHUNK = 3


def gradients(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        found[name] = None if grad is None else grad.tolist()
    return found


def rows() -> slice:
    return extent(cached.SHARES[dist.get_world_size()], dist.get_rank())


def wrapped(wrap: Callable[[nn.Module], Any], names: list[str], backward: Any = None) -> dict[str, Any]:
    """Each case twice, so that a wrapper that was left in an odd state is seen."""
    results = {}
    for name in names:
        model = cached.Encoder()
        outer = wrap(model)
        for _ in range(2):
            model.zero_grad()
            encoders, inputs, loss = cached.cases(outer, model.logit_scale, rows())[name]
            options = {"chunk_size": CHUNK, "modules": [outer], "backward": backward}
            value = cached_contrastive_step(encoders, inputs, loss=loss, **options)
            results[name] = {"loss": value.item(), "gradients": gradients(model)}
    return results


def under_zero(stage: int) -> dict[str, Any]:
    """float32; the weights after a step of SGD, whose difference is the gradient."""
    model = cached.Encoder(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    encoders, inputs, loss = cached.cases(engine, model.logit_scale, rows())["pairs"]
    value = cached_contrastive_step(encoders, inputs, loss=loss, chunk_size=CHUNK)
    engine.step()
    after = dict(model.named_parameters())
    engine.destroy()
    return {"loss": value.item(), "gradients": {name: (x - after[name]).tolist() for name, x in before.items()}}


def ranking() -> dict[str, Any]:
    """sentence-transformers' loss of texts, with a negative each."""
    model, texts = cached.Encoder(), cached.batch()[1][rows()]
    columns = [{"input_ids": x} for x in (texts, texts.flip(1) // 2, texts // 3)]
    value = GlobalRankingLoss(DistributedDataParallel(cached.OfTexts(model)), mini_batch_size=CHUNK)(columns)
    value.backward()
    return {"loss": value.item(), "gradient": gradients(model)["text.weight"]}


def assignment() -> dict[str, Any]:
    """The three losses of this rank's rows, and the gradient of a weighted sum of them."""
    leaves = [x[rows()].requires_grad_() for x in cached.logits()]
    losses = global_assignment_losses(*leaves)
    total: Any = sum(w * x for w, x in zip(cached.WEIGHTS, losses, strict=True))
    grads = torch.autograd.grad(total, leaves)
    return {"losses": [x.item() for x in losses], "grads": [x.tolist() for x in grads]}


def distilled(counts: dict[int, tuple[int, ...]]) -> dict[str, Any]:
    """The losses of self-distillation of this rank's rows, and a centre of them."""
    own, centre = extent(counts[dist.get_world_size()], dist.get_rank()), Centre(7).double()
    centre.add(cached.logits()[1][own])
    centre.update()
    found: dict[str, Any] = {n: (x.item(), grad.tolist()) for n, (x, grad) in cached.distilled(own).items()}
    return {**found, "centre": centre.mean.tolist()}


def refused() -> str:
    """What each rank is told where the last is given inputs that do not fit."""
    model, odd = cached.Encoder(), dist.get_rank() == dist.get_world_size() - 1
    images, texts, _ = cached.batch()
    try:
        cached_contrastive_step(model, [(images, texts[odd:])], loss=cached.sigmoid, chunk_size=2)
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    init_distributed()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    names = ["pairs", "pairs by name", "two inputs"]
    results = {
        "ddp": wrapped(DistributedDataParallel, names),
        "fsdp2": wrapped(lambda model: fully_shard(model, mesh=mesh), ["pairs", "pairs by name"]),
        "ranking": ranking(),
        "assignment": assignment(),
        "distilled": [distilled(counts) for counts in (cached.SHARES, cached.WITH_NONE)],
        "refused": refused(),
    }
    if dist.get_world_size() == 2:
        accelerator = Accelerator(cpu=True)
        results["accelerate"] = wrapped(accelerator.prepare, ["pairs"], accelerator.backward)
        results["zero"] = {f"ZeRO {stage}": under_zero(stage) for stage in (0, 1, 2, 3)}
    return results


if __name__ == "__main__":
    serve(main)
