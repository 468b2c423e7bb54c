"""Peak memory, errors and rooflines, measured in the same run as the times."""

import ctypes
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels._cost import Cost
from mmkernels._gemm import matmul, matmul_nt

MIB = 2**20
# of calls on a GPU that are timed together
BATCH_S, MOST_CALLS = 5e-3, 200
# of glibc's mallopt, and what the threshold grows to by itself as large blocks are freed
M_MMAP_THRESHOLD, MOST_MMAP_THRESHOLD = -3, 32 << 20
CLEAR_REFS = Path("/proc/self/clear_refs")
ROOT = Path(__file__).parents[1]
# Every block of a tensor's size goes back to the system when it is freed: what is resident is what is held.
MALLOC = {
    f"MALLOC_{name}_": value
    for name, value in (("MMAP_THRESHOLD", "65536"), ("TRIM_THRESHOLD", "65536"), ("TOP_PAD", "0"))
}


def synchronize(device: torch.device) -> None:
    """Waits for the device, where it works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_extra_bytes(run: Callable[[], Any], device: torch.device, *, runs: int = 3) -> int | None:
    """Most bytes held during `run` beyond what was held before it; None where the system cannot tell.

    On a CPU, where whatever else the process touches counts too, the least of several runs.
    """
    if device.type != "cuda":
        peaks = [peak_resident_bytes(run) for _ in range(runs)] if CLEAR_REFS.exists() else None
        return min(peaks) if peaks else None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_resident_bytes(run: Callable[[], Any]) -> int:
    """The growth of the peak resident size, reset before the run; the allocator's free pages are given back first,
    so that they do not hide an allocation, and large blocks are mapped one by one, so that holes between them count
    for nothing."""
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        CLEAR_REFS.write_text("5")
        before = status_bytes("VmRSS")
        run()
        return max(0, status_bytes("VmHWM") - before)
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, MOST_MMAP_THRESHOLD)


def paired_medians(contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each contender, the contenders taking turns so that a slow minute slows them all.

    On a GPU a round is as many calls in a row as take `BATCH_S`: a short one alone would measure its launch.
    """

    def seconds(run: Callable[[], Any], calls: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    times: dict[str, list[float]] = {name: [] for name in contenders}
    calls = dict.fromkeys(contenders, 1)
    for name, run in contenders.items():
        run()
        if device.type == "cuda":
            calls[name] = max(1, min(int(BATCH_S / seconds(run, 1)), MOST_CALLS))
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds(run, calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}


@functools.cache
def gemm_flops_per_s(num_rows: int, num_cols: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best bare product that torch carries, once a run: of [M, D] x [D, N] as logits have it, or of
    [M, N] x [N, D] as gradients do; in tiles of at most 2,048 rows on a CPU."""
    rows = num_rows if device.type == "cuda" else min(num_rows, 2048)
    cols = num_cols if device.type == "cuda" else min(num_cols, 2048)
    a, b = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, cols))
    grad = torch.randn(rows, cols, device=device, dtype=dtype)
    ways: dict[str, Callable[[], Any]] = {"nt": lambda: torch.mm(a, b.T), "nn": lambda: torch.mm(grad, b)}
    if device.type != "cuda":
        ways |= {"our nt": lambda: matmul_nt(a, b), "our nn": lambda: matmul(grad, b)}
    return 2 * rows * cols * width / min(paired_medians(ways, 9, device).values())


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written in a second by a copy that no cache holds, or in place, where nothing is fetched only to
    be overwritten: the faster of the two."""
    x = torch.zeros(2**30 if device.type == "cuda" else 2**26, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    ways = {"copy": lambda: y.copy_(x), "in place": lambda: x.view(torch.float32).mul_(1.0)}
    return 2 * x.numel() / min(paired_medians(ways, 9, device).values())


def exps_per_s(device: torch.device) -> float:
    """Exponentials in a second: of 1 Mi float32 in a cache on a CPU, of 64 Mi on a GPU."""
    x = torch.rand(2**26 if device.type == "cuda" else 2**20, device=device)
    y = torch.empty_like(x)
    return x.numel() / paired_medians({"exp": lambda: torch.exp(x, out=y)}, 9, device)["exp"]


@functools.cache
def machine_rates(device: torch.device) -> tuple[float, float]:
    """Bytes copied and exponentials in a second, measured once a run."""
    return copy_bytes_per_s(device), exps_per_s(device)


def predicted_s(cost: Cost, gemm_rate: float, device: torch.device) -> float:
    """The cost model: products, main memory and exponentials one after the other, at this machine's rates."""
    copy_rate, exp_rate = machine_rates(device)
    return cost.flops / gemm_rate + cost.bytes_moved / copy_rate + cost.exps / exp_rate


def relative_error(found: Tensor, gold: Tensor) -> float:
    """max |found - gold| / max |gold|."""
    return float((found.double() - gold.double()).abs().max() / gold.double().abs().max())


def assert_agrees(found: Tensor, gold: Tensor) -> None:
    """That half of the dtype's digits are right, which no other formula's are: contenders compute the same thing."""
    error, bound = relative_error(found, gold), torch.finfo(found.dtype).eps ** 0.5
    assert error <= bound, f"an error of {error:.1e}, more than {bound:.1e}"


def in_process(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m MODULE ...` prints last, JSON, where every block that is freed goes back to the system."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **MALLOC, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
