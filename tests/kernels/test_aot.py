"""Each row of the launch table compiles ahead of time for its architecture, without spills, under the version of triton
that is installed and, where its wheel lies unpacked beside, under the oldest that is promised."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from bench.static.cases import MULTI_TENSOR, TOKENS_TABLE, Case, attention_case, contrastive_case, token_case
from bench.static.compiled import ELEMENT, ROWS, Row, compile_kernel, compiled_row, resources, row_id, warnings
from mmkernels._device import INTERPRETED
from mmkernels._launch import Launch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

OLDEST = Path(sys.prefix) / "triton-3.6"  # by `make test`
# bytes a block may use, from the CUDA C++ Programming Guide's table of technical specifications
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# of a processor, a block's own KiB of shared memory among it
REGISTERS, SHARED_OF_PROCESSOR = 65_536, {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


def params(rows: list[Row]) -> list[Any]:
    return [pytest.param(*row, id=row_id(*row)) for row in rows]


HALF = [row for row in ROWS if row[2] != "fp32" and row[0].products]
FULL = [row for row in ROWS if row[2] == "fp32" and row[0].products]


@pytest.mark.parametrize(("case", "row", "element"), params(ROWS))
def test_a_row_of_the_launch_table_fits_its_architecture(case: Case, row: tuple[str, int, int], element: str) -> None:
    found = [compiled_row(case, row, element)]
    if case.is_odd:
        found.append(compile_kernel(case, element, row[2], case.table[row], is_odd=True))
    for compiled in found:
        usage = resources(compiled)
        assert usage["STACK"] == usage["LOCAL"] == 0
        assert compiled.metadata.shared <= SHARED_LIMIT[row[2]]
        assert not warnings(compiled, row[2])


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not OLDEST.is_dir(), reason="triton 3.6 is not unpacked beside: make test does it")
@pytest.mark.skipif(triton.__version__.startswith("3.6"), reason="this is triton 3.6")
def test_the_launch_tables_fit_under_the_oldest_triton_that_is_promised() -> None:
    places = os.pathsep.join([str(OLDEST), os.environ.get("PYTHONPATH", "")])
    chosen = "(fits_its_architecture and not fp16) or by_16_bytes"  # fp16 takes bf16's registers and shared memory
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize(("case", "row", "element"), params(HALF))
def test_low_precision_products_run_on_the_newest_tensor_core_instruction(
    case: Case, row: tuple[str, int, int], element: str
) -> None:
    # the newer ones take 64 rows: where that many spill, as in gradients of 256 per head, the old one it is
    is_wide = getattr(case.table[row], case.product_rows) >= 64
    newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[row[2]]
    instruction = newest if is_wide else "mma.sync"
    assert instruction in compiled_row(case, row, element).asm["ptx"]


@pytest.mark.parametrize(("case", "row", "element"), params(FULL))
def test_float32_products_are_exact_unless_tf32_was_asked_for(
    case: Case, row: tuple[str, int, int], element: str
) -> None:
    exact = compiled_row(case, row, element).asm["ptx"]
    fast = compile_kernel(case, element, row[2], case.table[row], precision="tf32").asm["ptx"]
    assert "fma.rn.f32" in exact
    assert "tf32" not in exact
    assert "tf32" in fast


@pytest.mark.parametrize(("case", "row", "element"), params([x for x in HALF if "_few" in x[0].row]))
def test_few_queries_leave_a_processor_room_for_two_programs(
    case: Case, row: tuple[str, int, int], element: str
) -> None:
    compiled = compiled_row(case, row, element)
    registers = resources(compiled)["REG"] * 32 * case.table[row].num_warps
    assert 2 * registers <= REGISTERS and 2 * (compiled.metadata.shared + 1024) <= SHARED_OF_PROCESSOR[row[2]]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_ends_of_queries_are_in_no_pipeline(arch: int) -> None:
    """Each would be copied for every tile, in registers that the products need."""
    case = attention_case("bwd_k", 64)
    row = case.row, 2, arch
    compiled = compile_kernel(case, "bf16", arch, replace(case.table[row], num_stages=2))
    copied = re.findall(r"async_copy_global_to_local .*tensor<(\w+)x!tt.ptr<(\w+)>", compiled.asm["ttgir"])
    assert copied and not [shape for shape, kind in copied if kind == "i32" and shape != "1"]


@pytest.mark.parametrize("row", [row for row in TOKENS_TABLE if row[0] == "fwd"])
def test_a_maximum_over_tokens_is_not_a_number_where_one_of_them_is_not(row: tuple[str, int, int]) -> None:
    """The interpreter takes another way to it."""
    case = token_case("fwd", 32, is_whole=True, is_single=True)
    assert "max.NaN.f32" in compiled_row(case, row, ELEMENT[row[1]][0]).asm["ptx"]


@pytest.mark.parametrize("case", MULTI_TENSOR, ids=lambda case: case.name)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_whole_chunks_are_read_and_written_by_16_bytes(case: Case, arch: int) -> None:
    ptx = compiled_row(case, (case.row, 8, arch), "i64").asm["ptx"]
    assert ptx.count("ld.global.v4") >= 2 * len(case.constants["KINDS"])
    # a sum is one number a chunk
    assert "st.global.v4" in ptx or "sums_ptr" in case.kernel.arg_names


def test_the_resource_reader_sees_a_spill() -> None:
    """A tile far too large for its registers: the check above can fail."""
    large = contrastive_case("fwd")
    compiled = compile_kernel(large, "bf16", 80, Launch(256, 256, 16, 4, 1))
    usage = resources(compiled)
    assert usage["STACK"] + usage["LOCAL"] > 0
