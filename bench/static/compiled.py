"""Rows of the launch tables compiled ahead of time, for an architecture that need not be here, and what the tools that
triton brings say of them."""

import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.static.cases import CASES, FLOATS, ODD, Case
from mmkernels._launch import Launch

TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
ELEMENT = {8: ("i64",), 2: ("bf16", "fp16"), 4: ("fp32",)}
Row = tuple[Case, tuple[str, int, int], str]
ROWS: list[Row] = [
    (case, row, element)
    for case in CASES
    for row in case.rows()
    for element in ELEMENT[row[1]]
    if element in case.elements
]


def row_id(case: Case, row: tuple[str, int, int], element: str) -> str:
    return f"{case.name}-{row[0]}-{element}-sm_{row[2]}"


def compile_kernel(
    case: Case, element: str, arch: int, config: Launch, precision: str = "ieee", is_odd: bool = False
) -> Any:
    """As the launcher would: inner strides of 1, and all sizes, unless they are odd, multiples of 16."""
    possible = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "INPUT_PRECISION": precision,
        **case.constants,
    }  # fmt: skip
    described = element in ("bf16", "fp16") and arch >= 90
    possible = {"EXACT": element == "fp32"} | possible
    possible |= {"DESCRIBED": described, "IN_HALVES": described and config.block_n == 256}
    constants = {name: value for name, value in possible.items() if name in case.kernel.arg_names}
    signature, attributes = {}, {}
    for index, argument in enumerate(case.kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = kind = case.type_of(argument, element, config, possible)
            if not kind.startswith("tensordesc") and argument not in FLOATS and not (is_odd and argument in ODD):
                attributes[index,] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


@cache
def compiled_row(case: Case, row: tuple[str, int, int], element: str) -> Any:
    return compile_kernel(case, element, row[2], case.table[row])


def resources(compiled: Any) -> dict[str, int]:
    """What cuobjdump reports of the kernel: REG, STACK, LOCAL and the rest."""
    usage = [line for line in _cuobjdump(compiled, "--dump-resource-usage").splitlines() if "REG:" in line]
    assert len(usage) == 1, usage
    return {name: int(value) for name, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", usage[0])}


def machine_code(compiled: Any) -> str:
    """What `bench.static.sass` reads."""
    return _cuobjdump(compiled, "-sass")


def _cuobjdump(compiled: Any, option: str) -> str:
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), option, str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def warnings(compiled: Any, arch: int) -> str:
    """What ptxas says of products that it has to wait for, as of C7515, one after the other; of those alone that run
    beside other work."""
    if not re.search("wgmma|tcgen05", compiled.asm["ptx"]):
        return ""
    name = TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(compiled.asm["ptx"])
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [str(name), "-v", target, str(file), "-o", str(file.with_suffix(".out"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
    return "\n".join(line for line in (said.stdout + said.stderr).splitlines() if re.search(r"C75\d\d", line))
