"""A plan, the nearest one that fits, put together as JSON and as tables."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mmcore.plan.hardware import Gpu
from mmcore.plan.job import Job, Setting
from mmcore.plan.memory import FILLED, PARTS, Phase, fits, peak, phases, rank_loss
from mmcore.plan.step import Step, model_flops, step

MOST_GPUS = 1 << 14


@dataclass(frozen=True)
class Plan:
    """What a setting takes, and the nearest one that fits where it does not."""

    job: Job
    setting: Setting
    gpu: Gpu
    phases: list[Phase]
    step: Step
    nearest: "Plan | None"

    @property
    def fits(self) -> bool:
        return fits(self.phases, self.gpu)


def plan(job: Job, setting: Setting, gpu: Gpu) -> Plan:
    found = phases(job, setting, gpu)
    other = None if fits(found, gpu) else nearest(job, setting, gpu)
    better = None if other is None else plan(job, other, gpu)
    return Plan(job, setting, gpu, found, step(job, setting, gpu), better)


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


def as_json(found: Plan) -> dict[str, Any]:
    """Bytes, FLOP and seconds, a rank's but for samples_per_s."""
    gpu, of_step = found.gpu, found.step
    rates = ("bf16_flops", "fp32_flops", "copy_bytes", "exps", "link_bytes", "network_bytes")
    return {
        "job": found.job.name,
        "setting": asdict(found.setting),
        "parameters": {"trained": found.job.trained, "frozen": found.job.parameters - found.job.trained},
        "gpu": {"name": gpu.name, "memory_bytes": gpu.memory_bytes, **{r: asdict(getattr(gpu, r)) for r in rates}},
        "memory": {phase.name: {**phase.parts, "total": phase.total} for phase in found.phases},
        "peak": peak(found.phases).name,
        "fits": found.fits,
        "flops": of_step.flops,
        "model_flops_a_sample": model_flops(found.job, found.setting),
        "sent": dict(of_step.sent),
        "seconds": {x: getattr(of_step, f"{x}_s") for x in ("towers", "loss", "optimizer", "communication", "total")},
        "mfu": of_step.mfu,
        "samples_per_s": of_step.samples_per_s,
        "nearest": None if found.nearest is None else as_json(found.nearest),
    }


def show(found: Plan, console: Console) -> None:
    """Prints a plan: memory by part and phase, then FLOP, transfers and time, then what fits."""
    setting, job = found.setting, found.job
    frozen = job.parameters - job.trained
    console.print(
        f"[bold]{job.name}[/]: {_short(job.trained)} parameters learn"
        + (f", {_short(frozen)} are frozen" if frozen else "")
    )
    console.print(
        f"{setting.gpus} x {found.gpu.name}, global batch {setting.global_batch:,}: {setting.per_rank:,} a rank"
        + (f" in {setting.accum} micro-batches of {setting.micro:,}" if setting.accum > 1 else "")
        + f", ZeRO {setting.zero}, {setting.precision}"
        + (", activation checkpointing" if setting.activation_checkpointing else "")
    )
    console.print(_memory_table(found))
    console.print(_step_table(found))
    console.print(_verdict(found))


def _memory_table(found: Plan) -> Table:
    table = Table(title="memory of a rank, GB (1e9 bytes)", box=box.SIMPLE_HEAD, title_justify="left")
    highest = peak(found.phases)
    table.add_column("")
    for phase in found.phases:
        table.add_column(phase.name, justify="right", style="bold" if phase is highest else "")
    for part in PARTS:
        if any(phase.parts[part] for phase in found.phases):
            table.add_row(part, *(_gb(phase.parts[part]) for phase in found.phases))
    table.add_section()
    table.add_row("total", *(_gb(phase.total) for phase in found.phases))
    return table


def _step_table(found: Plan) -> Table:
    table = Table(title="a step of a rank", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("asked for", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    of_step, of_loss = found.step, rank_loss(found.job, found.setting, found.gpu)
    of_towers = of_step.flops - (0 if of_loss is None else of_loss.cost.flops)
    table.add_row("forwards and backwards", f"{of_towers / 1e12:,.1f} TFLOP", _ms(of_step.towers_s))
    if of_loss is not None:
        how = "" if found.setting.gpus == 1 else ", features in a ring" if of_loss.is_ring else ", features gathered"
        table.add_row(f"loss{how}", f"{of_loss.cost.flops / 1e12:,.1f} TFLOP", _ms(of_step.loss_s))
    table.add_row("optimizer", "", _ms(of_step.optimizer_s))
    behind = set(() if of_loss is None or not of_loss.is_ring else of_loss.sent)
    for what, size in of_step.sent.items():
        table.add_row(f"sent: {what}" + (" (behind the loss)" if what in behind else ""), f"{_gb(size)} GB", "")
    table.add_row("transfers that nothing hides", "", _ms(of_step.communication_s))
    table.add_section()
    rate = f"{of_step.samples_per_s:,.0f} samples/s, MFU {100 * of_step.mfu:.0f} %"
    table.add_row("step", rate, _ms(of_step.total_s))
    return table


def _verdict(found: Plan) -> str:
    highest, gpu = peak(found.phases), found.gpu
    limit = _gb(FILLED * gpu.memory_bytes)
    of = f"{_gb(highest.total)} GB of {limit} ({100 * FILLED:.0f} % of {gpu.name}'s {_gb(gpu.memory_bytes)})"
    if found.fits:
        return f"[green]fits[/]: the {highest.name} needs {of}"
    largest = sorted(highest.parts.items(), key=lambda part: -part[1])[:2]
    what = ", ".join(f"{part} {_gb(size)}" for part, size in largest)
    said = f"[red]does not fit[/]: the {highest.name} needs {of}: {what}"
    other = found.nearest
    if other is None:
        return f"{said}\nno setting of this recipe fits"
    changed = changes(found.setting, other.setting).items()
    flags = " ".join(flag if value is True else f"{flag} {value}" for flag, value in changed)
    return (
        f"{said}\nnearest that fits: [bold]{flags}[/] (--batch-size {other.setting.micro}), "
        f"{_gb(peak(other.phases).total)} GB, {other.step.samples_per_s:,.0f} samples/s"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 100e9 else f"{size / 1e9:,.0f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
