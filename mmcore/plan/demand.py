"""What a forward and a backward ask for, counted while the real modules run on fake tensors: nothing is computed, and
nothing of a model's size is allocated."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Demand:
    """Of a forward and its backward, what this computes again under activation checkpointing included."""

    kept: float = 0.0  # bytes that the forward leaves to the backward, weights aside
    cast: float = 0.0  # bytes of weights in autocast's dtype that the forward holds until it ends, beyond `kept`
    forward_flops: float = 0.0  # of matrix products; causal attention is counted whole
    backward_flops: float = 0.0
    forward_moved: float = 0.0  # bytes that all other operations read and write, one after the other
    backward_moved: float = 0.0
    forward_widest: float = 0.0  # bytes that one operation reads and writes, the most, weights aside
    backward_widest: float = 0.0

    def __add__(self, other: "Demand") -> "Demand":
        return Demand(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Demand":
        return Demand(*(factor * x for x in astuple(self)))

    def __sub__(self, other: "Demand") -> "Demand":
        return self + other * -1.0


class Built(NamedTuple):
    """A module on fake tensors: its weights, and a forward of which the results that can are sent back."""

    weights: Iterable[Tensor]
    forward: Callable[[], Sequence[Tensor]]


def count(build: Callable[[], Built], *, dtype: torch.dtype, autocast: bool) -> Demand:
    """One forward and backward of what `build` makes with `dtype` as torch's default, under autocast to bfloat16 or
    not."""
    with FakeTensorMode():
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            built = build()
        finally:
            torch.set_default_dtype(before)
        weights = {_storage(x) for x in built.weights}
        kept: dict[int, tuple[int, Any]] = {}

        def keep(x: Tensor) -> Tensor:
            if _storage(x) not in weights:
                # held, so that no other storage takes its number
                kept[_storage(x)] = x.untyped_storage().nbytes(), x.untyped_storage()
            return x

        cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with _Counter(weights) as forward, saved_tensors_hooks(keep, lambda x: x), cast:
            results = built.forward()
            copies = [x for x in (copy() for copy in forward.copies) if x is not None]
            cast_bytes = sum(x.nbytes for x in copies if _storage(x) not in kept)
        total = sum(size for size, _ in kept.values())
        copies.clear()
        kept.clear()
        learned = [x for x in results if x.requires_grad]
        with _Counter(weights) as backward:
            if learned:
                torch.autograd.backward(learned, [torch.empty_like(x) for x in learned])
    both = [(getattr(forward, name), getattr(backward, name)) for name in ("flops", "moved", "widest")]
    return Demand(total, cast_bytes, *(x for pair in both for x in pair))


class _Counter(TorchDispatchMode):
    """Sums FLOP of products, and bytes of everything else that runs."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.flops = self.moved = self.widest = 0
        self.copies: list[weakref.ref[Tensor]] = []  # of weights, in another dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            # what the data alone could tell: a text's length, or whether something is wrong with it
            return args[0].dtype != torch.bool
        out = func(*args, **kwargs)
        if func.namespace == "prim" or func.is_view:
            return out
        moved = _moved(func, args, out)
        self.widest = max(self.widest, sum(size for place, size in moved if place not in self.weights))
        packet, name = func.overloadpacket, func._schema.name
        if packet is torch.ops.aten._to_copy and _storage(args[0]) in self.weights:
            self.copies.append(weakref.ref(out))
        if name in FORMULAS:
            self.flops += FORMULAS[name](*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            self.moved += sum(size for _, size in moved)
        return out


def _moved(func: Any, args: tuple[Any, ...], out: Any) -> list[tuple[int, int]]:
    """The storages that an operation reads and writes, and how many bytes of each."""
    read = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if not written or func._schema.name in ALLOCATIONS:
        return []
    if func._schema.name == "aten::embedding":  # of its table the rows that it returns
        return [(_storage(written[0]), 2 * written[0].nbytes)]
    if not func._schema.is_mutable and {_storage(x) for x in read} & {_storage(x) for x in written}:
        return []  # a view by another name
    # of an expanded tensor what there is
    return [(_storage(x), min(x.nbytes, x.untyped_storage().nbytes())) for x in (*read, *written)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _heads_first(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Shapes of [B, L, H, K] as [B, H, L, K]."""
    return [(batch, heads, length, width) for batch, length, heads, width in (x.shape for x in tensors)]


ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
# What torch's own counter does not know.
FORMULAS: dict[str, Callable[..., int]] = {
    "mkldnn::_linear_pointwise": lambda x, weight, *_: 2 * x.numel() * len(weight),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_: sdpa_flop_count(q.shape, k.shape, v.shape),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda dy, q, k, v, *_: sdpa_backward_flop_count(
        dy.shape, q.shape, k.shape, v.shape
    ),
    "mmkernels::attention_fwd": lambda q, k, v, *_: sdpa_flop_count(*_heads_first(q, k, v)),
    "mmkernels::attention_bwd": lambda q, k, v, *_: sdpa_backward_flop_count(*_heads_first(q, q, k, v)),
    # the logits, and a product for each of the two gradients that is wanted: its forward makes them
    "mmkernels::linear_cross_entropy_fwd": lambda x, weight, *rest: (
        2 * x.numel() * len(weight) * (1 + sum(rest[-1][:2]))
    ),
}
