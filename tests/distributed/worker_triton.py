"""The distributed losses on the Triton kernels, which an interpreter runs: float32, uneven ranks."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmkernels._device import runs_triton
from tests.distributed import cases
from tests.distributed.launch import finish
from tests.distributed.worker_losses import apart, contrastive, sigmoid, token


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert runs_triton(torch.empty(1))
    layout = cases.LAYOUTS[dist.get_world_size()]["uneven"]
    result: dict[str, Any] = {
        key: {
            f"{name}; {exchange}": one(layout, named[name], limit, torch.float32)
            for name in names
            for exchange, limit in cases.EXCHANGES.items()
        }
        for key, one, named, names in (
            ("variants", contrastive, cases.CASES, ("everything", "normalized")),
            ("sigmoid", sigmoid, cases.SIGMOID_CASES, ("plain",)),
            ("token", token, cases.TOKEN_CASES, ("masked, smoothed",)),
        )
    }
    result["apart"] = {exchange: apart(limit, torch.float32) for exchange, limit in cases.EXCHANGES.items()}
    finish(Path(sys.argv[1]), result)


main()
