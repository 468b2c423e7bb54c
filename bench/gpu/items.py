"""Work in small items, each of which may fail by itself, and the device with it."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from bench.gpu.lines import append

# what a kernel that is wrong, too large or not there raises
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError,
    RuntimeError, TritonError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """Something to be done, and what is told of it: `run` returns fields of a line of JSON."""

    name: str
    run: Callable[[], dict[str, Any]]


def run_items(items: Sequence[Item], lines: Path, shown: Callable[[dict[str, Any]], str] | None = None) -> int | None:
    """Each in turn, a line of each as it ends; where one broke the device's context, the number of the next one."""
    for i, item in enumerate(items):
        began, fields = time.perf_counter(), {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fields = item.run()
            error = None
        except FAILURES as found:
            error = f"{type(found).__name__}: {found}".strip().splitlines()[0][:300]
        line = {"item": item.name, "seconds": round(time.perf_counter() - began, 3), "error": error, **fields}
        append(lines, **line)
        if shown is not None:
            print(shown(line), flush=True)
        if torch.cuda.is_available() and not _is_usable():
            append(lines, item=item.name, error="the device's context is broken: what follows has a new process")
            return i + 1
        # what this process keeps, the others beside it lack
        torch.cuda.empty_cache()
    return None


def _is_usable() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def go_on_from(module: str, first: int, arguments: Sequence[str]) -> None:
    """This process again, with a new context, from an item on."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments, f"--from={first}"])
