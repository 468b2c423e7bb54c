"""`python -m bench.gpu.facts FOLDER`: the GPU that benchmarks run on, and the rates that bound them, in facts.txt,
which is written anew with each that is found."""

# triton does not type a launch's options
# pyright: reportCallIssue=false
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.measure import copy_bytes_per_s, gemm_flops_per_s, paired_medians
from bench.peers import facts

# what L2 holds whole and no processor's own cache does, what a program reads of it at a time, and how often all of it
L2_BYTES, BLOCK, TURNS = 16 << 20, 8192, 8


@triton.jit
def _l2_kernel(x_ptr, out_ptr, blocks, turns, BLOCK: tl.constexpr):
    """Every program reads all of x, each from a place of its own on, past its processor's cache."""
    pid = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(blocks * turns):
        block = (pid + i) % blocks
        total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out_ptr + pid * BLOCK + tl.arange(0, BLOCK), total)


def l2_bytes_per_s(device: torch.device, num_programs: int) -> float:
    """Bytes that all processors together read from L2 in a second."""
    x = torch.zeros(L2_BYTES // 4, device=device)
    out = torch.empty(num_programs * BLOCK, device=device)
    blocks = x.numel() // BLOCK

    def run() -> None:
        _l2_kernel[(num_programs,)](x, out, blocks, TURNS, BLOCK=BLOCK, num_warps=8)

    return num_programs * TURNS * x.nbytes / paired_medians({"l2": run}, 5, device)["l2"]


def rates(device: torch.device) -> dict[str, Callable[[], float]]:
    """The probes, by name: what decides most first."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return {
        "l2_bytes_per_s": lambda: l2_bytes_per_s(device, 2 * processors),
        "copied_bytes_per_s": lambda: copy_bytes_per_s(device),
        "bfloat16_flops_per_s": lambda: gemm_flops_per_s(8192, 8192, 8192, torch.bfloat16, device),
    }


def clock_hz() -> float | None:
    """The processors' clock just after they had worked; None where nothing tells."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return 1e6 * float(said[0]) if said and said[0].isdigit() else None


def main(folder: Path) -> None:
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "peers": facts(),
    }
    for name, rate in rates(device).items():
        (folder / "facts.txt").write_text(json.dumps(found, indent=1) + "\n")
        found[name] = rate()
        print(f"{name}: {found[name]:.4g}", flush=True)
    found["clock_hz"] = clock_hz()
    if found["clock_hz"]:
        clocks = found["clock_hz"] * properties.multi_processor_count
        found["l2_bytes_per_clock_of_a_processor"] = found["l2_bytes_per_s"] / clocks
    (folder / "facts.txt").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
