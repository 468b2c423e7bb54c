"""What happens in a call: the matrix products that it makes, and the registered ops that it runs."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PRODUCTS = ("mm", "addmm", "_linear_pointwise")


class Operations(TorchDispatchMode):
    """Operations by name, collectives in order, the multiplications of matrix products, which torch's own counter
    knows neither of oneDNN's nor in place, and the elements of the largest tensor that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.multiplications = self.largest = 0
        self.collectives: list[str] = []

    @property
    def products(self) -> int:
        return sum(self.names[name] for name in PRODUCTS)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names[name] += 1
        if func.namespace == "c10d":
            self.collectives.append(name)
        if name in PRODUCTS:
            x, y = args[1:3] if name == "addmm" else args[:2]
            self.multiplications += x.numel() * (y.shape[0] if name == "_linear_pointwise" else y.shape[1])
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


class _Forward(TorchFunctionMode):
    """Calls of our ops as autograd sees them."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, OpOverload) and func.namespace == "mmkernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class _Backward(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmkernels" and all(func is not seen for seen, _ in self.calls):
            # what autograd saved has a graph, which a backward does not pass on
            self.calls.append((func, tree_map_only(Tensor, torch.Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


_CHECKED: set[Any] = set()


def opcheck(call: Callable[[], object]) -> None:
    """Holds the registered ops that a call runs to `torch.library.opcheck`, each once for every kind of arguments."""
    calls: list[tuple[OpOverload, tuple[Any, ...]]] = []
    with _Backward(calls), _Forward(calls):
        call()
    assert calls
    for op, args in calls:
        kind = op, *((type(x), isinstance(x, Tensor) and (x.dtype, x.requires_grad)) for x in args)
        if kind not in _CHECKED:
            torch.library.opcheck(op, args)
            _CHECKED.add(kind)
