"""The peak memory that `mmcore plan` predicts of a run on this CPU, and what the real engine takes.

`python -m bench.plan FILE` measures every case in a process of its own and writes JSON.
"""

import ctypes
import gc
import json
import platform
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import CLEAR_REFS, in_process, status_bytes
from bench.plan_models import Trained, TrainedClip, TrainedLlava
from mmcore.parts.adapters import Lora
from mmcore.plan import memory
from mmcore.plan.hardware import Gpu, Rate
from mmcore.plan.job import Setting
from mmcore.train.config import EngineConfig
from mmcore.train.deepspeed_json import deepspeed_config
from mmcore.train.engine import Engine, init_distributed
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups

_NO_RATE = Rate(float("inf"), "measured")
CPU = Gpu("cpu", 0.0, _NO_RATE, _NO_RATE, _NO_RATE, _NO_RATE, _NO_RATE, _NO_RATE, is_cpu=True)


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and how many steps are measured."""

    trained: Trained
    setting: Setting
    steps: int = 2


_plain = Setting(64, 1, zero=1, precision="fp32", ema=True)
_few = replace(_plain, global_batch=24)
_again = replace(_few, activation_checkpointing=True)
_clip, _llava = TrainedClip(512, 8), TrainedLlava(256, 2)
CASES: dict[str, Case] = {
    "quick": Case(TrainedClip(256, 4), _few, steps=1),
    "plain": Case(_clip, _plain),
    "accum": Case(_clip, replace(_plain, accum=4)),
    "activation-checkpointing": Case(_clip, replace(_plain, activation_checkpointing=True)),
    "bf16 autocast": Case(_clip, replace(_plain, precision="amp_bf16")),
    "llava-accum": Case(_llava, replace(_plain, global_batch=12, accum=3), steps=1),
    "llava-activation-checkpointing": Case(_llava, _again, steps=1),
    "llava-stage1-activation-checkpointing": Case(TrainedLlava(256, 4, "projector"), _again, steps=1),
    "llava-lora": Case(TrainedLlava(256, 2, lora=Lora(16, 32, 0.05)), _few, steps=1),
    "llava-lora, bf16 autocast": Case(
        TrainedLlava(256, 2, lora=Lora(16, 32, 0.05)), replace(_few, precision="amp_bf16"), steps=1
    ),
}
# What takes seconds: a CLIP, and what LLaVA has to take less memory.
QUICK = ("quick", "llava-accum", "llava-activation-checkpointing")


def measured(name: str) -> dict[str, Any]:
    """Runs a case in a process of its own."""
    return in_process("bench.plan", name)


def run(case: Case) -> dict[str, Any]:
    """Predicts a case and measures it, in this process."""
    init_distributed()
    few = replace(case.setting, global_batch=2 * case.setting.accum)
    _steps(replace(case, trained=case.trained.small(), setting=few))
    job = case.trained.job()
    phases = memory.phases(job, case.setting, CPU)
    return {
        "setting": asdict(case.setting),
        "parameters": job.trained,
        "memory": {phase.name: phase.total for phase in phases},
        "peak": memory.peak(phases).name,
        "predicted_bytes": memory.peak(phases).total,
        "measured_bytes": _steps(case),
    }


def _steps(case: Case) -> int:
    """The growth of the resident size at its height, in the steps after the first."""
    _give_back()
    before = status_bytes("VmRSS")
    setting, trained = case.setting, case.trained
    model = trained.model(setting)
    optim = OptimConfig(ema=0.99)
    options = EngineConfig(zero=setting.zero, precision=setting.precision)  # pyright: ignore[reportArgumentType]
    resolved, precision = deepspeed_config(options, optim, batch_size=setting.per_rank, world_size=1)
    engine = Engine(model, make_optimizer(param_groups(model, optim), optim), resolved, precision)
    del model
    batch, peak = trained.batch(setting), 0
    for i in range(case.steps + 1):
        _give_back()
        trained.backward(engine, batch, setting)
        engine.step(1e-4)
        if i:
            peak = max(peak, status_bytes("VmHWM") - before)
    engine.close()
    return peak


def _give_back() -> None:
    """Frees what can be freed, and forgets the height so far."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path(CLEAR_REFS).write_text("5")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main(argument: str) -> None:
    """Measures one case in this process, or all into a file."""
    if argument in CASES:
        print(json.dumps(run(CASES[argument])))
        return
    document = {"cpu": _cpu(), "torch": torch.__version__, "cases": {name: measured(name) for name in CASES}}
    Path(argument).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
