"""Loss and data-parallel mean of the gradients of TwoTower in float64, without an engine."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmcore.losses import global_contrastive_loss
from tests.distributed import tiny


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = tiny.TwoTower(torch.float64)
    images, tokens = (tiny.share(x, rank, world_size) for x in tiny.batch(12, 0, torch.float64))
    loss = global_contrastive_loss(*model(images, tokens))
    loss.backward()
    gradients = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        gradients[name] = (p.grad / world_size).tolist()
    message = ""
    try:
        uneven = torch.randn(3 + (rank == 0), 8)
        global_contrastive_loss(uneven, uneven, torch.tensor(5.0))
    except ValueError as error:
        message = str(error)
    result = {"loss": loss.item(), "gradients": gradients, "uneven": message}
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


main()
