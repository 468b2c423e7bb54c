"""Settings that every recipe has: the run, and DeepSpeed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmcore.settings import flag, free

Precision = Literal["fp32", "amp_bf16", "bf16"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes, how long it lasts, and what it leaves."""

    out: Path | None = field(default=None, metadata=free)
    """Folder of the run, which must be new unless --resume; None = runs/RECIPE-DATE-TIME."""
    resume: str | None = field(default=None, metadata=free)
    """'latest' = go on from the newest checkpoint of --out (from the start where it has none yet), or the folder
    of one checkpoint."""
    epochs: int = 32
    """Passes over the training pairs."""
    steps: int | None = None
    """Optimizer steps in all; None = what --epochs gives."""
    batch_size: int = field(default=256, metadata=free)
    """Samples a rank and micro-batch; the whole batch is this times --accum times the number of ranks."""
    accum: int = field(default=1, metadata=free)
    """Micro-batches a step, at the memory of one. A contrastive loss still sees the whole batch (GradCache)."""
    seed: int = 0
    """Seed of the weights, the split and the order of the data."""
    save_every: int | None = field(default=None, metadata=free)
    """Steps between checkpoints; None = one an epoch, and always one at the end."""
    keep: int = field(default=3, metadata=free)
    """Checkpoints that stay, the newest."""
    eval_every: int | None = field(default=None, metadata=free)
    """Steps between evaluations on the held-out pairs; None = ten in the run."""
    log_every: int = field(default=10, metadata=free)
    """Steps between records in metrics.jsonl."""
    tensorboard: bool = field(default=False, metadata=free)
    """Write TensorBoard event files too, into the run's folder."""

    def __post_init__(self) -> None:
        for name in "epochs steps batch_size accum save_every keep eval_every log_every".split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")


@dataclass(frozen=True)
class EngineConfig:
    """How DeepSpeed runs the model."""

    zero: Literal[0, 1, 2, 3] | None = field(default=None, metadata=free)
    """ZeRO stage; None = what --deepspeed says, else 1."""
    precision: Precision | Literal["auto"] | None = None
    """fp32; amp_bf16 (fp32 weights, bf16 autocast: the CLIP recipe); bf16 (bf16 weights, fp32 master, needs
    ZeRO 1 to 3); auto = amp_bf16 where the machine multiplies bf16 faster than fp32, else fp32. None = what --deepspeed
    says, else amp_bf16 on a GPU and fp32 on a CPU."""
    grad_clip: float | None = None
    """Largest global norm of the gradient, 0 = no clipping; None = what --deepspeed says, else 1.0, and 0 with
    --clip-each."""
    deepspeed: Path | None = field(default=None, metadata=free)
    """A DeepSpeed JSON of your own ("auto" allowed); where it contradicts a flag, the run stops and says so."""
