"""Each row of the launch table compiles ahead of time for its architecture, without spills."""

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmkernels._device import INTERPRETED
from mmkernels.contrastive import kernel
from mmkernels.contrastive.launch import TABLE, Launch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

CUOBJDUMP = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# bytes a block may use, from the CUDA C++ Programming Guide's table of technical specifications
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
KERNELS = {"fwd": kernel._contrastive_fwd_kernel, "bwd": kernel._contrastive_bwd_kernel}
FLAGS = {"fwd": {}, "bwd": {"HAS_GRAD": True, "HAS_DSCALE": True}}
ELEMENT = {2: ("bf16", "fp16"), 4: ("fp32",)}
OPERANDS = ("a_ptr", "b_ptr", "grad_ptr")
ROWS = [
    pytest.param(row, element, id=f"{row[0]}-{element}-sm_{row[2]}")
    for row in TABLE
    for element in ELEMENT[row[1]]
]


def compile_kernel(
    name: str, element: str, arch: int, config: Launch, precision: str = "ieee", odd: tuple[str, ...] = ()
) -> Any:
    """As the launcher would: inner strides of 1, and all but the `odd` sizes multiples of 16."""
    function = KERNELS[name]
    constants: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "INPUT_PRECISION": precision,
        "stride_ad": 1,
        "stride_bd": 1,
        **FLAGS[name],
    }
    signature, attributes = {}, {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            of_pointer = f"*{element}" if argument in OPERANDS else "*fp32"
            signature[argument] = of_pointer if argument.endswith("_ptr") else "i32"
            if argument not in odd:
                attributes[index,] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(function, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


@cache
def compiled_row(row: tuple[str, int, int], element: str) -> Any:
    return compile_kernel(row[0], element, row[2], TABLE[row])


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """What cuobjdump reports of the kernel: REG, STACK, LOCAL and the rest."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    dump = subprocess.run(
        [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
    )
    usage = [line for line in dump.stdout.splitlines() if "REG:" in line]
    assert len(usage) == 1, dump.stdout
    return {name: int(value) for name, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", usage[0])}


@pytest.mark.parametrize(("row", "element"), ROWS)
def test_a_row_of_the_launch_table_fits_its_architecture(
    row: tuple[str, int, int], element: str, tmp_path: Path
) -> None:
    odd_sizes = compile_kernel(row[0], element, row[2], TABLE[row], odd=("M", "N", "offset"))
    for compiled in (compiled_row(row, element), odd_sizes):
        usage = resources(compiled, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0
        assert compiled.metadata.shared <= SHARED_LIMIT[row[2]]


@pytest.mark.parametrize(("row", "element"), [param for param in ROWS if param.values[1] != "fp32"])
def test_low_precision_products_run_on_the_newest_tensor_core_instruction(
    row: tuple[str, int, int], element: str
) -> None:
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[row[2]]
    assert instruction in compiled_row(row, element).asm["ptx"]


@pytest.mark.parametrize(("row", "element"), [param for param in ROWS if param.values[1] == "fp32"])
def test_float32_products_are_exact_unless_tf32_was_asked_for(
    row: tuple[str, int, int], element: str
) -> None:
    exact = compiled_row(row, element).asm["ptx"]
    fast = compile_kernel(row[0], element, row[2], TABLE[row], precision="tf32").asm["ptx"]
    assert "fma.rn.f32" in exact
    assert "tf32" not in exact
    assert "tf32" in fast


def test_the_resource_reader_sees_a_spill(tmp_path: Path) -> None:
    """A tile far too large for its registers: the check above can fail."""
    compiled = compile_kernel("fwd", "fp32", 80, Launch(256, 256, 16, 4, 1), precision="tf32")
    usage = resources(compiled, tmp_path)
    assert usage["STACK"] + usage["LOCAL"] > 0
