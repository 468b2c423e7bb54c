"""The masks of transformers' models as attention wants them: intervals wherever they are."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from mmcore.ops import masks


class Seen(NamedTuple):
    """A mask of ours, and what its queries that see nothing get."""

    mask: masks.Mask
    empty_rows: str


class IntervalMask(Tensor):
    """The float mask `[B, 1, Lq, Lk]` of an eager model, 0 or the least number, of which intervals alone are stored.

    Attention reads `seen`. Whoever else touches it gets the matrix, so that it is safe in models that slice their mask
    (Doge), repeat it for the heads of a torch module (SigLIP 2) or add it to logits of their own (FLAVA, ViLT).
    """

    seen: Seen

    @staticmethod
    def __new__(cls, seen: Seen, num_batches: int, dtype: torch.dtype) -> "IntervalMask":
        shape = (num_batches, 1, seen.mask.num_queries, seen.mask.num_keys)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=seen.mask.device)
        made.seen = seen
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.to_values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def to_values(self) -> Tensor:
        """The matrix, of the mask's own dtype."""
        hidden = ~self.seen.mask.to_dense().expand(self.shape)
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device).masked_fill_(
            hidden, torch.finfo(self.dtype).min
        )


# what a mask of a model's own was found to be, for the layers that come after
_FOUND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def seen_by(mask: Tensor, num_queries: int) -> Seen:
    """What a mask that a model hands to its attention lets each of Lq queries see: `[B or 1, H or 1, Lq or 1, Lk]`, an
    `IntervalMask`, bool (True for a key to be seen), or floating point, added to the logits.

    A float mask of nothing but 0 and numbers no logit can make up for is a bool one, and a bool one with up to two
    runs of keys a query is intervals. To find out waits for a GPU, so it is done once for all layers that are given
    the same tensor, and not at all in a graph that is compiled. A row that sees nothing is uniform over all keys, as
    a softmax over the least number of the dtype is.
    """
    if isinstance(mask, IntervalMask):
        return mask.seen
    if is_compiling() or mask.requires_grad:
        return Seen(_bias(mask), "uniform")
    version = 0 if mask.is_inference() else mask._version, num_queries
    known = _FOUND.get(mask)
    if known is None or known[0] != version:
        known = version, _find(mask, num_queries)
        _FOUND[mask] = known
    return known[1]


def _find(mask: Tensor, num_queries: int) -> Seen:
    # a copy of a bool mask, since what is remembered of a tensor must not keep it alive
    seen = mask.clone() if mask.dtype == torch.bool else mask > _least(mask)
    is_binary = mask.dtype == torch.bool or bool((~seen | (mask == 0)).all())
    empty_rows = "uniform" if bool((~seen.any(3)).any()) else "zero"
    if not is_binary:
        return Seen(_bias(mask), empty_rows)
    if seen.shape[1:3] == (1, 1):
        return Seen(masks.key_padding(seen[:, 0, 0], num_queries), empty_rows)
    return Seen(masks.from_dense(seen.expand(-1, -1, num_queries, -1)), empty_rows)


def _bias(mask: Tensor) -> masks.Dense:
    if mask.dtype == torch.bool:
        return masks.dense(mask)
    values = mask.masked_fill(mask <= _least(mask), -torch.inf)
    # half precision may not be that of the queries, single always does
    return masks.dense(values.to(torch.promote_types(mask.dtype, torch.float32)))


def _least(mask: Tensor) -> float:
    """What hides a key for good: half the least number, since models add to it."""
    return torch.finfo(mask.dtype).min / 2
