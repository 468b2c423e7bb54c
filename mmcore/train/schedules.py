"""Numbers that change over a run: learning rates, weight decay, momenta, temperatures, ratios.

A `Schedule` takes the number of an optimizer step, from 0, and is the type of `mmcore.ema`'s decays too.
"""

import math
from collections.abc import Sequence

from mmcore.ema import Schedule


def constant(value: float) -> Schedule:
    """`value` at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` at step 0 in a straight line to `end` at step `steps`, then `end`."""
    return lambda step: start + (end - start) * min(step / max(1, steps), 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From `start` at step 0 along half a cosine to `end` at step `steps`, then `end` (arXiv:1608.03983)."""

    def value(step: int) -> float:
        share = min(step / max(1, steps), 1.0)
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))

    return value


def multistep(start: float, milestones: Sequence[int], gamma: float) -> Schedule:
    """`start`, times `gamma` from each step of `milestones` on (the step schedule of arXiv:1512.03385)."""
    return lambda step: start * gamma ** sum(step >= milestone for milestone in milestones)


def const_cooldown(start: float, end: float, steps: int, cooldown: int) -> Schedule:
    """`start`, and over the last `cooldown` of `steps` steps in a straight line to `end` (arXiv:2106.04560)."""
    fall = linear(start, end, cooldown)
    return lambda step: fall(max(0, step - (steps - cooldown)))


def warmed(schedule: Schedule, start: float, steps: int, *, peak: float | None = None) -> Schedule:
    """A linear warm-up of `steps` steps, whose last has the value `peak`, then `schedule` from its step 0.

    Step 0 is one share of the way from `start` on, so that no step is lost at a learning rate of zero. Without `peak`,
    it is `schedule(0)`.
    """
    top = schedule(0) if peak is None else peak

    def value(step: int) -> float:
        return start + (top - start) * (step + 1) / steps if step < steps else schedule(step - steps)

    return value
