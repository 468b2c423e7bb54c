"""The whole state of a run, saved and restored: independent of ZeRO stage and of the number of ranks.

Weights, moments and EMA are stored in fp32 by full parameter names. A piece of at most `PIECE_BYTES` is gathered
by one all-reduce and written by one rank, the ranks taking turns, so that neither memory nor one disk writer
bounds the model. Buffers, which are equal on all ranks, and companions (teachers, queues, centres) lie beside them.
DeepSpeed's own format is not used: it pickles, it ties a checkpoint to the number of ranks and the stage, and its
universal form drops the EMA.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.nn import MomentumEncoder
from mmcore.train.engine import Engine

BUFFERS = "buffer"


def save_state(
    engine: Engine,
    root: Path,
    step: int,
    run_state: dict[str, Any],
    loader: Any,
    *,
    keep: int,
    companions: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Saves everything that a resumed run needs, and returns its folder. A collective: every rank calls it.

    Args:
        engine: the model and its optimizer.
        root: the run's `checkpoints` folder.
        step: optimizer steps done.
        run_state: JSON, the same on every rank.
        loader: JSON of this rank's position in the data.
        keep: how many checkpoints stay, the newest.
        companions: modules outside of the engine, by name.

    Raises:
        FloatingPointError: on every rank, where a tensor is not finite; nothing is saved.
        ValueError: on every rank, where a buffer or a companion differs between ranks; nothing is saved.
    """
    rank, world_size, companions = dist.get_rank(), dist.get_world_size(), companions or {}
    held = {BUFFERS: state_of(engine.module, without_parameters=True)}
    held |= {name: state_of(x) for name, x in companions.items() if not isinstance(x, MomentumEncoder)}
    check_equal(held)
    staged = [checkpoint.stage_folder(root, step) if rank == 0 else None]
    dist.broadcast_object_list(staged)
    folder = Path(staged[0] or "")
    files: dict[str, dict[str, Any]] = {}
    for key in ["weight", *(engine.optimizer.state_keys if step else [])]:
        for i, names in enumerate(engine.shards.pieces()):
            gathered = engine.gather(key, names)
            if not all(t.isfinite().all() for t in gathered.values()):
                raise FloatingPointError(f"the {key} tensors to save are not finite")
            if gathered and i % world_size == rank:
                path = folder / f"{key}-{i:05d}.safetensors"
                save_file({name: t.cpu().contiguous() for name, t in gathered.items()}, path)
                files[path.name] = checkpoint.describe(path)
    written = []
    for name, module in companions.items():
        if isinstance(module, MomentumEncoder):
            module.ema.save(_file(folder, name))
            written.append(_file(folder, name))
    loader_path = folder / f"loader-{rank:05d}.json"
    checkpoint.write_json(loader_path, loader)
    files[loader_path.name] = checkpoint.describe(loader_path)
    if rank == 0:
        state = {"step": step, "world_size": world_size, **run_state}
        for name, (tensors, numbers) in held.items():
            if tensors:
                save_file(tensors, _file(folder, name))
                written.append(_file(folder, name))
            if numbers:
                state.setdefault("numbers", {})[name] = numbers
        checkpoint.write_json(folder / "state.json", state)
        files |= {path.name: checkpoint.describe(path) for path in (*written, folder / "state.json")}
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, files)
    final = checkpoint.step_folder(root, step)
    if rank == 0:
        checkpoint.commit(folder, root, step, {k: v for part in everyone for k, v in part.items()}, keep=keep)
    dist.barrier()
    return final


State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, on the CPU, and what else a module keeps, as JSON."""


def state_of(module: nn.Module, *, without_parameters: bool = False) -> State:
    """What a module's state dict holds; its parameters may be left out."""
    left_out = {name for name, _ in module.named_parameters(remove_duplicate=False)} if without_parameters else set()
    state = {name: x for name, x in module.state_dict().items() if name not in left_out}
    tensors = {name: x.cpu().contiguous() for name, x in state.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in state.items() if name not in tensors}


def check_equal(held: Mapping[str, State]) -> None:
    """That all ranks hold the same buffers and companions, or ValueError: one rank's are saved for all. Collective."""
    if dist.get_world_size() == 1:
        return
    digests = {
        f"{owner} {name}": hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for owner, (tensors, _) in held.items()
        for name, x in tensors.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    differ = [name for name, x in digests.items() if any(of.get(name) != x for of in everyone)]
    if differ:
        why = "statistics have to be of all ranks (mmcore.nn.BatchNorm), queues and centres filled from all"
        raise ValueError(f"{differ[0]} must be equal on all ranks to be saved, got differing ones: {why}")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name if name == BUFFERS else f'companion.{name}'}-00000.safetensors"


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint: step, world_size, and the run's own entries."""
    return json.loads((folder / "state.json").read_text())


def read_loader(folder: Path) -> Any:
    """This rank's position in the data; of rank 0 where the checkpoint was written by another number of ranks."""
    path = folder / f"loader-{dist.get_rank():05d}.json"
    if read_state(folder)["world_size"] != dist.get_world_size():
        path = folder / "loader-00000.json"
    return json.loads(path.read_text())


def restore_engine(engine: Engine, folder: Path) -> None:
    """Fills the optimizer from a checkpoint; the module's weights were loaded before the engine was made."""
    step = read_state(folder)["step"]
    if engine.precision == "bf16":
        for name, value in checkpoint.tensors(folder, "weight"):
            engine.scatter("weight", {name: value})
    if step == 0:
        return
    engine.init_state(step)
    for key in engine.optimizer.state_keys:
        for name, value in checkpoint.tensors(folder, key):
            engine.scatter(key, {name: value})


def restore_companions(companions: Mapping[str, nn.Module], folder: Path) -> None:
    """Fills teachers, queues and centres from a checkpoint; raises ValueError where one is not there, or differs."""
    for name, module in companions.items():
        if isinstance(module, MomentumEncoder):
            module.ema.load(_file(folder, name))
        else:
            restore_module(module, name, folder)


def restore_module(module: nn.Module, name: str, folder: Path) -> None:
    """Fills a module's state, all but parameters of a model that is trained, from what `save_state` wrote of `name`;
    raises ValueError where names or shapes differ."""
    is_model = name == BUFFERS
    file = _file(folder, name)
    found: dict[str, Any] = dict(load_file(file)) if file.is_file() else {}
    found |= read_state(folder).get("numbers", {}).get(name, {})
    if is_model and not found:  # of a run from before buffers were kept
        return
    tensors, numbers = state_of(module, without_parameters=is_model)
    wanted = {**tensors, **numbers}
    owner = "buffers" if is_model else name
    differ = sorted(wanted.keys() ^ found.keys())[:3]
    if differ:
        raise ValueError(f"{owner} of checkpoint {folder} must be the model's, got a difference in {differ}")
    for entry, x in tensors.items():
        if found[entry].shape != x.shape:
            got = list(found[entry].shape)
            raise ValueError(f"{owner}: {entry} must be {list(x.shape)} as in the model, got {got} in {folder}")
    module.load_state_dict(found, strict=False)
