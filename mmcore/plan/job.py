"""What a recipe trains, and how it is to be run: all that a plan is made from."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from mmcore.plan.demand import Built, Demand, count

Precision = Literal["fp32", "amp_bf16", "bf16"]
Lever = Literal["accum", "activation_checkpointing", "zero"]


@dataclass(frozen=True)
class Setting:
    """How a run is set up: the options of `mmcore train`, and the machine it has."""

    global_batch: int
    gpus: int
    zero: int = 1
    precision: Precision = "amp_bf16"
    accum: int = 1
    activation_checkpointing: bool = False
    ema: bool = False

    def __post_init__(self) -> None:
        for name in ("global_batch", "gpus", "accum"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        parts = self.gpus * self.accum
        if self.global_batch % parts:
            what = "--global-batch must be a multiple of --gpus times --accum"
            raise ValueError(f"{what}, {parts}, got {self.global_batch}")
        if self.precision == "bf16" and self.zero == 0:
            raise ValueError("--precision bf16 must run with --zero 1, 2 or 3, got --zero 0")

    @property
    def per_rank(self) -> int:
        """Samples a rank and step."""
        return self.global_batch // self.gpus

    @property
    def micro(self) -> int:
        """Samples a rank and forward: --batch-size."""
        return self.per_rank // self.accum

    @property
    def dtype(self) -> torch.dtype:
        """Of a trained parameter as the module holds it, and of its gradient."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def weight_bytes(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Counted:
    """A piece's demand: of each sample, of none (its weights' share), and of each sample in one layer alone."""

    each: Demand
    none: Demand
    layer: Demand

    def of(self, samples: float) -> Demand:
        return self.each * samples + self.none


@dataclass(frozen=True)
class Piece:
    """A part of a model that runs as a whole: equal layers, and what stands around them."""

    name: str
    num_layers: int
    build: Callable[[int, int, Setting], Built]  # of layers and samples, on fake tensors, set up as a setting says
    depths: tuple[int, int] = (1, 2)  # numbers of layers that it is counted with; twice the same = as it is, whole

    def counted(self, setting: Setting) -> Counted:
        """Its demand as a function of the number of samples."""
        few, more = self.depths
        few_each, few_none = self._count(few, setting)
        if few == more:
            return Counted(few_each, few_none, few_each)
        more_each, more_none = self._count(more, setting)
        share = 1 / (more - few)
        layer_each, layer_none = (more_each - few_each) * share, (more_none - few_none) * share
        further = self.num_layers - few
        return Counted(few_each + layer_each * further, few_none + layer_none * further, layer_each)

    def _count(self, num_layers: int, setting: Setting) -> tuple[Demand, Demand]:
        is_amp = setting.precision == "amp_bf16"
        one, two = (
            count(partial(self.build, num_layers, samples, setting), dtype=setting.dtype, autocast=is_amp)
            for samples in (1, 2)
        )
        return two - one, one - (two - one)


@dataclass(frozen=True)
class Exchange:
    """Features of the global batch that meet in a contrastive loss, float32 as the models make them."""

    width: int
    num_tokens: int = 1  # Q, of the side that stays on its rank
    has_hard_negatives: bool = False  # all similarities are gathered, to draw from them


class Numbers(NamedTuple):
    """Counts of a module's parameters: trained, frozen, and those in tensors of at most `SMALL` elements."""

    trained: int
    frozen: int
    small: int


# Tensors that DeepSpeed's stage 3 keeps whole on every rank (`stage3_param_persistence_threshold`).
SMALL = 100_000


def numbers(module: nn.Module) -> Numbers:
    """Counts a module's parameters; on the meta device it takes no memory."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    small = sum(size for size, _ in sizes if size <= SMALL)
    return Numbers(trained, sum(size for size, _ in sizes) - trained, small)


@dataclass(frozen=True)
class Job:
    """What a recipe trains."""

    name: str
    pieces: tuple[Piece, ...]
    trained: int  # parameters that learn
    batch_bytes: int  # of a sample as the loader hands it over
    frozen: int = 0  # parameters that do not learn, of the dtype of those that do
    frozen_low: int = 0  # parameters of a frozen language model, bfloat16 but in a run in fp32
    small: int = 0  # of all of them, those in tensors that stage 3 does not release
    exchange: Exchange | None = None  # of a contrastive loss
    levers: tuple[Lever, ...] = ("zero",)  # what `mmcore train` has for it, to take less memory

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen + self.frozen_low

    def forwards(self, setting: Setting) -> int:
        """Forwards of a micro-batch: two where all micro-batches of a step meet in one loss (GradCache), else one."""
        return 2 if setting.accum > 1 and self.exchange is not None else 1

    def frozen_bytes(self, setting: Setting) -> int:
        low = 4 if setting.precision == "fp32" else 2
        return self.frozen * setting.weight_bytes + self.frozen_low * low

    def counted(self, setting: Setting) -> tuple[Counted, ...]:
        """The demands of its pieces, which depend on a few options alone."""
        return _counted(self, setting.precision, setting.activation_checkpointing, setting.gpus > 1)


@cache
def _counted(job: Job, precision: Precision, activation_checkpointing: bool, has_others: bool) -> tuple[Counted, ...]:
    num = 2 if has_others else 1
    setting = Setting(num, num, precision=precision, activation_checkpointing=activation_checkpointing)
    return tuple(piece.counted(setting) for piece in job.pieces)


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
