"""Decays of an average over a run."""

import math
from collections.abc import Callable

from mmcore.ops import require

# The decay of update t, counted from 0.
Schedule = Callable[[int], float]


def warmed_up(decay: float) -> Schedule:
    """`min(decay, (1 + t) / (10 + t))`, which forgets the first weights quickly, as TensorFlow and timm have it."""
    check_decay("warmed_up", "decay", decay)
    return lambda t: min(decay, (1 + t) / (10 + t))


def cosine(start: float, end: float, num_updates: int) -> Schedule:
    """From `start` to `end` along half a cosine over `num_updates`, then `end`: DINO's teacher (arXiv:2104.14294)."""
    check_decay("cosine", "start", start)
    check_decay("cosine", "end", end)
    require("cosine", num_updates >= 1, "num_updates must be at least 1, got {}", num_updates)

    def decay(t: int) -> float:
        return end - (end - start) * (math.cos(math.pi * min(t / num_updates, 1.0)) + 1) / 2

    return decay


def check_decay(op: str, name: str, decay: float) -> None:
    require(op, 0 <= decay <= 1, "{} must be from 0 to 1, got {}", name, decay)
