"""Lists of tensors as two small tables, which a kernel walks in one launch."""

import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a chunk: what one program, or one turn of a thread, takes.
CHUNK = 4096
# Columns of a tensor's row before the addresses.
NUM_COLUMNS = 2
# Bits of a dtype's digit in `kind`, the first list's the lowest; digit 0 for a list that is not there.
DIGIT_BITS = 3
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.uint8)
# Tables kept, those made last; of a model's lists there is one.
MAX_TABLES = 32


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


class _Entry(NamedTuple):
    """A table, and what it was made of: the addresses, and of the tensors that could be turned, by their numbers,
    whether they were contiguous."""

    table: Table
    places: list[int]
    turnable: list[int]
    dense: list[bool]
    watched: list[weakref.ref[Tensor]]  # each of which drops the entry when its tensor goes


_TABLES: dict[Hashable, _Entry] = {}


def known(lists: Sequence[Sequence[Tensor]], contract: Hashable = None) -> Table | None:
    """The table of these very tensors, if one was made under this contract and none has moved since."""
    tensors = [x for part in lists for x in part]
    entry = _TABLES.get(_key(lists, tensors, contract))
    if entry is None or list(map(Tensor.data_ptr, tensors)) != entry.places:
        return None
    # what else a living tensor could change, it cannot in its place
    same = all(tensors[i].is_contiguous() == dense for i, dense in zip(entry.turnable, entry.dense, strict=True))
    return entry.table if same else None


def dtypes_of(table: Table, place: int) -> set[torch.dtype | None]:
    """Those in a list."""
    return {DTYPES[kind >> (DIGIT_BITS * place) & 7] for kind in table.kinds}


def table_of(lists: Sequence[Sequence[Tensor]], contract: Hashable = None) -> Table:
    """The table of lists that were checked against a contract, of which an empty one is not there; made once for these
    tensors where they are."""
    table = known(lists, contract)
    return new_table(lists, contract) if table is None else table


def new_table(lists: Sequence[Sequence[Tensor]], contract: Hashable = None) -> Table:
    """`table_of` lists that are not `known`."""
    table, tensors = _make(lists), [x for part in lists for x in part]
    key = _key(lists, tensors, contract)

    def drop(_: object) -> None:
        _TABLES.pop(key, None)

    turnable = [i for i, x in enumerate(tensors) if x.ndim > 1]
    dense = [tensors[i].is_contiguous() for i in turnable]
    watched = [weakref.ref(x, drop) for x in tensors]
    _TABLES[key] = _Entry(table, list(map(Tensor.data_ptr, tensors)), turnable, dense, watched)
    if len(_TABLES) > MAX_TABLES:
        del _TABLES[next(iter(_TABLES))]
    return table


def _key(lists: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], contract: Hashable) -> Hashable:
    """Which tensors, without a look at them: ten thousand are not in the cache."""
    return contract, tuple(map(len, lists)), tuple(map(id, tensors))


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their places."""
    return x.as_strided((x.numel(),), (1,))


def _make(lists: Sequence[Sequence[Tensor]]) -> Table:
    """Vectorised over chunks: a model has a hundred thousand."""
    device, num_tensors = lists[0][0].device, len(lists[0])
    sizes = torch.tensor([x.numel() for x in lists[0]], dtype=torch.int64)
    num_chunks = (sizes + CHUNK - 1) // CHUNK
    number = torch.repeat_interleave(torch.arange(num_tensors), num_chunks)
    first_chunk = num_chunks.cumsum(0) - num_chunks
    first = (torch.arange(len(number)) - first_chunk[number]) * CHUNK
    elements = (sizes[number] - first).clamp(max=CHUNK)
    kind, is_aligned, addresses = torch.zeros_like(sizes), torch.ones_like(sizes), []
    for place, tensors in enumerate(lists):
        if not tensors:
            addresses.append(torch.zeros_like(sizes))
            continue
        digits = torch.tensor([DTYPES.index(_stored(x.dtype)) for x in tensors], dtype=torch.int64)
        addresses.append(torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64))
        kind += digits << (DIGIT_BITS * place)
        is_aligned &= addresses[-1] % 16 == 0
    return Table(
        _upload(torch.stack([number, first, elements], 1), device),
        _upload(torch.stack([kind, is_aligned, *addresses], 1), device),
        tuple(sorted(set(kind[sizes > 0].tolist()))),
    )


def _stored(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting for a GPU: gradients may lie elsewhere at every step."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
