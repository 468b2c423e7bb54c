"""GPUs and what they reach: measured where that was done, else the vendor's sheet times the share that was reached on
the one that was measured."""

from dataclasses import dataclass, replace
from typing import Literal

# Of an H200: a bare product in bfloat16 and a copy, measured; beside them its sheet's.
MEASURED_FLOPS, SHEET_FLOPS = 790e12, 989e12
MEASURED_COPY, SHEET_COPY = 4.3e12, 4.8e12


@dataclass(frozen=True)
class Rate:
    """A rate per second and its source; "scaled" is the vendor's sheet times the measured share of an H200's sheet."""

    per_s: float
    source: Literal["measured", "sheet", "scaled"]


@dataclass(frozen=True)
class Gpu:
    """A device and its place in a cluster."""

    name: str
    memory_bytes: float
    bf16_flops: Rate  # of matrix products
    fp32_flops: Rate  # likewise, without tensor cores: torch's default
    copy_bytes: Rate  # read and written in main memory
    exps: Rate  # exponentials
    link_bytes: Rate  # sent to others of its node, while as much is received
    network_bytes: Rate  # sent to other nodes
    per_node: int = 8
    is_cpu: bool = False  # memory that is asked for counts when it is written, and ops run blockwise

    def bytes_between(self, gpus: int) -> float:
        """Bytes a second that one of so many sends, while it receives as many: the slowest link of a ring."""
        return (self.link_bytes if gpus <= self.per_node else self.network_bytes).per_s


def _nvidia(
    name: str, memory_gb: float, memory_tb_per_s: float, nvlink_gb_per_s: float, of_chip: tuple[float, ...]
) -> Gpu:
    """By the sheet, whose NVLink counts both directions."""
    bf16_tflops, fp32_tflops, network_gbit_per_s, exps = of_chip
    return Gpu(
        name,
        memory_gb * 1e9,
        Rate(bf16_tflops * 1e12 * MEASURED_FLOPS / SHEET_FLOPS, "scaled"),
        Rate(fp32_tflops * 1e12 * MEASURED_FLOPS / SHEET_FLOPS, "scaled"),
        Rate(memory_tb_per_s * 1e12 * MEASURED_COPY / SHEET_COPY, "scaled"),
        Rate(exps, "sheet"),
        Rate(nvlink_gb_per_s * 1e9 / 2, "sheet"),
        Rate(network_gbit_per_s * 1e9 / 8, "sheet"),
    )


# TFLOP/s in bfloat16 and float32; a node's network, an adapter a GPU, in Gbit/s (DGX A100; DGX H100, H200, B200);
# exponentials: 16 a clock and multiprocessor (CUDA C++ Programming Guide, arithmetic instructions), at boost clock.
_A100 = 312, 19.5, 200, 16 * 108 * 1.41e9
_HOPPER = 989, 67, 400, 16 * 132 * 1.98e9
_BLACKWELL = 2250, 75, 400, 16 * 148 * 1.98e9
_H200 = _nvidia("h200", 141, 4.8, 900, _HOPPER)
_ALL = (
    _nvidia("a100-40gb", 40, 1.555, 600, _A100),
    _nvidia("a100-80gb", 80, 2.039, 600, _A100),
    _nvidia("a800", 80, 2.039, 400, _A100),
    _nvidia("h100", 80, 3.35, 900, _HOPPER),
    replace(_H200, bf16_flops=Rate(MEASURED_FLOPS, "measured"), copy_bytes=Rate(MEASURED_COPY, "measured")),
    _nvidia("b200", 180, 8.0, 1800, _BLACKWELL),
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _ALL}
