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
from mmcore.models.clip import CLIP, CLIPConfig, TextConfig
from mmcore.models.vit import VisionConfig
from mmcore.plan import memory
from mmcore.plan.clip_job import clip_job_of
from mmcore.plan.hardware import Gpu, Rate
from mmcore.plan.job import Setting
from mmcore.train.engine import Engine, EngineConfig, deepspeed_config, init_distributed
from mmcore.train.gradcache import contrastive_backward
from mmcore.train.optim import OptimConfig, make_optimizer, param_groups


def _model(width: int, num_layers: int) -> CLIPConfig:
    vision = VisionConfig(112, 16, width, num_layers, width // 64, 4 * width)
    text = TextConfig(8192, 32, width // 2, num_layers, width // 128, 2 * width)
    return CLIPConfig(256, vision, text)


WARM_UP, QUICK, SMALL = _model(128, 1), _model(256, 4), _model(512, 8)


_NO_RATE = Rate(float("inf"), "measured")
CPU = Gpu("cpu", 0.0, _NO_RATE, _NO_RATE, _NO_RATE, _NO_RATE, _NO_RATE, _NO_RATE, is_cpu=True)


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and how many steps are measured."""

    config: CLIPConfig
    setting: Setting
    steps: int = 2


_plain = Setting(64, 1, zero=1, precision="fp32", ema=True)
CASES: dict[str, Case] = {
    "quick": Case(QUICK, replace(_plain, global_batch=24), steps=1),
    "plain": Case(SMALL, _plain),
    "accum": Case(SMALL, replace(_plain, accum=4)),
    "activation-checkpointing": Case(SMALL, replace(_plain, activation_checkpointing=True)),
    "bf16 autocast": Case(SMALL, replace(_plain, precision="amp_bf16")),
}


def measured(name: str) -> dict[str, Any]:
    """Runs a case in a process of its own."""
    return in_process("bench.plan", name)


def run(case: Case) -> dict[str, Any]:
    """Predicts a case and measures it, in this process."""
    init_distributed()
    _steps(replace(case, config=WARM_UP, setting=replace(case.setting, global_batch=8)))
    job = clip_job_of("", case.config)
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
    setting, config = case.setting, case.config
    model = CLIP(config)
    model.set_activation_checkpointing(setting.activation_checkpointing)
    optim = OptimConfig(ema=0.99)
    options = EngineConfig(zero=setting.zero, precision=setting.precision)  # pyright: ignore[reportArgumentType]
    resolved, precision = deepspeed_config(options, optim, batch_size=setting.per_rank, world_size=1)
    engine = Engine(model, make_optimizer(param_groups(model, 0.2), optim), resolved, precision)
    del model
    size = config.vision.image_size
    images = torch.randn(setting.per_rank, 3, size, size)
    length, end = config.text.context_length, config.text.vocab_size - 1
    tokens = torch.randint(1, end, (setting.per_rank, length))
    tokens[:, -1] = end
    peak = 0
    for i in range(case.steps + 1):
        _give_back()
        contrastive_backward(engine, images, tokens, [length] * setting.per_rank, setting.accum)
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
