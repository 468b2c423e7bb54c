"""Gradients that a float64 model forms under each ZeRO stage, before DeepSpeed casts them to its fp32 master."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from mmcore.losses import global_contrastive_loss
from mmcore.train.engine import Engine, EngineConfig, deepspeed_config, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups
from tests.distributed import tiny
from tests.distributed.launch import finish


def gradients(zero: int, rank: int, world_size: int) -> tuple[float, dict[str, list]]:
    model = tiny.TwoTower(torch.float64)
    caught: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: caught.update({name: g.detach().clone()}))
    optimizer = make_optimizer(param_groups(model, 0.2), OptimConfig())
    resolved, precision = deepspeed_config(
        EngineConfig(zero=zero),  # pyright: ignore[reportArgumentType]
        OptimConfig(),
        batch_size=12 // world_size,
        world_size=world_size,
    )
    # its stage 3 asks for float64 on a processor that has float16, and then refuses it
    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: False
    engine = Engine(model, optimizer, resolved, precision)
    images, tokens = (tiny.share(x, rank, world_size) for x in tiny.batch(12, 0, torch.float64))
    loss = global_contrastive_loss(*engine(images, tokens))
    engine.backward(loss, last=False)  # DeepSpeed cannot reduce float64 at stage 0; the test reduces
    for g in caught.values():
        dist.all_reduce(g)
    engine.close()
    return loss.item(), {name: (g / world_size).tolist() for name, g in caught.items()}


def main() -> None:
    folder = Path(sys.argv[1])
    rank, world_size = init_distributed()
    result = {}
    for zero in range(4):
        loss, found = gradients(zero, rank, world_size)
        result[str(zero)] = {"loss": loss, "gradients": found}
    finish(folder, result)


main()
