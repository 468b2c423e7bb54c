"""`python -m bench.gpu_facts FILE`: the GPU that benchmarks run on, and the rates that bound them."""

import json
import sys
from pathlib import Path

import torch
import triton

from bench.measure import copy_bytes_per_s, gemm_flops_per_s
from bench.peers import facts


def main(path: Path) -> None:
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    found = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "bfloat16_flops_per_s": gemm_flops_per_s(8192, 8192, 8192, torch.bfloat16, device),
        "copied_bytes_per_s": copy_bytes_per_s(device),
        "peers": facts(),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
