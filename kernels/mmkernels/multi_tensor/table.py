"""Lists of tensors as one table of chunks, which a kernel walks in one launch."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a chunk: what one program, or one turn of a thread, takes.
CHUNK = 4096
# Columns of a row before the addresses.
NUM_COLUMNS = 5
# A dtype's digit in a row's `kind`, the first list's in the lowest two bits; 0 for a list that is not there.
DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
# Tables kept, those made last; of a model's lists there is one.
MAX_TABLES = 32


class Table(NamedTuple):
    """Chunks of lists of tensors, whose n-th tensors have the same elements in the same places.

    `rows`: int64 `[chunks, 5 + lists]` on their device: elements, 1 where they are a whole chunk of which every list's
    part is aligned to 16 bytes, kind, number of the tensor, first element, and the address of each list's part.
    `kinds`: those that occur.
    """

    rows: Tensor
    kinds: tuple[int, ...]


class _Entry(NamedTuple):
    table: Table
    watched: list[weakref.ref[Tensor]]  # each of which drops the entry when its tensor goes


_TABLES: dict[object, _Entry] = {}


def known(lists: Sequence[Sequence[Tensor]]) -> Table | None:
    """The table of these very tensors, if one was made and none has moved since."""
    entry = _TABLES.get(_key(lists))
    return None if entry is None else entry.table


def dtypes_of(table: Table, place: int) -> set[torch.dtype | None]:
    """Those in a list."""
    return {DTYPES[kind >> (2 * place) & 3] for kind in table.kinds}


def table_of(lists: Sequence[Sequence[Tensor]]) -> Table:
    """The table of checked lists, of which an empty one is not there; made once for these tensors where they are."""
    table = known(lists)
    if table is None:
        table, key = _make(lists), _key(lists)

        def drop(_: object) -> None:
            _TABLES.pop(key, None)

        _TABLES[key] = _Entry(table, [weakref.ref(x, drop) for tensors in lists for x in tensors])
        if len(_TABLES) > MAX_TABLES:
            del _TABLES[next(iter(_TABLES))]
    return table


def _key(lists: Sequence[Sequence[Tensor]]) -> object:
    """Of ten thousand tensors in milliseconds: what else a living tensor could change, it cannot in its place."""
    tensors = [x for part in lists for x in part]
    places = tuple(map(Tensor.data_ptr, tensors))
    dense = tuple(map(Tensor.is_contiguous, tensors))
    return tuple(map(len, lists)), tuple(map(id, tensors)), places, dense


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of their places."""
    return x.as_strided((x.numel(),), (1,))


def _make(lists: Sequence[Sequence[Tensor]]) -> Table:
    """Vectorised over chunks: a model has a hundred thousand."""
    num_tensors = len(lists[0])
    sizes = torch.tensor([x.numel() for x in lists[0]], dtype=torch.int64)
    num_chunks = (sizes + CHUNK - 1) // CHUNK
    number = torch.repeat_interleave(torch.arange(num_tensors), num_chunks)
    first_chunk = num_chunks.cumsum(0) - num_chunks
    first = (torch.arange(len(number)) - first_chunk[number]) * CHUNK
    elements = (sizes[number] - first).clamp(max=CHUNK)
    kind, is_whole, addresses = torch.zeros_like(number), elements == CHUNK, []
    for place, tensors in enumerate(lists):
        if not tensors:
            addresses.append(torch.zeros_like(number))
            continue
        digits = torch.tensor([DTYPES.index(x.dtype) for x in tensors], dtype=torch.int64)
        widths = torch.tensor([x.element_size() for x in tensors], dtype=torch.int64)
        begins = torch.tensor([x.data_ptr() for x in tensors], dtype=torch.int64)
        kind += digits[number] << (2 * place)
        addresses.append(begins[number] + first * widths[number])
        is_whole &= addresses[-1] % 16 == 0
    rows = torch.stack([elements, is_whole.long(), kind, number, first, *addresses], 1)
    return Table(rows.to(lists[0][0].device), tuple(sorted(set(kind.tolist()))))
