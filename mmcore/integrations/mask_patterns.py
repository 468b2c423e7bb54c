"""What the mask functions of transformers let a query see, as intervals: no matrix is made, and no value of a GPU's
read. Written for those of transformers 5.23."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from inspect import getclosurevars
from operator import and_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from mmcore.ops import masks


@dataclass(frozen=True)
class Request:
    """What a mask is asked for: of which queries and keys, counted from the start of the text."""

    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device

    @property
    def places(self) -> Tensor:
        """Of the queries, counted from the first key, `[1, Lq]`."""
        return torch.arange(self.q_length, device=self.device)[None] + self.q_offset - self.kv_offset

    def between(self, first: Tensor, end: Tensor) -> masks.Intervals:
        """The keys from `first` to `end` - 1, as many as there are."""
        lo, hi = torch.broadcast_tensors(*(x.clamp(0, self.kv_length).int() for x in (first, end)))
        return masks.Intervals(self.kv_length, lo, torch.maximum(lo, hi), is_ordered=True)

    @property
    def sees_itself(self) -> bool:
        """Whether each query stands among the keys, as far as the host knows."""
        return isinstance(self.q_offset, int) and self.kv_offset <= self.q_offset

    @property
    def is_square(self) -> bool:
        """Whether the last query stands beside the last key, as far as the host knows."""
        ends_together = self.q_offset + self.q_length == self.kv_offset + self.kv_length
        return isinstance(ends_together, bool) and ends_together


def pattern_of(function: Callable, request: Request, is_packed: bool = False) -> masks.Intervals | None:
    """What a mask function lets be seen; None of one that is not known, or is no intervals. `is_packed`: whether its
    positions start anew with every sample of a row, which is nothing to patterns of distances."""
    if function is bidirectional_mask_function:
        return request.between(torch.zeros_like(request.places), torch.full_like(request.places, request.kv_length))
    if function is causal_mask_function:
        if request.is_square:
            return masks.causal(request.q_length, request.kv_length, device=request.device)
        # keys of a static cache that are yet to come
        return request.between(torch.zeros_like(request.places), request.places + 1)
    maker, values = _made(function)
    if maker == "and_masks":
        parts = [pattern_of(x, request, is_packed) for x in values["mask_functions"]]
        known = [x for x in parts if x is not None]
        return reduce(and_, known) if len(known) == len(parts) else None
    if maker == "sliding_window_overlay":
        first = request.places - values["sliding_window"] + 1
        return request.between(first, torch.full_like(first, request.kv_length))
    if maker == "sliding_window_bidirectional_overlay":
        return request.between(*(request.places + x for x in (-values["sliding_window"], values["sliding_window"] + 1)))
    if maker == "chunked_overlay" and not is_packed:
        size, padding = values["chunk_size"], values["left_padding"][:, None] - request.kv_offset
        first = (request.places - padding) // size * size + padding
        return request.between(first, first + size)
    if maker == "packed_sequence_mask_function":
        return masks.documents(values["packed_sequence_mask"], causal=False)
    if maker == "remap_positions_for_packed_sequence":
        return pattern_of(values["mask_function"], request, True)
    return None


def padded_keys(attention_mask: Tensor, request: Request) -> Tensor:
    """Which of the keys are no padding, bool `[B, Lk]`; those that are yet to come are."""
    end = request.kv_offset + request.kv_length
    return F.pad(attention_mask, (0, max(0, end - attention_mask.shape[1])))[:, request.kv_offset : end].bool()


def _made(function: Callable) -> tuple[str, Mapping[str, Any]]:
    """The function of transformers that made this one, and what it closes over; nothing of another's."""
    if function.__module__ != causal_mask_function.__module__:
        return "", {}
    return function.__qualname__.partition(".")[0], getclosurevars(function).nonlocals
