"""Runs a worker of this folder on several gloo ranks."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from tests.processes import ROOT, TIMEOUT_S, run_main


def environment() -> dict[str, str]:
    """A clean environment for a launched rank: one thread each, the sources importable, no launcher's variables."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET"}
    env = {k: v for k, v in os.environ.items() if k not in drop}
    paths = [str(ROOT), str(ROOT / "kernels")]
    return env | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(folder: Path, result: dict[str, Any]) -> NoReturn:
    """How every worker ends: its result written, all ranks done, and no destructor run (gloo and DeepSpeed
    sometimes abort in theirs)."""
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def serve(work: Callable[..., dict[str, Any]]) -> NoReturn:
    """What a worker runs: its work in its folder, of the arguments that its test gives."""
    folder = Path(sys.argv[1])
    finish(folder, work(folder, **json.loads((folder / "arguments.json").read_text())))


def run_ranks(
    worker: str,
    num_ranks: int,
    folder: Path,
    interpret: bool = False,
    package: str = "tests.distributed",
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Runs `<package>.<worker>` on `num_ranks` ranks; returns what each wrote to its result file.

    `interpret`: the Triton kernels run, by their interpreter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    module = f"{package}.{worker}"
    if interpret:  # what triton is bound to when it is imported
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "-m", module, str(folder)]
        env = environment() | {"TRITON_INTERPRET": "1"}
        done = [subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)]
    else:
        size = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        env = [environment() | size | meet | rank for rank in ranks]
        done = run_main(module, *[[str(folder)]] * num_ranks, env=env)
    for ended in done:
        assert ended.returncode == 0, f"{worker} failed:\n{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}"
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(num_ranks)]
