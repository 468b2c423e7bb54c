"""Optimizers that average the weights they make: AdamW, SGD with momentum, LARS and Muon."""

from mmcore.optim.adamw import AdamWEMA
from mmcore.optim.base import EMAOptimizer
from mmcore.optim.momentum import LARSEMA, SGDEMA
from mmcore.optim.muon import MuonEMA

__all__ = ["LARSEMA", "SGDEMA", "AdamWEMA", "EMAOptimizer", "MuonEMA"]
