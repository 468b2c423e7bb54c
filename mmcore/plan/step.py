"""The time of a step: products, main memory and exponentials one after the other at a GPU's rates, as bench's cost
model has it, and what no computation hides of the communication."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from mmcore.plan import zero
from mmcore.plan.hardware import Gpu
from mmcore.plan.job import Job, Setting
from mmcore.plan.memory import rank_loss


class Step(NamedTuple):
    """A step of a rank."""

    flops: float  # of products, those that are computed again included
    towers_s: float  # forwards and backwards
    loss_s: float  # the contrastive loss, a ring's transfers behind it
    optimizer_s: float  # AdamW, and the average
    communication_s: float  # all others' transfers
    sent: Mapping[str, float]  # bytes that the rank sends, by what they are
    mfu: float  # share of the bfloat16 rate that the model's own FLOP, each once, would take
    samples_per_s: float  # of all ranks

    @property
    def total_s(self) -> float:
        return self.towers_s + self.loss_s + self.optimizer_s + self.communication_s


def step(job: Job, setting: Setting, gpu: Gpu) -> Step:
    """Predicts a step; data loading is taken to be hidden behind it."""
    forwards = job.forwards(setting)
    flops = moved = 0.0
    for piece in job.counted(setting):
        demand = piece.of(setting.micro)
        flops += setting.accum * (forwards * demand.forward_flops + demand.backward_flops)
        moved += setting.accum * (forwards * demand.forward_moved + demand.backward_moved)
    rate = gpu.fp32_flops if setting.precision == "fp32" else gpu.bf16_flops
    towers_s = flops / rate.per_s + moved / gpu.copy_bytes.per_s
    per_s, sent = gpu.bytes_between(setting.gpus), dict(zero.traffic(job, setting))
    in_all = sum(sent.values()) / per_s
    if setting.zero == 3:  # weights are gathered ahead
        in_all -= min(sent.get("weights", 0.0) / per_s, towers_s)
    of_loss, loss_s = rank_loss(job, setting, gpu), 0.0
    if of_loss is not None:
        cost = of_loss.cost
        loss_s = cost.flops / gpu.fp32_flops.per_s + cost.bytes_moved / gpu.copy_bytes.per_s
        loss_s += cost.exps / gpu.exps.per_s
        flops += cost.flops
        features_s = sum(of_loss.sent.values()) / per_s
        if of_loss.is_ring:
            loss_s = max(loss_s, features_s)
        else:
            in_all += features_s
        sent |= of_loss.sent
    # weights and moments read and written, the gradient read, the average read and written: float32
    of_parameter = 28 + (8 if setting.ema else 0)
    optimizer_s = of_parameter * job.trained / (setting.gpus if setting.zero else 1) / gpu.copy_bytes.per_s
    total_s = towers_s + loss_s + optimizer_s + in_all
    once = model_flops(job, setting) * setting.per_rank
    mfu = once / total_s / gpu.bf16_flops.per_s
    return Step(flops, towers_s, loss_s, optimizer_s, in_all, sent, mfu, setting.global_batch / total_s)


def model_flops(job: Job, setting: Setting) -> float:
    """FLOP of a sample's forward and backward, without recomputation."""
    plain = job.counted(replace(setting, activation_checkpointing=False))
    return sum(piece.each.forward_flops + piece.each.backward_flops for piece in plain)
