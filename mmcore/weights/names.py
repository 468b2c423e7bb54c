"""Weights under the names of other libraries, which may keep in several tensors what is one here."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Our name to theirs: one, or those whose rows follow each other in ours.
Names = Mapping[str, tuple[str, ...]]


def to_theirs(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our weights under their names, on the CPU, each in memory of its own."""
    out = {}
    for ours, theirs in names.items():
        for name, part in zip(theirs, state[ours].detach().cpu().chunk(len(theirs)), strict=True):
            out[name] = part.clone(memory_format=torch.contiguous_format)
    return out


def to_ours(op: str, state: Mapping[str, Tensor], names: Names, what: str) -> dict[str, Tensor]:
    """Their weights under our names, float32.

    Raises:
        ValueError: missing or unknown names, parts of different shapes.
    """
    wanted = [name for theirs in names.values() for name in theirs]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"{op}: {what} must hold every weight of the model, missing {_some(missing)}")
    unknown = sorted(set(state) - set(wanted))
    if unknown:
        raise ValueError(f"{op}: {what} must hold this model's weights only, got also {_some(unknown)}")
    out = {}
    for ours, theirs in names.items():
        parts = [state[name].to(torch.float32) for name in theirs]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"{op}: {what} must hold q, k, v of one shape in {theirs[0]}, got {shapes}")
        out[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
