"""What every multi-tensor op checks of its lists, and which path serves them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import native
from mmkernels._autograd import untransformed
from mmkernels._checks import DTYPE_NAMES, DTYPES, require
from mmkernels._device import Kernels, is_capturing, runs_triton
from mmkernels.multi_tensor import blockwise
from mmkernels.multi_tensor.table import TRACED, Table, extent, known, new_table, overlap, table_of

kernel = Kernels("mmkernels.multi_tensor")

Given = Mapping[str, Sequence[Tensor] | None]
# of `op`, by the name of a list, where its dtypes are not `DTYPES`
Dtypes = Mapping[str, tuple[tuple[torch.dtype, ...], str]]

# of a registered op that reads memory by addresses from the host: torch.compile keeps it out of the graphs it captures
ADDRESSED = torch.Tag.cudagraph_unsafe

# of an average or a sum, to which what is added would be lost in less
WIDE = (torch.float32, torch.float64), "float32 or float64"


def path_of(x: Tensor) -> Any:
    """The module whose kernels walk a table on the device of `x`."""
    return kernel if runs_triton(x) else blockwise


def prepared(
    op: str, given: Given, written: Sequence[str], dtypes: Dtypes | None = None
) -> tuple[list[list[Tensor]], Table | None]:
    """Lists in the order given, none as an empty one, checked and laid out alike; with their table where a kernel
    walks them.

    Args:
        op: whose they are.
        given: by name; the n-th tensors of all must have equal shapes, and are laid out like the first's.
        written: names of those written: dense, in equal strides, sharing no memory with any other.
        dtypes: of a list, and their names, where others than floating point are allowed.
    """
    untransformed(op, "its reference", given)
    lists = [list(tensors or ()) for tensors in given.values()]
    is_eager = not torch.compiler.is_compiling()
    is_walked = is_eager and any(walks(x) for x in lists[0][:1])
    contract = (op, *(dtypes or {}).items())
    found = known(lists, contract) if is_walked else None
    if found is None:
        named = {name: x for (name, given_x), x in zip(given.items(), lists, strict=True) if given_x is not None}
        _check_lists(op, named, written, dtypes or {})
        likes = [x if x.is_contiguous() or is_dense(x) else x.contiguous() for x in lists[0]]
        lists = [likes, *([laid_out(x, like) for x, like in zip(part, likes)] for part in lists[1:])]
        is_written = [name in written for name in given]
        found = new_table(lists, contract, is_written) if is_walked and likes and has_dtypes(lists) else None
    return lists, found


def walks(x: Tensor) -> bool:
    """Whether a kernel walks lists on the device of `x`: on a GPU Triton's, on a CPU the native one."""
    return runs_triton(x) or (x.is_cpu and native.AVAILABLE)


def has_dtypes(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the kernels know the dtypes: all but float64."""
    return all(torch.float64 not in {x.dtype for x in tensors} for tensors in lists)


def total_dtype(lists: Sequence[Sequence[Tensor]]) -> torch.dtype:
    """That of a number for all tensors."""
    return torch.float32 if has_dtypes(lists) else torch.float64


def table_in_op(lists: Sequence[Sequence[Tensor]], op: str | None = None) -> Table | None:
    """That of lists which a registered op was handed, where a kernel walks them; `op` has maybe prepared them."""
    contract = TRACED if op is None else (op,)
    return table_of(lists, contract) if walks(lists[0][0]) and has_dtypes(lists) else None


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on the device, which a GPU is not waited for to get."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def check_captured(op: str, like: Tensor, **numbers: float | Tensor) -> None:
    """What changes from step to step, a replay of a captured graph reads anew only where it lies on the device."""
    if torch.compiler.is_compiling() or not is_capturing(like):
        return
    for name, x in numbers.items():
        is_read = isinstance(x, Tensor) and x.is_cuda
        sentence = "{} must be a tensor on {} while a CUDA graph is captured, whose replays would repeat it, got {!r}"
        require(op, is_read, sentence, name, like.device, x)


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` with each element where `like`, which is dense, has it; a copy where it must be."""
    if x.stride() == like.stride() or (x.is_contiguous() and like.is_contiguous()):
        return x
    with torch.no_grad():
        return torch.empty_like(like, dtype=x.dtype).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, each in a place of its own."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_lists(op: str, lists: Mapping[str, list[Tensor]], written: Sequence[str], dtypes: Dtypes) -> None:
    (first_name, first), *_ = lists.items()
    for name, tensors in lists.items():
        same = len(tensors) == len(first)
        require(op, same, "{} must be {} tensors like {}, got {}", name, len(first), first_name, len(tensors))
    for name, tensors in lists.items():
        allowed, names = dtypes.get(name, (DTYPES, DTYPE_NAMES))
        for i, (x, like) in enumerate(zip(tensors, first, strict=True)):
            require(op, x.dtype in allowed, "{}[{}] must be {}, got {}", name, i, names, x.dtype)
            same = x.device == first[0].device
            require(op, same, "{}[{}] must be on {}, got {}", name, i, first[0].device, x.device)
            same = x.shape == like.shape
            require(op, same, "{}[{}] must be {}, got {}", name, i, list(like.shape), list(x.shape))
            if name in written and not (x.is_contiguous() and like.is_contiguous()):
                same, want = x.stride() == like.stride() and is_dense(x), list(like.stride())
                require(op, same, "{}[{}] must be dense in strides {}, got {}", name, i, want, list(x.stride()))
    if not torch.compiler.is_compiling():
        _check_places(op, lists, written)


def _check_places(op: str, lists: Mapping[str, list[Tensor]], written: Sequence[str]) -> None:
    """Every tensor holds its elements, and what is written shares none of them with anything else."""
    spans = []
    for name in sorted(lists, key=lambda name: (name in written, name)):
        for i, x in enumerate(lists[name]):
            holds = x.numel() == 0 or x.data_ptr() != 0
            require(op, holds, "{}[{}] must hold its elements, got {}", name, i, "a tensor that was freed")
            spans.append((x.data_ptr(), extent(x), name in written, name, i))
    if spans:
        columns = (torch.tensor(column, device="cpu") for column in list(zip(*spans, strict=True))[:3])
        one, other = overlap(*columns) or (0, 0)
        sentence = "{}[{}] must share no memory with {}[{}], got {}"
        require(op, one == other, sentence, *spans[one][3:], *spans[other][3:], "tensors that overlap")
