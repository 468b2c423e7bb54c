"""Memory of a rank by part, in each phase of a step."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from mmcore.plan import zero
from mmcore.plan.exchange import Loss, loss
from mmcore.plan.hardware import Gpu
from mmcore.plan.job import Job, Setting

PARTS = (
    *("weights", "gradients", "optimizer", "EMA", "activations"),
    *("gathered features", "loss workspace", "buffers", "batch"),
)
# Of a GPU's memory what a plan fills: the rest is for the context, the libraries, and what lies between tensors.
FILLED = 0.9


class Phase(NamedTuple):
    """Bytes that a rank holds at the height of a phase, by part."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def phases(job: Job, setting: Setting, gpu: Gpu) -> list[Phase]:
    """The phases of a step after the first: the forward ends with all activations of a micro-batch, beside the
    gradients of those before it; the contrastive loss comes on top of them, or of the features alone where there are
    several; the backward begins with all of them and ends with all gradients; the optimizer steps."""
    # a GPU is given the images that it needs at once: of a micro-batch, but for a loss in which all meet
    on_device = setting.per_rank if gpu.is_cpu or job.exchange is not None else setting.micro
    always = zero.states(job, setting, is_cpu=gpu.is_cpu) | {"batch": job.batch_bytes * on_device}
    activations, forward, backward = _activations(job, setting)
    gathered = {"weights": zero.gathered_bytes(job, setting)}
    reduced, buffers, stepped = zero.reduction(job, setting, is_cpu=gpu.is_cpu)
    of_loss = rank_loss(job, setting, gpu)
    # of all micro-batches, gathered from them and as one, and their gradient
    cached_features = 3 * 2 * 4 * setting.per_rank * job.exchange.width if job.exchange is not None else 0.0
    pending: dict[str, float] = {}  # what is there while micro-batches are accumulated
    if setting.accum > 1:
        pending = {"gradients": setting.weight_bytes * job.trained, "loss workspace": cached_features}
    # stages 1 and 2 allocate their bucket at the first gradient, but where gradients wait on the parameters
    has_early_bucket = setting.zero in (1, 2) and setting.accum == 1 and not gpu.is_cpu
    early = zero.bucket_bytes(job, setting, is_cpu=False) if has_early_bucket else 0.0
    in_forward, in_backward = {"activations": activations + forward}, {"activations": activations + backward}
    found = [
        Phase("forward", _sum(always, pending, gathered, in_forward)),
        Phase("backward", _sum(always, pending, gathered, in_backward, {"buffers": early})),
        Phase("reduction", _sum(always, {"gradients": reduced, "buffers": buffers})),
        Phase("step", _sum(always, {"gradients": stepped})),
    ]
    if of_loss is not None:
        features = {"gathered features": of_loss.gathered, "loss workspace": of_loss.workspace}
        kept = {"loss workspace": cached_features} if setting.accum > 1 else {"activations": activations}
        found.insert(1, Phase("loss", _sum(always, gathered, kept, features)))
    return found


def peak(found: list[Phase]) -> Phase:
    return max(found, key=lambda phase: phase.total)


def fits(found: list[Phase], gpu: Gpu) -> bool:
    return peak(found).total <= FILLED * gpu.memory_bytes


def rank_loss(job: Job, setting: Setting, gpu: Gpu) -> Loss | None:
    """The contrastive loss of a rank, where the job has one."""
    if job.exchange is None:
        return None
    return loss(job.exchange, setting.per_rank, setting.gpus, is_cpu=gpu.is_cpu)


def _activations(job: Job, setting: Setting) -> tuple[float, float, float]:
    """Bytes of a micro-batch: what forwards keep, and what a forward and a backward need beyond that for a while."""
    counted, plain = job.counted(setting), job.counted(replace(setting, activation_checkpointing=False))
    micro, kept, cast, forward, backward = setting.micro, 0.0, 0.0, 0.0, 0.0
    for piece, whole in zip(counted, plain, strict=True):
        demand = piece.of(micro)
        kept += demand.kept
        cast += demand.cast
        forward = max(forward, demand.forward_widest)
        # what is computed again, layer by layer
        again = whole.layer.kept * micro if setting.activation_checkpointing else 0.0
        backward = max(backward, demand.backward_widest + again)
    return kept, cast + forward, backward


def _sum(*all_parts: Mapping[str, float]) -> dict[str, float]:
    return {part: sum(parts.get(part, 0.0) for parts in all_parts) for part in PARTS}
