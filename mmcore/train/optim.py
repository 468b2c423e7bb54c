"""The settings of the optimizer and its average, the parameter groups and the schedules."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any, Literal

from torch import nn

from mmcore.ema import Schedule, warmed_up
from mmcore.optim import LARSEMA, SGDEMA, AdamWEMA, EMAOptimizer, MuonEMA
from mmcore.settings import flag
from mmcore.train import schedules

OPTIMIZERS: dict[str, type[EMAOptimizer]] = {"adamw": AdamWEMA, "sgd": SGDEMA, "lars": LARSEMA, "muon": MuonEMA}
_BLOCK = re.compile(r"((?:.*?\.)?(?:blocks|layers))\.(\d+)\.")
# Settings that only some optimizers or schedules have.
ONLY = {
    ("optimizer", "adamw", "muon"): ("beta1", "beta2", "eps"),
    ("optimizer", "sgd", "lars", "muon"): ("momentum",),
    ("schedule", "cosine", "linear", "const-cooldown"): ("min_lr",),
    ("schedule", "multistep"): ("milestones", "gamma"),
    ("schedule", "const-cooldown"): ("cooldown_share",),
}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; CLIP's settings (arXiv 2103.00020, table 18) where a recipe has none."""

    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the run, of schedules that fall to one."""
    warmup_lr: float = 0.0
    """Learning rate that the warm-up starts from."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.2
    """Weight decay, on parameters of two or more axes only; decoupled in AdamW and Muon, part of the gradient in SGD
    and LARS."""
    warmup: int = 10_000
    """Steps of linear warm-up before the schedule; at most --warmup-share of the run is used."""
    warmup_share: float = 0.1
    """Largest share of the run that the warm-up takes."""
    ema: float | None = None
    """Decay of the exponential moving average of the weights, for example 0.9999; None = off."""
    optimizer: Literal["adamw", "sgd", "lars", "muon"] = "adamw"
    """adamw; sgd with momentum; lars (large batches: SimCLR, MoCo v3); muon (matrices along the nearest orthogonal
    matrix, AdamW for embeddings and all else)."""
    momentum: float | None = None
    """Momentum of sgd, lars and muon; None = 0.9, of muon 0.95."""
    schedule: Literal["cosine", "linear", "constant", "multistep", "const-cooldown"] = "cosine"
    """What the learning rate does after the warm-up: fall to --min-lr along a cosine or a line, stay, fall by --gamma 
    at each of --milestones, or stay and fall to --min-lr in the last --cooldown-share of the run."""
    milestones: tuple[float, ...] | None = None
    """Shares of the run after which multistep lowers the learning rate; None = 0.6 0.8."""
    gamma: float | None = None
    """What multistep multiplies the learning rate by; None = 0.1."""
    cooldown_share: float | None = None
    """Share of the run that const-cooldown falls in; None = 0.2."""
    weight_decay_end: float | None = None
    """Weight decay at the end of the run, along a cosine from --weight-decay (DINO: 0.04 to 0.4); None = constant."""
    layer_decay: float | None = None
    """What the learning rate is multiplied by from each layer to the one below it, for example 0.75; None = off."""
    clip_each: float | None = None
    """Largest norm of each parameter's own gradient (DINO: 3.0), in place of --grad-clip; None = off."""

    def __post_init__(self) -> None:
        self._check("a positive number", lambda x: 0 < x < math.inf, "lr", "clip_each")
        self._check(f"from 0 to --lr {self.lr}", lambda x: 0 <= x <= self.lr, "min_lr", "warmup_lr")
        self._check("in [0, 1]", lambda x: 0 <= x <= 1, "warmup_share")
        self._check("in [0, 1)", lambda x: 0 <= x < 1, "ema", "momentum")
        self._check("above 0 and at most 1", lambda x: 0 < x <= 1, "gamma", "cooldown_share", "layer_decay")
        self._check("a number >= 0", lambda x: 0 <= x < math.inf, "weight_decay", "weight_decay_end")
        self._check("a number of steps >= 0", lambda x: x >= 0, "warmup")
        shares = "shares of the run, above 0 and below 1"
        self._check(shares, lambda xs: len(xs) > 0 and all(0 < x < 1 for x in xs), "milestones")
        for (of, *users), names in ONLY.items():
            chosen = getattr(self, of)
            for field in fields(self):
                value = getattr(self, field.name)
                if field.name in names and chosen not in users and value != field.default:
                    said = f"has no effect with --{of} {chosen}: it must stay {field.default}, got {value}"
                    raise ValueError(f"{flag(field.name)} {said}")

    def _check(self, contract: str, holds: Callable[[Any], bool], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{flag(name)} must be {contract}, got {value}")


@dataclass(frozen=True)
class Rule:
    """How the parameters whose names begin with `prefix` are trained, where it is not as all others are."""

    prefix: str
    lr_scale: float = 1.0
    """What their learning rate is multiplied by."""
    weight_decay: float | None = None
    """Weight decay of their matrices, whatever the schedule of the others'; None = the others'."""
    frozen_until: int = 0
    """The steps for which they stay as they are, to the bit, without moments."""
    fixed_lr: bool = False
    """Their learning rate is --lr all along, without a schedule (SimSiam's predictor, arXiv:2011.10566)."""
    clamp: tuple[float, float] | None = None
    """(low, high) that they are brought between after each step."""


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> EMAOptimizer:
    """The recipe's optimizer of parameter groups; its average is warmed up."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "ema": None if config.ema is None else warmed_up(config.ema),
        "clip_each": config.clip_each,
    }
    if config.optimizer in ("adamw", "muon"):
        settings |= {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.momentum is not None:
        settings["momentum"] = config.momentum
    return OPTIMIZERS[config.optimizer](groups, **settings)


def param_groups(
    model: nn.Module, config: OptimConfig, rules: Sequence[Rule] = (), layers: Callable[[str], int] | None = None
) -> list[dict[str, Any]]:
    """Trainable weights in groups of one treatment: matrices decay, vectors (of one axis or none) do not.

    Args:
        model: whose weights.
        config: of the optimizer.
        rules: of some weights, the first that fits a name.
        layers: depth of a parameter by its name, 0 = embeddings, for --layer-decay: a learning rate counts
            `layer_decay ** (largest depth - depth)` times; None = `depths`.
    """
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if config.layer_decay is not None:
        depth = layers or depths(names)
        top = max(map(depth, names))
        scales = {name: config.layer_decay ** (top - depth(name)) for name in names}
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        rule = next((rule for rule in rules if name.startswith(rule.prefix)), Rule(""))
        own = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        num_axes = len(getattr(p, "ds_shape", p.shape))  # of one that ZeRO-3 has split
        settings: dict[str, Any] = {
            "weight_decay": own if num_axes > 1 else 0.0,
            "lr_scale": rule.lr_scale * scales[name],
            "clamp": rule.clamp,
            "fixed_lr": rule.fixed_lr,
            "frozen_until": rule.frozen_until,
            "scheduled_decay": config.weight_decay_end is not None and rule.weight_decay is None and num_axes > 1,
        }
        if config.optimizer == "muon":
            settings["muon"] = num_axes == 2 and not any(p is x for x in embeddings)
        group = found.setdefault(tuple(settings.values()), {"params": [], **settings})
        group["params"].append(p)
    return sorted(found.values(), key=lambda g: (g["clamp"] is None, g["lr_scale"], g["weight_decay"]), reverse=True)


def depths(names: Sequence[str]) -> Callable[[str], int]:
    """Depth of parameters whose names have numbered `blocks` or `layers` in them, as BEiT and MAE count it.

    Block N is N + 1; what is registered before the blocks beside it is 0 (embeddings), what comes after is one more
    than the last block (final norm, head). Of several stacks all end at the same depth, the largest, which is also that
    of parameters that belong to none (CLIP's scale). A parameter of the module itself is registered before its modules.

    `names` are all of a model's, in the order of `named_parameters`; raises ValueError where none has a number.
    """
    blocks = {name: _BLOCK.match(name) for name in names}
    sizes: dict[str, int] = {}
    for block in filter(None, blocks.values()):
        sizes[block[1]] = max(sizes.get(block[1], 0), int(block[2]) + 1)
    if not sizes:
        raise ValueError("--layer-decay must be of a model with numbered blocks or layers, got none")
    top, begun = max(sizes.values()) + 1, set()
    found = dict.fromkeys(names, top)
    for name, block in blocks.items():
        if block:
            begun.add(block[1])
            found[name] = top - sizes[block[1]] + int(block[2])
            continue
        near = {stack: _num_shared(name, stack) for stack in sizes}
        nearest = [stack for stack, shared in near.items() if shared == max(near.values())]
        if len(nearest) == 1 and nearest[0] not in begun:
            found[name] = top - sizes[nearest[0]] - 1
    return found.__getitem__


def _num_shared(name: str, other: str) -> int:
    """How many modules two names begin with in common."""
    pairs = zip(name.split("."), other.split("."))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Steps of warm-up in a run of `total`."""
    return min(optim.warmup, max(1, int(total * optim.warmup_share)))


def lr_schedule(optim: OptimConfig, total: int) -> Schedule:
    """The learning rate of a run of `total` steps: linear from `warmup_lr` to `lr`, then as `schedule` says."""
    warmup = warmup_steps(optim, total)
    left = total - warmup
    match optim.schedule:
        case "cosine":
            after = schedules.cosine(optim.lr, optim.min_lr, left)
        case "linear":
            after = schedules.linear(optim.lr, optim.min_lr, left)
        case "constant":
            after = schedules.constant(optim.lr)
        case "multistep":
            shares = (0.6, 0.8) if optim.milestones is None else optim.milestones
            gamma = 0.1 if optim.gamma is None else optim.gamma
            after = schedules.multistep(optim.lr, [round(share * total) - warmup for share in shares], gamma)
        case "const-cooldown":
            share = 0.2 if optim.cooldown_share is None else optim.cooldown_share
            after = schedules.const_cooldown(optim.lr, optim.min_lr, left, min(left, round(share * total)))
    return schedules.warmed(after, optim.warmup_lr, warmup, peak=optim.lr)


def weight_decay_schedule(optim: OptimConfig, total: int) -> Schedule:
    """The weight decay of a run of `total` steps."""
    if optim.weight_decay_end is None:
        return schedules.constant(optim.weight_decay)
    return schedules.cosine(optim.weight_decay, optim.weight_decay_end, total)
