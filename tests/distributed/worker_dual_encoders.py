"""transformers' dual encoders after `use_global_loss`: this rank's loss, and the mean of the ranks' gradients."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmcore.integrations.contrastive import use_global_loss
from tests.distributed import tiny
from tests.distributed.launch import finish
from tests.mmcore.integrations.dual_encoders import batch, make


def measured(name: str) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = make(name)
    use_global_loss(model)
    loss = model(**{key: tiny.share(x, rank, size) for key, x in batch(6).items()}, return_loss=True).loss
    loss.backward()
    gradients = {}
    for parameter, p in model.named_parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            gradients[parameter] = (p.grad / size).flatten().tolist()
    return {"loss": loss.item(), "gradients": gradients}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    finish(folder, {name: measured(name) for name in ("CLIP", "SigLIP")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
