"""What every plan is asked by."""

from dataclasses import dataclass, fields
from typing import Literal

from mmcore.plan.job import Job, Precision, Setting


@dataclass(frozen=True)
class PlanConfig:
    """What all recipes have in common."""

    global_batch: int
    """Samples a step, of all ranks."""
    gpus: int
    """Data-parallel ranks."""
    gpu: Literal["a100-40gb", "a100-80gb", "a800", "h100", "h200", "b200"] = "h200"
    """Which GPU."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage."""
    precision: Precision = "amp_bf16"
    """fp32; amp_bf16 (fp32 weights, bf16 autocast); bf16 (bf16 weights, fp32 master)."""
    ema: bool = False
    """Keep an average of the weights."""
    json: bool = False
    """Print JSON: bytes, FLOP and seconds of a rank."""

    def job(self) -> Job:
        """What the recipe trains."""
        raise NotImplementedError

    def setting(self) -> Setting:
        """The options that a run has, of those that the recipe has."""
        names = [x.name for x in fields(Setting)]
        return Setting(**{name: getattr(self, name) for name in names if hasattr(self, name)})


@dataclass(frozen=True)
class MicroBatchPlan(PlanConfig):
    """What recipes have in common that can do with less memory and more time."""

    accum: int = 1
    """Micro-batches a step."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward."""
