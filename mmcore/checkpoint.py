"""Checkpoint folders: written whole or not at all, verified before they are read, safetensors and JSON only."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mmcore.tensor_file import replacing

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8})")


def write_file(path: Path, data: bytes) -> None:
    """Writes `path` atomically: a reader sees the old file or the new one, whatever is killed when."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_file(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def replace_path(source: Path, target: Path) -> None:
    """Moves a file or folder to where another may be."""
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, after forcing it to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending; unfinished ones have another name and do not count."""
    found = [_STEP.fullmatch(p.name) for p in root.iterdir()] if root.is_dir() else []
    return sorted(int(m[1]) for m in found if m)


def stage_folder(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; leftovers of killed runs are removed."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".unfinished-*"):
        shutil.rmtree(leftover)
    folder = root / f".unfinished-{step:08d}"
    folder.mkdir()
    return folder


def commit(staged: Path, root: Path, step: int, files: dict[str, dict[str, Any]], *, keep: int) -> Path:
    """Turns a staged folder into the checkpoint of `step` by one rename, then removes all but the newest `keep`."""
    write_json(staged / MANIFEST, files)
    final = step_folder(root, step)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    descriptor = os.open(root, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    for old in steps(root)[:-keep]:
        shutil.rmtree(step_folder(root, old))
    return final


def verify(folder: Path) -> None:
    """Checks every file of a checkpoint against its manifest; a ValueError names one that is missing, short or
    altered."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    for name, expected in json.loads((folder / MANIFEST).read_text()).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing; resume from an earlier one")
        found = describe(path)
        if found != expected:
            raise ValueError(
                f"checkpoint {folder} is damaged: {name} has {found['bytes']} bytes, sha256 {found['sha256'][:12]}, "
                f"expected {expected['bytes']} and {expected['sha256'][:12]}; resume from an earlier one"
            )


def find(where: Path) -> Path:
    """The checkpoint that `where` means: itself, or the newest of a run folder; a ValueError where there is none."""
    if (where / MANIFEST).is_file():
        return where
    found = steps(where / "checkpoints")
    if not found:
        raise ValueError(f"{where} holds no checkpoint: expected {where}/checkpoints/step-NNNNNNNN")
    return step_folder(where / "checkpoints", found[-1])


def tensors(folder: Path, key: str) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor stored under `key` ("weight", "ema", "exp_avg", ...), one at a time; a ValueError
    where there is none."""
    files = sorted(folder.glob(f"{key}-*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint {folder} holds no {key!r} tensors")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                yield name, file.get_tensor(name)


class Stored(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, each mapped by itself when it is asked for: what nobody uses is not
    read, and what nobody holds any more takes no memory. A tensor's `origin` is its file and name."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        return mapped(self._files[name], name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def mapped(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, as of `Stored`."""
    with safe_open(path, framework="pt") as file:
        tensor: Any = file.get_tensor(name)
    tensor.origin = path, name
    return tensor


def stored(folder: Path, key: str) -> Stored:
    """What a checkpoint holds under `key`; errors as of `tensors`."""
    files = sorted(folder.glob(f"{key}-*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint {folder} holds no {key!r} tensors")
    return Stored(files)


def write_into(target: Any, value: Tensor) -> None:
    """Copies a tensor into a parameter or buffer; where ZeRO-3 splits that among ranks, this rank's part."""
    part = getattr(target, "ds_tensor", None)
    if part is None:
        target.data.copy_(value)
        return
    start = target.ds_zero_partition_rank * part.ds_numel
    mine = value.reshape(-1)[start : start + part.ds_numel]  # the last ranks' may be padded
    part.data.view(-1)[: mine.numel()].copy_(mine)
    target.ds_secondary_tensor = None


def buffers(folder: Path) -> dict[str, Tensor]:
    """The buffers of a checkpoint's model by name; none of a run from before they were kept."""
    return dict(tensors(folder, "buffer")) if any(folder.glob("buffer-*.safetensors")) else {}
