"""What is read of machine code and predicted from it: loops and paths of a dump, the model's arithmetic, and the
committed JSON, which the compiler that wrote it gives again."""

# triton types the strides of a descriptor as tensors
# pyright: reportArgumentType=false

import json
from typing import Any

import pytest
import triton
import triton.language as tl

from bench import __main__ as command
from bench.report import static as tables
from bench.static.__main__ import ELEMENTS, path_of, rounded
from bench.static.cases import Case
from bench.static.compiled import ROWS, Row, row_id
from bench.static.facts import SIZES, WIDTHS, bytes_of_kind, facts
from bench.static.model import CHIPS, Work, cycles, programs, seconds, share
from bench.static.sass import Program, counted
from mmkernels._device import INTERPRETED
from mmkernels._launch import Launch

# of a kernel whose loop over tiles the compiler joined with that over products: a wait that is out of line, an epilogue
# that is branched around in most turns, and the trap behind the end
DUMP = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000e700000000800 */
        /*0010*/              @!P0 EXIT ;                                        /* 0x000000000000094d */
        /*0020*/               @P1 BRA 0x40 ;                                    /* 0x0000000000180947 */
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;                       /* 0x0000000102027810 */
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R10 ; /* 0x02c0000aff0075a7 */
        /*0050*/              @!P0 BRA 0x110 ;                                   /* 0x0000004400348947 */
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x03e00000081879f0 */
        /*0070*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ; /* 0x03e00000081879f0 */
        /*0080*/               @UP2 UTMALDG.2D [UR12], [UR20] ;                  /* 0x0000000c140025b4 */
        /*0090*/               @P0 BRA 0xe0 ;                                    /* 0x0000003c00a80947 */
        /*00a0*/                   MUFU.EX2 R4, R24 ;                            /* 0x0000001800047308 */
        /*00b0*/                   FMUL R5, R4, R4 ;                             /* 0x0000000404057220 */
        /*00c0*/                   STG.E.128 desc[UR4][R2.64], R4 ;              /* 0x0000000402007986 */
        /*00d0*/                   NOP ;                                         /* 0x0000000000007918 */
        /*00e0*/               @P2 BRA 0x20 ;                                    /* 0xffffffb400e00947 */
        /*00f0*/               @P3 STG.E.64 desc[UR4][R2.64], R4 ;               /* 0x0000000402007986 */
        /*0100*/                   EXIT ;                                        /* 0x000000000000794d */
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R10 ; /* 0x02c0000aff0075a7 */
        /*0120*/              @!P0 BRA 0x110 ;                                   /* 0xfffffffc00f88947 */
        /*0130*/                   BRA 0x60 ;                                    /* 0xffffffb800c07947 */
        /*0140*/                   BRA 0x140;                                    /* 0xfffffffc00fc7947 */
"""
TABLE = """
        /*0000*/                   BRX R2 -0x10 (*"INDIRECT"*) ;                 /* 0x0000000000007949 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;              /* 0x0000000402047981 */
        /*0020*/                   EXIT ;                                        /* 0x000000000000794d */
        /*0030*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;              /* 0x0000000402047981 */
        /*0040*/                   IADD3 R2, R2, 0x1, RZ ;                       /* 0x0000000102027810 */
        /*0050*/                   EXIT ;                                        /* 0x000000000000794d */
        /*0060*/                   BRA 0x60;                                     /* 0xfffffffc00fc7947 */
        /*0070*/                   NOP ;                                         /* 0x0000000000007918 */
"""


def test_a_joined_loop_is_read_with_its_turn_and_its_epilogue() -> None:
    program = Program(DUMP)
    (loop,) = program.product_loops
    assert (loop.head, loop.latches, loop.outer) == (0x20, {0xE0}, None)
    # the wait is a loop of its own, and of no path
    assert {x.head for x in program.loops} == {0x20, 0x110}
    turn = program.path(loop)
    assert counted(turn.least) == {"product": 2, "tma load": 1, "barrier": 1, "branch": 4}
    # what only some turns run: an addition before, and the epilogue, in which NOP is nothing
    assert turn.between == {"integer": 1, "mufu": 1, "fmul": 1, "stg": 1, "branch": 1}
    # once: what the loop is not
    once = program.path(None)
    assert counted(once.most) == {"integer": 1, "branch": 2, "stg": 1}
    assert counted(once.least) == counted(once.most)
    assert [x.num_bytes for x in once.most] == [0, 0, 8, 0]


def test_a_jump_by_a_table_goes_to_each_of_its_blocks() -> None:
    program = Program(TABLE)
    assert program.blocks[0].after == (0x10, 0x30)
    assert [x.opcode for x in program.through(0x10)] == ["BRX", "LDG.E.128", "EXIT"]
    assert [x.num_bytes for x in program.through(0x30)] == [0, 2, 0, 0]


def test_a_nested_loop_is_not_counted_in_the_one_around_it() -> None:
    lines = [
        "IADD3 R1, R1, 0x1, RZ", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA 0x10", "MUFU.EX2 R4, R4",
        "LDS R5, [R2]", "@P2 BRA 0x40", "@P1 BRA 0x0", "EXIT",
    ]  # fmt: skip
    program = Program("\n".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(lines)))
    (product,) = program.product_loops
    assert product.head == 0x10 and product.outer is not None and product.outer.head == 0
    # a loop that multiplies nothing is one turn
    assert counted(program.path(product.outer).most) == {"integer": 1, "mufu": 1, "lds": 1, "branch": 2}


def test_the_model_is_right_on_a_case_by_hand() -> None:
    # sm_90, 128 x 256 x 768: 2 * 128 * 256 * 768 / 4096 = 12,288 cycles of products at the peak
    chip, work = CHIPS[90], Work(product=12288, l2_bytes=589824, memory_bytes=65536, beside=960, after=1300, mufu=128)
    found = cycles(work, chip, "mid", warps=8, num_programs=1)
    assert found["products"] == pytest.approx(12288 / 0.9)
    assert found["L2"] == pytest.approx(589824 / 34)
    assert found["main memory"] == pytest.approx(65536 / (21.4 * 0.92))
    # two warps a scheduler, which takes .65 of its slots
    assert found["issue"] == pytest.approx(2260 * 2 / 0.65)
    # 32 threads by 4 a clock
    assert found["special functions"] == 128 * 2 * 8
    assert found["a program alone"] == pytest.approx(589824 / 34 + 1300 * 2 / 0.65 + 1200)
    assert share(work, chip, "mid", 8, 1) == (
        pytest.approx(12288 / (17347.8 + 4000 + 1200), abs=1e-4),
        "a program alone",
    )
    # with a second program beside it one's epilogue is under the other's loads
    assert share(work, chip, "mid", 8, 2) == (pytest.approx(12288 / 17347.8, abs=1e-4), "L2")
    # products that a formula does not ask for take their time and count for nothing
    twice = Work(product=2 * 12288, useful=12288)
    assert share(twice, chip, "high", 8, 4) == (pytest.approx(0.45), "products")
    assert share(Work(memory_bytes=1e6), chip, "low", 8, 8)[0] == pytest.approx(0.92)


@triton.jit
def _joined_kernel(a_ptr, b_ptr, out_ptr, M, N, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """exp2(a b^T) of tiles that programs share out, by descriptors, its loops joined by the compiler."""
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, D], [D, 1], [BLOCK_M, BLOCK_D])
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, D], [D, 1], [BLOCK_N, BLOCK_D])
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=True):
        first_m, first_n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            acc = tl.dot(a_desc.load([first_m, d]), b_desc.load([first_n, d]).T, acc)
        out_desc.store([first_m, first_n], tl.exp2(acc).to(tl.bfloat16))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_kernel_of_joined_loops_and_descriptors_is_predicted_by_its_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WIDTHS, "test_bench_static", 768)
    monkeypatch.setitem(SIZES, "test_bench_static", (32768, 32768))
    table = {("fwd", 2, 90): Launch(128, 128, 64, 8, 3)}
    found = facts((Case("joined", _joined_kernel, "fwd", table, {}, {"out": "*bf16"}), ("fwd", 2, 90), "bf16"))
    (loop,) = found["loops"]
    assert loop["is_fused"] and loop["loads"] == "TMA" and loop["product"] == "HGMMA.64x128x16"
    assert loop["flops"] == 2 * 128 * 128 * 64
    # a thread has 64 of the tile's logits
    # and the division that finds a tile is one more
    assert loop["epilogue"]["mufu"] == 65 and 64 < loop["epilogue_least"] < 600
    assert loop["stored_bytes"] == 2 * 128 * 128
    assert 0.2 < found["prediction"]["share"][0] < found["prediction"]["share"][2] < 1


def test_a_layer_takes_rounds_of_programs_by_hand() -> None:
    # a turn: 450 + 300 cycles beside 100 x 2 / .65 of instructions; around it 65 x 2 / .65 + 1,200
    turn, around, chip = Work(product=405, after=100, hidden="turn"), Work(after=65), CHIPS[90]
    alone = 4 * (450 + 200 / 0.65 + 300) + 200 + 1200
    # 265 programs, one a processor: a third round of one
    found = seconds(turn, around, 4, 265, chip, "mid", 8, 1)
    assert found == pytest.approx(3 * alone / chip.clock_hz)
    # two a processor share its tensor cores and overlap all else
    found = seconds(turn, around, 4, 265, chip, "mid", 8, 2)
    assert found == pytest.approx(2 * max(alone, 2 * 4 * 450) / chip.clock_hz)


def test_programs_of_a_processor_are_what_registers_and_memory_hold() -> None:
    # 255 registers are given as 256: 8 warps of 8,192; 140 as 144, of 4,608 a warp
    assert programs(CHIPS[90], 255, 65536, 8) == (1, "registers")
    assert programs(CHIPS[90], 140, 65536, 4) == (3, "registers")
    assert programs(CHIPS[90], 32, 0, 8) == (8, "warps")
    assert programs(CHIPS[80], 64, 80 << 10, 4) == (2, "shared memory")
    assert programs(CHIPS[100], 64, 1024, 4, columns=256) == (2, "tensor memory")


def test_bytes_of_a_chunk_are_those_of_its_lists() -> None:
    # float32 moved and read, its bfloat16 copy written: 4 + 4 + 4 + 2; a bool mask beside float32 read and written
    assert bytes_of_kind(0o311, "rw r w") == 14
    assert bytes_of_kind(0o41, "rw r") == 9
    assert bytes_of_kind(0o11, "rw r w") == 12


@pytest.fixture(scope="module")
def documents() -> dict[int, dict[str, Any]]:
    return {arch: tables.load(path_of(arch)) for arch in CHIPS}


def _found(documents: dict[int, dict[str, Any]], row: Row) -> dict[str, Any]:
    case, (name, _, arch), element = row
    key = (case.name, name, element)
    return next(x for x in documents[arch]["rows"] if (x["kernel"], x["row"], x["element"]) == key)


def test_the_committed_rows_are_those_of_the_launch_tables(documents: dict[int, dict[str, Any]]) -> None:
    """Compiling nothing: what `make static` has to write anew is seen by its launch."""
    rows = [row for row in ROWS if row[2] in ELEMENTS]
    assert sum(len(document["rows"]) for document in documents.values()) == len(rows)
    for row in rows:
        case, key, _ = row
        config, found = case.table[key], _found(documents, row)
        launch = [*found["tile"], found["warps"], found["stages"]]
        expected = [config.block_m, config.block_n, config.block_d, config.num_warps, config.num_stages]
        assert launch == expected, f"{row_id(*row)}: make static"
        assert not found["stack"]


# instructions a thread behind the products of a tile of 128 x 256 by 8 warps, at most
EPILOGUES = {
    ("contrastive-DIAGONAL=True", "fwd"): 1300,
    ("contrastive-DIAGONAL=True", "bwd"): 900,
    ("sigmoid", "fwd"): 1600,
}


@pytest.mark.parametrize("name", EPILOGUES, ids=str)
def test_an_epilogue_is_as_short_as_it_was_made(name: tuple[str, str], documents: dict[int, dict[str, Any]]) -> None:
    row = next(x for x in documents[90]["rows"] if (x["kernel"], x["row"], x["element"]) == (*name, "bf16"))
    assert row["tile"] == [128, 256, 64] and row["warps"] == 8 and row["stack"] == 0
    assert [x["after_least"] <= EPILOGUES[name] for x in row["loops"]] == [True], row["loops"]


def test_products_of_tiles_are_as_many_as_the_formula_has(documents: dict[int, dict[str, Any]]) -> None:
    """Else the dump is misread, or the compiler multiplies in vain."""
    for document in (documents[80], documents[90]):
        for row in document["rows"]:
            if row["kernel"].startswith(("contrastive", "sigmoid", "token")) and row["loops"]:
                m, n, d = row["tile"]
                num_products = 1 + row["row"].endswith("teacher")
                assert [x["flops"] / (2 * m * n * d) for x in row["loops"]] == [num_products] * len(row["loops"])


# one of each kind that the model knows, and an architecture
CHECKED = [
    row
    for row in ROWS
    if row_id(*row).startswith(("contrastive-fwd-bf16", "contrastive-bwd-fp32-sm_80", "sigmoid-fwd-bf16-sm_100",
                                "attention-fwd_64-bf16", "distill[HAS_CENTER=True]-fwd-bf16-sm_90",
                                "squares-squares", "linear_cross_entropy[gradient]-fwd-bf16-sm_90"))
]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row_id(*row))
def test_the_compiler_gives_the_committed_facts_again(row: Row, documents: dict[int, dict[str, Any]]) -> None:
    wrote = documents[row[1][2]]["triton"]
    if triton.__version__ != wrote:
        pytest.skip(f"triton {wrote} wrote the JSON, this is {triton.__version__}")
    # through JSON, which has no tuples
    assert json.loads(json.dumps(rounded(facts(row)))) == _found(documents, row), "make static"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_command_prints_rows_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["static", "--arch", "90", "--only", "squares"]) == 0
    said = capsys.readouterr().out
    assert "**Predicted, not measured**: sm_90 (H200)" in said
    assert said.count("\n| squares |") == 1
    with pytest.raises(SystemExit):
        command.main(["static", "--json", "--only", "squares"])


def test_a_file_that_is_none_of_ours_is_refused(tmp_path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "none.json"):
        with pytest.raises(ValueError, match="bench tables: FILE must be what `bench static` writes, got"):
            tables.load(tmp_path / name)
