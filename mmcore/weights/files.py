"""Models' folders: safetensors and JSON, written whole or not at all, read with a sentence for what is wrong."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcore.checkpoint import write_json
from mmcore.ops import require

SHARD_BYTES = 5_000_000_000
"""Weights beyond this are written as several files."""


def read_json(op: str, file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: no such file, or none that holds one.
    """
    require(op, file.is_file(), "folder must hold {}, got {}", file.name, file.parent)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{op}: {file} must hold JSON, got: {error}") from error
    require(op, isinstance(raw, dict), "{} must hold a JSON object, got {}", file, type(raw).__name__)
    return raw


def read_safetensors(op: str, file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        ValueError: a damaged file.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{op}: {file} must be a whole safetensors file, got: {error}") from error


def read_folder(op: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's *.safetensors, one or several, on the CPU.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors"))
    require(op, bool(files), "folder must hold *.safetensors, got {}", folder)
    return {name: x for file in files for name, x in read_safetensors(op, file).items()}


@contextmanager
def new_folder(op: str, folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` where the block ends well.

    Raises:
        ValueError: it exists already.
    """
    require(op, not folder.exists(), "folder must not exist yet, got {}", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        staged = Path(temporary) / folder.name
        staged.mkdir()
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        staged.rename(folder)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that transformers' from_pretrained, which reads the framework from the metadata, loads."""
    save_file(dict(tensors), file, metadata={"format": "pt"})


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes model.safetensors, or files of up to `SHARD_BYTES` and an index of them, as transformers does."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, x in tensors.items():
        if shards[-1] and x.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = x
        room -= x.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(x.nbytes for x in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )
