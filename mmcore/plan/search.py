"""The nearest setting that fits, of those that the recipe has."""

from collections.abc import Iterator
from dataclasses import replace

from mmcore.plan.hardware import Gpu
from mmcore.plan.job import Job, Setting
from mmcore.plan.memory import fits, phases
from mmcore.plan.step import step

MOST_GPUS = 1 << 14


def nearest(job: Job, setting: Setting, gpu: Gpu) -> Setting | None:
    """The setting of the same global batch that fits with the fewest options changed, the fastest of those: on the same
    number of GPUs if there is one, else on the fewest of twice, four times... as many; None if there is none."""
    gpus = setting.gpus
    while gpus <= MOST_GPUS and setting.global_batch % (gpus * setting.accum) == 0:
        found = [x for x in _neighbours(job, replace(setting, gpus=gpus)) if fits(phases(job, x, gpu), gpu)]
        if found:
            return min(found, key=lambda x: (len(changes(setting, x)), step(job, x, gpu).total_s))
        gpus *= 2
    return None


def changes(before: Setting, after: Setting) -> dict[str, object]:
    """The options that differ, as flags of the command line."""
    names = ("gpus", "zero", "accum", "activation_checkpointing")
    changed = [name for name in names if getattr(before, name) != getattr(after, name)]
    return {f"--{name.replace('_', '-')}": getattr(after, name) for name in changed}


def _neighbours(job: Job, setting: Setting) -> Iterator[Setting]:
    stages = range(setting.zero, 4) if "zero" in job.levers else [setting.zero]
    again = {setting.activation_checkpointing, "activation_checkpointing" in job.levers}
    for zero in stages:
        for activation_checkpointing in sorted(again):
            accum = setting.accum
            while setting.per_rank % accum == 0:
                yield replace(setting, zero=zero, accum=accum, activation_checkpointing=activation_checkpointing)
                if "accum" not in job.levers:
                    break
                accum *= 2
