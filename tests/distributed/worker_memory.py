"""Loads a language model on several ranks and measures the memory that it takes at most; split among them, the values
that a rank has."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint import Stored
from mmcore.parts.language import load_language_model
from mmcore.parts.language_folder import Language
from mmcore.parts.probe import check_head, why_not_packed
from mmcore.runs import load_weights
from mmcore.train.config import EngineConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.engine import init_distributed, partitioner
from mmcore.train.optim import OptimConfig
from tests.distributed.launch import serve


def resident(key: str) -> int:
    """Bytes that /proc says of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak(work: Callable[[], Any]) -> tuple[int, Any]:
    """The bytes that were held at most, beside those that were held before, and the result."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = work()
    return resident("VmHWM") - before, result


def main(folder: Path, llm: str, zero: Any, dtype: str) -> dict[str, Any]:
    rank, world_size = init_distributed()
    path, kind = Path(llm), getattr(torch, dtype)

    def probe() -> str | None:
        model = load_language_model(path, dtype=None)
        check_head("probe", model)
        return why_not_packed(model)

    probed, reason = peak(probe) if rank == 0 else (0, None)
    optim = OptimConfig()
    config, _ = deepspeed_config(EngineConfig(zero=zero), optim, batch_size=1, world_size=world_size)
    language = Language(None, path, dtype=kind)
    loaded, model = peak(lambda: language.load(partitioner(config)))
    state, is_right = Stored(path.glob("*.safetensors")), True
    again, _ = peak(lambda: load_weights(model, state, is_whole=False))
    for name, p in model.named_parameters():
        wanted = state[name].to(kind)
        if zero == 3:
            wanted = wanted.flatten().tensor_split(world_size)[rank]  # numbers of weights are even
        found = p.ds_tensor if zero == 3 else p.data
        is_right = is_right and found.dtype == kind and torch.equal(found.view(-1), wanted.reshape(-1))
    return {"probed": probed, "reason": reason, "loaded": loaded, "again": again, "is_right": is_right}


serve(main)
