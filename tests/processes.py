"""Processes that begin with everything imported (tests/preloaded.py): torch, transformers and deepspeed take eight
seconds of a slow core, and tests start a hundred processes."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


def run_main(
    module: str, *ranks: Sequence[str], env: Sequence[Mapping[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """Runs `python -m module ARGUMENTS` in as many processes as there are lists of arguments and environments, at the
    same time; when one fails, or none has ended after TIMEOUT_S, the others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(i) for i in range(len(ranks))]
        started: list[Any] = [
            _context.Process(target=_run, args=(module, list(arguments), dict(variables), str(out)))
            for arguments, variables, out in zip(ranks, env, outs, strict=True)
        ]
        for process, out in zip(started, outs, strict=True):
            for suffix in (".out", ".err"):  # there, whatever becomes of the process
                out.with_suffix(suffix).touch()
            process.start()
        _wait(started)
        texts = [[out.with_suffix(suffix).read_text() for suffix in (".out", ".err")] for out in outs]
        return [
            subprocess.CompletedProcess([module, *arguments], process.exitcode, *said)
            for arguments, process, said in zip(ranks, started, texts, strict=True)
        ]


def _wait(started: Sequence[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    left = list(started)
    while left and time.monotonic() < deadline and all(p.exitcode in (None, 0) for p in started):
        wait([p.sentinel for p in left], deadline - time.monotonic())
        left = [p for p in left if p.exitcode is None]
    for process in left:
        process.kill()
        process.join()


# in the new process
def _run(module: str, arguments: list[str], variables: dict[str, str], out: str) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(out + suffix, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
