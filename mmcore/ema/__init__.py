"""The average of a model's weights: of a module, of DeepSpeed's engine, in a teacher that runs forward."""

from mmcore.ema.average import EMA
from mmcore.ema.schedules import Schedule, cosine, warmed_up

__all__ = ["EMA", "Schedule", "cosine", "warmed_up"]
