"""The whole state of a run, saved and restored: independent of ZeRO stage and of the number of ranks.

Weights, moments and EMA are stored in fp32 by full parameter names. A piece of at most `PIECE_BYTES` is gathered
by one all-reduce and written by one rank, the ranks taking turns, so that neither memory nor one disk writer
bounds the model. DeepSpeed's own format is not used: it pickles, it ties a checkpoint to the number of ranks and
the stage, and its universal form drops the EMA.
"""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from mmcore import checkpoint
from mmcore.train.engine import Engine


def save_state(
    engine: Engine, root: Path, step: int, run_state: dict[str, Any], loader: Any, *, keep: int
) -> Path:
    """Saves everything that a resumed run needs. A collective: every rank calls it.

    Args:
        engine: the model and its optimizer.
        root: the run's `checkpoints` folder.
        step: optimizer steps done.
        run_state: JSON, the same on every rank.
        loader: JSON of this rank's position in the data.
        keep: how many checkpoints stay, the newest.

    Returns:
        The folder of the new checkpoint.

    Raises:
        FloatingPointError: on every rank, where a tensor is not finite; nothing is saved.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    staged = [checkpoint.stage_folder(root, step) if rank == 0 else None]
    dist.broadcast_object_list(staged)
    folder = Path(staged[0] or "")
    files: dict[str, dict[str, Any]] = {}
    for key in ["weight", *(engine.optimizer.state_keys if step else [])]:
        for i, names in enumerate(engine.shards.pieces()):
            gathered = engine.gather(key, names)
            if not all(t.isfinite().all() for t in gathered.values()):
                raise FloatingPointError(f"the {key} tensors to save are not finite")
            if i % world_size == rank:
                path = folder / f"{key}-{i:05d}.safetensors"
                save_file({name: t.cpu().contiguous() for name, t in gathered.items()}, path)
                files[path.name] = checkpoint.describe(path)
    loader_path = folder / f"loader-{rank:05d}.json"
    checkpoint.write_json(loader_path, loader)
    files[loader_path.name] = checkpoint.describe(loader_path)
    if rank == 0:
        checkpoint.write_json(folder / "state.json", {"step": step, "world_size": world_size, **run_state})
        files["state.json"] = checkpoint.describe(folder / "state.json")
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, files)
    final = checkpoint.step_folder(root, step)
    if rank == 0:
        checkpoint.commit(folder, root, step, {k: v for part in everyone for k, v in part.items()}, keep=keep)
    dist.barrier()
    return final


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
        engine.scatter("weight", dict(checkpoint.tensors(folder, "weight")))
    if step == 0:
        return
    engine.init_state(step)
    for key in engine.optimizer.state_keys:
        for name, value in checkpoint.tensors(folder, key):
            engine.scatter(key, {name: value})
