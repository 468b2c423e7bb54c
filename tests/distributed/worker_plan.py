"""Runs the real engine as one rank of many, the others being fake: what it sends in a step and holds between steps.

Prints a line of JSON a setting: {"zero", "precision", "accum", "sent": {...}, "held"}.
"""

import gc
import json
import os
import sys
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmcore.models.clip import CLIP
from mmcore.models.clip_configs import clip_config
from mmcore.plan.zero import BUCKET
from mmcore.train.engine import Engine, EngineConfig, deepspeed_config, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups

SETTINGS = (
    (0, "fp32", 1),
    (1, "fp32", 1),
    (1, "bf16", 1),
    (2, "amp_bf16", 4),
    (3, "bf16", 1),
    (3, "fp32", 4),
)


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends in rings, by collective: of a gather all parts but one, of an all-reduce twice as
    much."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            whole = max(x.nbytes for x in tensors)
            once = whole * (self.ranks - 1) / self.ranks
            self.sent[name] += {"allreduce_": 2, "broadcast_": 0}.get(name, 1) * once
        return func(*args, **(kwargs or {}))


def held() -> dict[int, int]:
    """Bytes of all tensors that there are, by storage, but for ZeRO's bucket."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return {place: size for place, size in found.items() if size not in (2 * BUCKET, 4 * BUCKET)}


def measure(zero: int, precision: Any, accum: int, ranks: int) -> dict[str, Any]:
    before = set(held())
    optim = OptimConfig(ema=0.99)
    config = EngineConfig(zero=zero, precision=precision)  # pyright: ignore[reportArgumentType]
    resolved, precision = deepspeed_config(config, optim, batch_size=2 * accum, world_size=ranks)
    model = CLIP(clip_config("tiny"))
    engine = Engine(model, make_optimizer(param_groups(model, 0.2), optim), resolved, precision)
    del model
    images, tokens = torch.randn(2, 3, 16, 16), torch.randint(1, 1000, (2, 32))

    def forward() -> Tensor:
        a, b, scale = engine(images, tokens)
        return ((a * b).sum() * scale).sum()

    def step() -> None:
        if accum == 1:
            engine.backward(forward())
        else:
            with torch.no_grad():
                for _ in range(accum):
                    forward()
            with engine.accumulate():
                for i in range(accum):
                    engine.backward(forward(), last=i == accum - 1)
        engine.step(1e-3)

    step()
    with Traffic(ranks) as traffic:
        step()
    now = held()
    of_engine = sum(size for place, size in now.items() if place not in before)
    sent = dict(traffic.sent)
    engine.close()
    return {"zero": zero, "precision": precision, "accum": accum, "sent": sent, "held": of_engine}


def main(ranks: int) -> None:
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    init_distributed()
    for zero, precision, accum in SETTINGS:
        print(json.dumps(measure(zero, precision, accum, ranks)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
