"""Lists of tensors as two tables, which a kernel walks in one launch: a large one of chunks, which depends on the sizes
alone, and a small one of addresses, all that is made anew where gradients are new tensors at every step."""

import weakref
from array import array
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._checks import require
from mmkernels._device import is_capturing

# Elements of a chunk: what one program, or one turn of a thread, takes.
CHUNK = 4096
# Columns of a tensor's row before the addresses.
NUM_COLUMNS = 2
# Bits of a dtype's digit in `kind`, the first list's the lowest; digit 0 for a list that is not there.
DIGIT_BITS = 3
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.uint8)
# Kept are those made last: of tables, of which an op has one for each group of parameters, of the places of each, and
# of lists.
MAX_TABLES, MAX_PLACES, MAX_LISTS = 128, 8, 512
# Of lists up to so long every tensor's size is looked at in each call: 12 us for 300.
MOST_SIZED = 1024
# The op that checked lists, then what else it asked of them; in a compiled graph they were checked when it was traced.
Contract = tuple[Hashable, ...]
TRACED: Contract = ("mmkernels",)


class Table(NamedTuple):
    """Lists of tensors, whose n-th tensors have the same elements in the same places, cut into chunks.

    `chunks`: int64 `[chunks, 3]` on their device: number of the tensor, first element, elements.
    `tensors`: int64 `[tensors, 2 + lists]`: kind, 1 where those of all lists are aligned to 16 bytes, and the
    address in each list.
    `kinds`: those that occur.
    """

    chunks: Tensor
    tensors: Tensor
    kinds: tuple[int, ...]


class _Layout(NamedTuple):
    """What lists of these devices, dtypes, shapes and strides, which met a contract, have in common anywhere."""

    chunks: Tensor
    kind: Tensor
    kinds: tuple[int, ...]
    extents: Tensor  # of every tensor of every list, see `extent`
    is_written: Tensor
    tables: dict["_Places", Table]


class _Seen(NamedTuple):
    """A list of living tensors: their addresses, the number of their devices, dtypes, shapes and strides in `_LIKES`,
    and what may change of them where they are: how many elements they have, and of those that could be turned, by their
    numbers, whether they are contiguous."""

    places: tuple[int, ...]
    like: int
    sizes: tuple[int, ...]
    turnable: list[int]
    dense: list[bool]
    watched: list[weakref.ref[Tensor]]  # each of which drops the entry when its tensor goes


_Places = tuple[tuple[int, ...], ...]
_SEEN: dict[tuple[int, ...], _Seen] = {}
_LIKES: dict[Hashable, int] = {}
_LAYOUTS: dict[Hashable, _Layout] = {}
# Kept for good: a captured graph reads them whenever it is replayed.
_CAPTURED: dict[int, Table] = {}
_NUMBERS = count()


def known(lists: Sequence[Sequence[Tensor]], contract: Contract = TRACED) -> Table | None:
    """The table of lists that need no check: some of the same devices, dtypes, shapes and strides met this contract
    before, and where these lie nothing overlaps."""
    key, places = _looked_at(lists, contract)
    layout = _LAYOUTS.get(key)
    if layout is None:
        return None
    table = layout.tables.get(places)
    if table is None:
        begins = _integers(list(chain.from_iterable(places)))
        is_freed = bool(((begins == 0) & (layout.extents > 0)).any())
        if is_freed or overlap(begins, layout.extents, layout.is_written) is not None:
            return None
        _check_uncaptured(lists[0][0], contract)
        table = _placed(layout, places)
    if is_capturing(lists[0][0]):
        _CAPTURED[id(table)] = table
    return table


def dtypes_of(table: Table, place: int) -> set[torch.dtype | None]:
    """Those in a list."""
    return {DTYPES[kind >> (DIGIT_BITS * place) & 7] for kind in table.kinds}


def table_of(lists: Sequence[Sequence[Tensor]], contract: Contract = TRACED) -> Table:
    """The table of lists that were checked, of which an empty one is not there."""
    table = known(lists, contract)
    return new_table(lists, contract) if table is None else table


def new_table(
    lists: Sequence[Sequence[Tensor]], contract: Contract = TRACED, is_written: Sequence[bool] | None = None
) -> Table:
    """`table_of` lists that are not `known`, of which `is_written` says which must share no memory with any."""
    _check_uncaptured(lists[0][0], contract)
    sizes = tuple(x.numel() for x in lists[0])
    kind = torch.zeros_like(_integers(sizes))
    for place, part in enumerate(lists):
        if part:
            digits = [DTYPES.index(torch.uint8 if x.dtype == torch.bool else x.dtype) for x in part]
            kind += _integers(digits) << (DIGIT_BITS * place)
    written = [flag for flag, part in zip(is_written or [False] * len(lists), lists, strict=True) for _ in part]
    layout = _Layout(
        _chunks(sizes, lists[0][0].device),
        kind,
        tuple(sorted({k for k, size in zip(kind.tolist(), sizes, strict=True) if size})),
        _integers([extent(x) for part in lists for x in part]),
        _integers(written) != 0,
        {},
    )
    key, places = _looked_at(lists, contract)
    table = _placed(layout, places)
    _keep(_LAYOUTS, key, layout, MAX_TABLES)
    return table


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their places."""
    return x.as_strided((x.numel(),), (1,))


def extent(x: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return elements * x.element_size() if x.numel() else 0


def overlap(begins: Tensor, extents: Tensor, is_written: Tensor) -> tuple[int, int] | None:
    """The numbers of two spans of memory of which one is written and which share bytes: the first by address that
    begins within another, and that other."""
    numbers = extents.nonzero().flatten()
    numbers = numbers[begins[numbers].argsort(stable=True)]
    begins, ends, is_written = begins[numbers], (begins + extents)[numbers], is_written[numbers]
    # what reaches furthest so far, of all and of what is written
    reach, whose = ends.cummax(0)
    reach_written, whose_written = torch.where(is_written, ends, 0).cummax(0)
    others = torch.where(is_written[1:], whose[:-1], whose_written[:-1])
    shared = begins[1:] < torch.where(is_written[1:], reach[:-1], reach_written[:-1])
    if not shared.any():
        return None
    first = int(shared.int().argmax())
    return int(numbers[first + 1]), int(numbers[others[first]])


def _looked_at(lists: Sequence[Sequence[Tensor]], contract: Contract) -> tuple[Hashable, _Places]:
    """Which layout lists have, and where they lie: together all that a table and the checks depend on."""
    seen = list(map(_seen, lists))
    return (contract, *(x.like for x in seen)), tuple([x.places for x in seen])


def _seen(tensors: Sequence[Tensor]) -> _Seen:
    """Of the very tensors of before, without a look at their shapes and strides, which would take as long again."""
    key, places = tuple(map(id, tensors)), tuple(map(Tensor.data_ptr, tensors))
    # one that lives where it was may have been resized or turned; ten thousand, which are not in the cache, are looked
    # at for the latter alone
    sizes = tuple(map(Tensor.numel, tensors)) if len(tensors) <= MOST_SIZED else ()
    seen = _SEEN.get(key)
    if (
        seen is not None
        and (places, sizes) == (seen.places, seen.sizes)
        and [tensors[i].is_contiguous() for i in seen.turnable] == seen.dense
    ):
        return seen

    def drop(_: object) -> None:
        _SEEN.pop(key, None)

    shapes, strides = tuple([x.shape for x in tensors]), tuple(map(Tensor.stride, tensors))
    layout = tuple([x.device for x in tensors]), tuple([x.dtype for x in tensors]), shapes, strides
    like = _LIKES.get(layout)
    if like is None:
        like = next(_NUMBERS)
        _keep(_LIKES, layout, like, MAX_LISTS)
    turnable = [i for i, shape in enumerate(shapes) if len(shape) > 1]
    dense = [tensors[i].is_contiguous() for i in turnable]
    seen = _Seen(places, like, sizes, turnable, dense, [weakref.ref(x, drop) for x in tensors])
    _keep(_SEEN, key, seen, MAX_LISTS)
    return seen


def _check_uncaptured(like: Tensor, contract: Contract) -> None:
    """A graph would copy a new table from memory of the host that is long another's when it is replayed."""
    sentence = (
        "tensors must be ones that it was called with before the capture of a CUDA graph, at the same addresses, got "
        "others; call it once before, and keep gradients by zero_grad(set_to_none=False)"
    )
    require(str(contract[0]), not is_capturing(like), sentence)


def _placed(layout: _Layout, places: _Places) -> Table:
    """A layout's table at these addresses."""
    columns = [_integers(part) if part else torch.zeros_like(layout.kind) for part in places]
    is_aligned = (torch.stack(columns) % 16 == 0).all(0)
    rows = torch.stack([layout.kind, is_aligned, *columns], 1)
    table = Table(layout.chunks, _upload(rows, layout.chunks.device), layout.kinds)
    _keep(layout.tables, places, table, MAX_PLACES)
    return table


def _keep(cache: dict[Any, Any], key: Hashable, value: object, most: int) -> None:
    cache[key] = value
    if len(cache) > most:
        cache.pop(next(iter(cache)), None)


@lru_cache(MAX_TABLES)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Vectorised over chunks: a model has a hundred thousand."""
    counts = _integers(sizes)
    num_chunks = (counts + CHUNK - 1) // CHUNK
    number = torch.repeat_interleave(num_chunks)
    first_chunk = num_chunks.cumsum(0) - num_chunks
    first = (torch.arange(len(number), device="cpu") - first_chunk[number]) * CHUNK
    return _upload(torch.stack([number, first, (counts[number] - first).clamp(max=CHUNK)], 1), device)


def _integers(values: Sequence[int]) -> Tensor:
    """int64 on the CPU, whichever is the default device; ten times as fast as by `torch.tensor`."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting for a GPU: gradients may lie elsewhere at every step."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
