"""Models' folders: safetensors and JSON, written whole or not at all, read with a sentence for what is wrong."""

import json
import os
import struct
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import safe_globals

from mmcore.checkpoint import Stored, write_json
from mmcore.ops import require

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""How transformers reads a folder: without the network, and without a question whether to run the folder's own code."""
SHARD_BYTES = 5_000_000_000
"""Weights beyond this are written as several files."""
# what torch's unpickler raises on damaged input
_UNPICKLER = (UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)
_UNPICKLER += (AssertionError, struct.error)
# as numpy 1 and 2 write a number
_NUMBER = np.float64(0).__reduce__()[0]
_ARGUMENTS: list[Any] = [Namespace, np.dtype, type(np.dtype(np.float64))]
_ARGUMENTS += [(_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]

PARTS = ("teacher", "student", "state_dict", "model")
"""What checkpoints of trainings have weights under, the first that is there being read."""


def read_json(op: str, file: Path) -> dict[str, Any]:
    """A JSON object; a ValueError where the file is missing or holds anything else."""
    require(op, file.is_file(), "folder must hold {}, got {}", file.name, file.parent)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{op}: {file} must hold JSON, got: {error}") from error
    require(op, isinstance(raw, dict), "{} must hold a JSON object, got {}", file, type(raw).__name__)
    return raw


def read_safetensors(op: str, file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, mapped as of `mmcore.checkpoint.Stored`; a ValueError where it is damaged."""
    try:
        return dict(Stored([file]))
    except SafetensorError as error:
        raise ValueError(f"{op}: {file} must be a whole safetensors file, got: {error}") from error


def read_pickle(op: str, file: Path, *, parts: Sequence[str] = PARTS) -> dict[str, Tensor]:
    """The tensors of a torch file, on the CPU, those of the first of `parts` that it has; no other object is made than
    what argparse keeps of a command line, and numbers of numpy, which checkpoints of trainings hold. A ValueError where
    it is missing, damaged, or of something else."""
    require(op, file.is_file(), "file must exist, got {}", file)
    try:
        with safe_globals(_ARGUMENTS):
            raw = torch.load(file, map_location="cpu", weights_only=True)
    except _UNPICKLER as error:
        why = f"{type(error).__name__}: {error}".split(". ")[0]
        raise ValueError(f"{op}: {file} must be a whole pickle of tensors and nothing else, got {why}") from error
    if isinstance(raw, dict):
        raw = next((raw[part] for part in parts if isinstance(raw.get(part), dict)), raw)
    is_state = isinstance(raw, dict) and all(isinstance(x, Tensor) for x in raw.values())
    require(op, is_state, "{} must hold tensors by name, got {}", file, type(raw).__name__)
    return raw


def read_weights(op: str, file: Path, *, parts: Sequence[str] = PARTS) -> dict[str, Tensor]:
    """The tensors of a file, .safetensors or torch's; `parts` and errors as of `read_pickle`."""
    return read_safetensors(op, file) if file.suffix == ".safetensors" else read_pickle(op, file, parts=parts)


def read_folder(op: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's *.safetensors, on the CPU: of those that an index names, of model.safetensors, or of
    all; a ValueError where there are none."""
    files, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    require(op, bool(files), "folder must hold *.safetensors, got {}", folder)
    if index.is_file():
        names = read_json(op, index).get("weight_map")
        require(
            op, isinstance(names, dict) and bool(names), "{} must say which file has a weight, got {}", index, names
        )
        files = [folder / name for name in sorted(set(dict(names or {}).values()))]
        missing = [file.name for file in files if not file.is_file()]
        require(op, not missing, "{} must name files that are there, missing {}", index, ", ".join(missing[:3]))
    elif folder / "model.safetensors" in files:
        files = [folder / "model.safetensors"]
    return {name: x for file in files for name, x in read_safetensors(op, file).items()}


@contextmanager
def new_folder(op: str, folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` where the block ends well; a ValueError where that exists."""
    require(op, not folder.exists(), "folder must not exist yet, got {}", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        staged = Path(temporary) / folder.name
        staged.mkdir()
        yield staged
        for file in filter(Path.is_file, staged.rglob("*")):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        staged.rename(folder)


def save_folder(
    op: str,
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    write_more: Callable[[Path], object] = lambda staged: None,
) -> None:
    """Writes a new folder as transformers does: config.json, *.safetensors, and what is written besides."""
    with new_folder(op, Path(folder)) as staged:
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_BYTES)
        for file, names in split.filename_to_tensors.items():
            write_safetensors(staged / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(staged / "model.safetensors.index.json", index)
        write_json(staged / "config.json", config)
        write_more(staged)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file that transformers' from_pretrained, which reads the framework from the metadata, loads."""
    save_file(dict(tensors), file, metadata={"format": "pt"})
