"""Safetensors files written and read tensor by tensor, so that a model never has to be held at once."""

import ctypes
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

# Dtype and shape of tensors, by name.
Layout = dict[str, tuple[torch.dtype, torch.Size]]

# As the format names them.
_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` where the block ends well: a reader sees the old one or the new one, whatever is
    killed when."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_tensors(
    path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Writes `tensors`, all of `layout`, atomically: in any order, on any device, asked for one at a time; a ValueError
    of a dtype that the format lacks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    # wider dtypes first, so that each tensor is aligned
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        if dtype not in _NAMES:
            raise ValueError(f"write_tensors: {name} must be of a dtype that safetensors has, got {dtype}")
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        missing = dict(layout)
        for name, x in tensors:
            assert (x.dtype, x.shape) == missing.pop(name)
            held = x.detach().cpu().contiguous()
            if held.numel():
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))
        assert not missing


def read_layout(path: Path) -> tuple[Layout, dict[str, str]]:
    """Layout and metadata of a file, in the order of its tensors; a ValueError of another file, or one cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        if begin > size:
            raise ValueError(f"read_layout: path must be a safetensors file, got {path}")
        header = json.loads(file.read(begin - 8))
    metadata = header.pop("__metadata__", {})
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    end = max((entry["data_offsets"][1] for _, entry in entries), default=0)
    if unknown := sorted({entry["dtype"] for _, entry in entries} - _DTYPES.keys()):
        raise ValueError(f"read_layout: {path} must be of dtypes that are known, got {unknown}")
    if begin + end != size:
        raise ValueError(f"read_layout: path must be a whole file of {begin + end} bytes, got {size} in {path}")
    return {name: (_DTYPES[e["dtype"]], torch.Size(e["shape"])) for name, e in entries}, metadata


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, on the CPU, one at a time; raises as `read_layout`."""
    layout, _ = read_layout(path)
    with safe_open(path, framework="pt") as file:
        for name in layout:
            yield name, file.get_tensor(name)
