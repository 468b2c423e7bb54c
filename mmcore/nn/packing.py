"""Rows of different lengths laid end to end: nothing is computed of what stands behind them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmcore.ops import masks, require


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of rows `[1, N, D]` stand among padded ones `[B, T, D]`, and which each sees: those of its row,
    all of them or, where it `is_causal`, up to itself. Make one with `Packing.of`."""

    places: Tensor  # int64 [N], of each token among the B * T
    lengths: Tensor  # int64 [B], of each row
    starts: Tensor  # int64 [B], of each row among the N
    num_rows: int  # B
    length: int  # T, of the longest row
    mask: masks.Intervals  # [1, N], N keys
    is_causal: bool = True

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device | str | None = None, *, is_causal: bool = True
    ) -> "Packing":
        """Of rows by their lengths, known on the host, so that no device is waited for; a ValueError of a length below
        1."""
        require("Packing", min(lengths, default=1) >= 1, "lengths must be at least 1, got {}", list(lengths))
        length, each = max(lengths, default=0), torch.tensor(lengths, dtype=torch.int64)
        # by numpy, so that a plan's fake tensors have its size
        places = torch.tensor(np.flatnonzero(np.arange(length) < np.array(lengths, dtype=np.int64)[:, None]))
        starts, place = each.cumsum(0) - each, torch.arange(1, len(places) + 1, dtype=torch.int32)[None]
        lo, hi = (x.int().repeat_interleave(each, output_size=len(places))[None] for x in (starts, starts + each))
        made = places, each, starts, lo, place if is_causal else hi
        places, each, starts, lo, hi = (x.to(device, non_blocking=True) for x in made)
        mask = masks.Intervals(len(places), lo, hi, is_ordered=True)
        return cls(places, each, starts, len(lengths), length, mask, is_causal)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [1, N, ...]."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def seen_by(self, counts: Sequence[int]) -> masks.Intervals:
        """Which of the N tokens other ones see, `counts[i]` of which belong to row i, in the order of the rows: all of
        their row."""
        each = torch.tensor(counts, dtype=torch.int64).to(self.starts.device, non_blocking=True)
        ends = torch.stack([self.starts, self.starts + self.lengths]).int()
        lo, hi = ends.repeat_interleave(each, 1, output_size=sum(counts))[:, None]
        return masks.Intervals(len(self.places), lo, hi, is_ordered=True)
