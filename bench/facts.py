"""What this machine is: the processor, how it multiplies and why so, its rates, and the peers that are installed."""

import platform
from pathlib import Path

import torch
import triton

from bench.measure import machine_rates
from bench.peers import facts
from mmkernels import native
from mmkernels._products import CHOICES, VARIABLE, available


def lines() -> list[str]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    copy_rate, exp_rate = machine_rates(device)
    found = [
        f"device: {torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'}",
        f"processor: {_processor()}, {torch.backends.cpu.get_cpu_capability()} of torch",
        f"versions: Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}",
        f"native step: {'built' if native.AVAILABLE else 'not built, or MMKERNELS_NATIVE=0'}",
    ]
    for dtype, (way, why, ms) in CHOICES.items():
        times = ", ".join(f"{name} {t:.2f} ms" for name, t in ms.items())
        among = " or ".join(available(dtype))
        found.append(f"products of {dtype}: {way} of {among}: {why}{f' ({times})' if times else ''}")
    found += [
        f"to take another way: {VARIABLE}='float32=... bfloat16=...'",
        f"rates: {copy_rate / 1e9:.1f} GB/s copied, {exp_rate / 1e9:.2f} G exponentials/s",
    ]
    return [*found, "peers:", *(f"  {name} {fact}" for name, fact in facts().items())]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def main() -> int:
    print(*lines(), sep="\n")
    return 0
