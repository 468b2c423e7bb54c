"""GPUs and what they reach: measured where that was done, else the vendor's sheet times the share that was reached on
the one that was measured."""

from dataclasses import dataclass, replace
from typing import Literal

Source = Literal["measured", "sheet", "scaled"]

# Of an H200: a bare product in bfloat16 and a copy, measured; beside them its sheet's.
MEASURED_FLOPS, SHEET_FLOPS = 790e12, 989e12
MEASURED_COPY, SHEET_COPY = 4.3e12, 4.8e12


@dataclass(frozen=True)
class Rate:
    """A rate per second and its source; "scaled" is the vendor's sheet times the measured share of an H200's sheet."""

    per_s: float
    source: Source


@dataclass(frozen=True)
class Gpu:
    """A device and its place in a cluster.

    Attributes:
        name: as on the command line.
        memory_bytes: of the sheet.
        bf16_flops: of matrix products.
        fp32_flops: of matrix products, without tensor cores: torch's default.
        copy_bytes: read and written in main memory.
        exps: exponentials.
        link_bytes: sent to others of its node, while as much is received.
        network_bytes: sent to other nodes.
        per_node: GPUs of a node.
        is_cpu: memory that is asked for counts when it is written, and ops run blockwise.
    """

    name: str
    memory_bytes: float
    bf16_flops: Rate
    fp32_flops: Rate
    copy_bytes: Rate
    exps: Rate
    link_bytes: Rate
    network_bytes: Rate
    per_node: int = 8
    is_cpu: bool = False

    def bytes_between(self, gpus: int) -> float:
        """Bytes a second that one of so many sends, while it receives as many: the slowest link of a ring."""
        return (self.link_bytes if gpus <= self.per_node else self.network_bytes).per_s


def _nvidia(
    name: str,
    *,
    memory_gb: float,
    bf16_tflops: float,
    fp32_tflops: float,
    memory_tb_per_s: float,
    nvlink_gb_per_s: float,
    network_gbit_per_s: float,
    exps: float,
) -> Gpu:
    """By the sheet, whose NVLink counts both directions."""
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


# Exponentials: 16 a clock and multiprocessor (CUDA C++ Programming Guide, arithmetic instructions), at boost clock.
_AMPERE_EXPS, _HOPPER_EXPS, _BLACKWELL_EXPS = 16 * 108 * 1.41e9, 16 * 132 * 1.98e9, 16 * 148 * 1.98e9
# A node's network: an adapter a GPU, of 200 Gbit/s (DGX A100) or 400 Gbit/s (DGX H100, H200, B200).
_A100 = {"bf16_tflops": 312, "fp32_tflops": 19.5, "network_gbit_per_s": 200, "exps": _AMPERE_EXPS}
_HOPPER = {"bf16_tflops": 989, "fp32_tflops": 67, "network_gbit_per_s": 400, "exps": _HOPPER_EXPS}
_BLACKWELL = {"bf16_tflops": 2250, "fp32_tflops": 75, "network_gbit_per_s": 400, "exps": _BLACKWELL_EXPS}
_H200 = replace(
    _nvidia("h200", memory_gb=141, memory_tb_per_s=4.8, nvlink_gb_per_s=900, **_HOPPER),
    bf16_flops=Rate(MEASURED_FLOPS, "measured"),
    copy_bytes=Rate(MEASURED_COPY, "measured"),
)

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _nvidia("a100-40gb", memory_gb=40, memory_tb_per_s=1.555, nvlink_gb_per_s=600, **_A100),
        _nvidia("a100-80gb", memory_gb=80, memory_tb_per_s=2.039, nvlink_gb_per_s=600, **_A100),
        _nvidia("a800", memory_gb=80, memory_tb_per_s=2.039, nvlink_gb_per_s=400, **_A100),
        _nvidia("h100", memory_gb=80, memory_tb_per_s=3.35, nvlink_gb_per_s=900, **_HOPPER),
        _H200,
        _nvidia("b200", memory_gb=180, memory_tb_per_s=8.0, nvlink_gb_per_s=1800, **_BLACKWELL),
    )
}
