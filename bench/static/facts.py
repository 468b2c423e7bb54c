"""What a row of a launch table compiles to, and what the cycle model makes of it: a dictionary of JSON."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.static.cases import Case
from bench.static.compiled import Row, compiled_row, machine_code, resources
from bench.static.model import CHIPS, LEVELS, Chip, Work, programs, seconds, share
from bench.static.sass import TENSOR_CORES, WAIT_LOOP, Instruction, Loop, Path, Program, counted
from mmkernels._launch import Launch
from mmkernels.multi_tensor.table import DIGIT_BITS, DTYPES

# Features of a logit where the prediction is made, and operands' rows and columns for its milliseconds.
WIDTHS = {"contrastive": 768, "sigmoid": 768, "token_contrastive": 256}
SIZES = {"contrastive": (32768, 32768), "sigmoid": (65536, 65536), "token_contrastive": (32768, 1024)}
# products of a tile of queries and keys, by the kernel
OF_KEYS = {"fwd": 2, "bwd_q": 3, "bwd_k": 4}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# layers without a mask: batch, heads, key heads, queries, keys, head dimension
LAYERS = {
    "Q-Former": (100, 12, 12, 32, 257, 64),
    "ViT-L/14": (256, 16, 16, 257, 257, 64),
    "Llama-3.2-Vision tower": (1, 16, 16, 6432, 6432, 80),
    "Llama 3": (4, 32, 8, 4096, 4096, 128),
}
ROW_WIDTHS = (64, 128, 256)
# by list, what an op does with its elements
LISTS = {
    "ema_update": "rw r w",
    "adamw_update": "rw r rw rw rw w w",
    "squares": "r",
    "clip": "rw",
    "fisher_accumulate": "rw r",
    "ewc_penalty_fwd": "r r r",
    "ewc_penalty_bwd": "r r r w",
    "apply_masks": "rw r",
}
# by op, kernel and whether a gradient is written: how often an element of a row passes through main memory
PASSES = {
    ("linear_cross_entropy", "fwd", True): 3,
    ("linear_cross_entropy", "fwd", False): 1,
    ("distill", "fwd", False): 2,
    ("distill", "bwd", False): 3,
}
# what only an epilogue has in it
EPILOGUE = ("mufu", "stg", "tma store")


@dataclass(frozen=True)
class Compiled:
    """A compiled row, as the functions below read it."""

    case: Case
    config: Launch
    element: str
    chip: Chip
    arch: int
    program: Program
    num_programs: int

    @property
    def family(self) -> str:
        return self.case.kernel.fn.__module__.split(".")[1]

    @property
    def threads(self) -> int:
        return 32 * self.config.num_warps

    @property
    def tile(self) -> int:
        return self.config.block_m * self.config.block_n

    def rate(self, product: str) -> float:
        """FLOP a clock."""
        if product == "FFMA":
            return self.chip.ffma
        return self.chip.mma_sync if product.startswith("HMMA") else self.chip.tensor

    def total_bytes(self, code: Iterable[Instruction]) -> int:
        return self.threads * sum(x.num_bytes for x in code)


def facts(row: Row) -> dict[str, Any]:
    case, key, element = row
    arch, config, binary = key[2], case.table[key], compiled_row(*row)
    usage, shared = resources(binary), int(binary.metadata.shared)
    chip, columns = CHIPS[arch], int(getattr(binary.metadata, "tmem_size", 0) or 0)
    num_programs, limit = programs(chip, usage["REG"], shared, config.num_warps, columns)
    compiled = Compiled(case, config, element, chip, arch, Program(machine_code(binary)), num_programs)
    loops = [_loop(compiled, loop) for loop in _chains(compiled)]
    return {
        "kernel": case.name,
        "row": key[0],
        "arch": arch,
        "element": element,
        "tile": [config.block_m, config.block_n, config.block_d],
        "warps": config.num_warps,
        "stages": config.num_stages,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": shared,
        "programs": num_programs,
        "programs_limit": limit,
        "instructions": len(compiled.program.instructions(compiled.program.blocks)),
        "loops": loops,
        "prediction": _prediction(compiled, loops),
    }


def _chains(compiled: Compiled) -> list[list[Loop]]:
    """Products' loops; of tiles of logits those together that run one after the other before the same epilogue."""
    program, found = compiled.program, []
    for loop in program.product_loops:
        is_tile = compiled.family in WIDTHS
        chain = next((x for x in found if is_tile and program.are_in_turn(loop, x[-1])), None)
        if chain is None:
            found.append([loop])
        else:
            chain.append(loop)
    return found


def _loop(compiled: Compiled, chain: list[Loop]) -> dict[str, Any]:
    """A product's loop, and what is run once for all of its turns.

    A loop over tiles that the compiler has joined with that over their products is known by what is not run in every
    turn: there the epilogue is.
    """
    program, loop = compiled.program, chain[-1]
    turns = [program.path(x) for x in chain]
    turn = turns[-1]
    has_epilogue = compiled.family in WIDTHS and any(turn.between[name] for name in EPILOGUE)
    once = program.path(loop.outer)
    body = program.instructions(loop.blocks)
    product, flops = _product([x for path in turns for x in path.most], compiled)
    epilogue = turn.between if has_epilogue else counted(once.most)
    return {
        "product": product,
        "flops": flops,
        "loads": _loads(body),
        "turn": _sorted(sum((counted(path.least) for path in turns), Counter())),
        "turn_most": sum(len(path.most) for path in turns),
        "is_fused": has_epilogue,
        "epilogue": _sorted(epilogue),
        "epilogue_least": epilogue.total() if has_epilogue else len(once.least),
        # of the shortest way, what follows the products: no column beyond the last, no positive, no loss too large
        "after_least": sum(x.address > max(y.address for y in body) for x in once.least),
        "stored_bytes": _stored(compiled, turn if has_epilogue else once),
    }


def _product(body: list[Instruction], compiled: Compiled) -> tuple[str, int]:
    """The instruction of most products, and FLOP of a program a turn; 0 where it does not show."""
    found = [x for x in body if x.root in TENSOR_CORES]
    if not found:
        return "FFMA", 2 * compiled.threads * sum(x.root == "FFMA" for x in body)
    names = [".".join(x.opcode.split(".")[:2]) for x in found]
    name, flops = max(set(names), key=names.count), 0
    for x in found:
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", x.opcode):
            m, n, k = map(int, shape.groups())
            flops += 2 * m * n * k * compiled.config.num_warps // 4
        elif shape := re.match(r"HMMA\.(16)(8)(16|8)\.", x.opcode):
            m, n, k = map(int, shape.groups())
            flops += 2 * m * n * k * compiled.config.num_warps
    return name, flops


def _loads(body: list[Instruction]) -> str:
    kinds = counted(body)
    names = {"tma load": "TMA", "cp.async": "cp.async", "ldg": "plain"}
    return " + ".join(names[kind] for kind in names if kinds[kind]) or "none"


def _stored(compiled: Compiled, path: Path) -> int:
    """Bytes of a tile that an epilogue stores; of bulk copies the tile is taken to be of the operands' dtype."""
    if counted(path.most)["tma store"]:
        return compiled.tile * BYTES[compiled.element]
    return compiled.total_bytes(x for x in path.most if x.kind == "stg")


def _prediction(compiled: Compiled, loops: list[dict[str, Any]]) -> dict[str, Any] | None:
    """By the loop that does most; None of a kernel whose kind the model does not know."""
    if compiled.family in WIDTHS and loops:
        return _of_tiles(compiled, min(loops, key=lambda x: sum(x["epilogue"].values())))
    if compiled.family == "attention" and loops:
        return _of_keys(compiled, max(loops, key=lambda x: x["flops"]))
    if compiled.family == "multi_tensor":
        return _of_chunks(compiled)
    if not loops and any(key[0] == compiled.family for key in PASSES):
        return _of_rows(compiled)
    return None


def _of_tiles(compiled: Compiled, loop: dict[str, Any]) -> dict[str, Any]:
    """Logits [M, N] of features, tile by tile."""
    config, width, size = compiled.config, WIDTHS[compiled.family], BYTES[compiled.element]
    turns = width / config.block_d
    one = 2 * compiled.tile * config.block_d
    # where its shape does not show, the teacher's is the second
    num_products = round(loop["flops"] / one) or 1 + bool(compiled.case.constants.get("HAS_TEACHER"))
    flops, operands = num_products * turns * one, num_products * (config.block_m + config.block_n) * width * size
    epilogue = sum(loop["epilogue"].values())
    work = Work(
        product=flops / compiled.rate(loop["product"]),
        l2_bytes=operands,
        memory_bytes=loop["stored_bytes"],
        beside=turns * sum(loop["turn"].values()),
        after=loop["epilogue_least"],
        mufu=loop["epilogue"].get("mufu", 0),
        hidden=None if loop["is_fused"] and "TMA" in loop["loads"] else "fill",
        is_fma=loop["product"] == "FFMA",
    )
    rows, cols = SIZES[compiled.family]
    tiles, chip = rows * cols / compiled.tile, compiled.chip
    found = _shares(compiled, work)
    least_s = tiles * work.product / chip.processors / chip.clock_hz
    return found | {
        "per_logit": epilogue * compiled.threads / compiled.tile,
        "bytes_per_flop": operands / flops,
        "shape": [rows, cols, width],
        "ms": [1e3 * least_s / s for s in found["share"]],
    }


def _of_keys(compiled: Compiled, loop: dict[str, Any]) -> dict[str, Any]:
    """Attention's turn: a tile of queries against one of keys, of which the loop loads the other side's."""
    config, size, row = compiled.config, BYTES[compiled.element], compiled.case.row
    pass_ = next(name for name in OF_KEYS if row.startswith(name))
    flops, rate = OF_KEYS[pass_] * 2 * compiled.tile * config.block_d, compiled.rate(loop["product"])
    loaded = config.block_m if pass_ == "bwd_k" else config.block_n
    operands, instructions = 2 * loaded * config.block_d * size, sum(loop["turn"].values())
    is_fma = loop["product"] == "FFMA"
    work = Work(
        product=max(flops, loop["flops"]) / rate,
        useful=flops / rate,
        l2_bytes=operands,
        beside=instructions if is_fma else 0,
        after=0 if is_fma else instructions,
        mufu=loop["turn"].get("mufu", 0),
        hidden="turn",
        is_fma=is_fma,
    )
    return _shares(compiled, work) | {
        "per_logit": instructions * compiled.threads / compiled.tile,
        "bytes_per_flop": operands / flops,
        "useful_flops": flops,
        "layers": _layers(compiled, pass_, work, Work(after=loop["epilogue_least"])),
    }


def _layers(compiled: Compiled, pass_: str, turn: Work, around: Work) -> dict[str, list[float]]:
    """Milliseconds of the kernel in the layers that its row serves, keys not cut among programs."""
    config, chip, found = compiled.config, compiled.chip, {}
    for name, (batch, heads, key_heads, queries, keys, width) in LAYERS.items():
        serving = next(x for x in ROW_WIDTHS if width <= x)
        if compiled.case.row != f"{pass_}_{serving}":
            continue
        tiles_m, tiles_n = -(-queries // config.block_m), -(-keys // config.block_n)
        turns, total = tiles_n, batch * heads * tiles_m
        if pass_ == "bwd_k":
            turns, total = tiles_m * heads // key_heads, batch * key_heads * tiles_n
        rest = (turns, total, chip)
        found[name] = [
            1e3 * seconds(turn, around, *rest, level, config.num_warps, compiled.num_programs) for level in LEVELS
        ]
    return found


def _of_chunks(compiled: Compiled) -> dict[str, Any]:
    """A chunk of a list of tensors, aligned, whole, and of the kind that moves most."""
    program, constants = compiled.program, compiled.case.constants
    wide = {
        address: sum(x.num_bytes for x in block.code if "128" in x.opcode) for address, block in program.blocks.items()
    }
    code = program.through(max(wide, key=lambda x: wide[x]))
    moved = max(bytes_of_kind(kind, LISTS[compiled.case.row]) for kind in constants["KINDS"])
    return _of_memory(compiled, code, constants["BLOCK"], moved)


def bytes_of_kind(kind: int, passes: str) -> int:
    digits = [kind >> DIGIT_BITS * i & 7 for i in range(len(passes.split()))]
    sizes = [0 if dtype is None else dtype.itemsize for dtype in map(DTYPES.__getitem__, digits)]
    return sum(size * len(access) for size, access in zip(sizes, passes.split(), strict=True))


def _of_rows(compiled: Compiled) -> dict[str, Any]:
    """A block of a row in all loops over it, or once where there is none."""
    program, case = compiled.program, compiled.case
    loops = [x for x in program.loops if x.outer is None and len(program.path(x).least) > WAIT_LOOP]
    code = [x for loop in loops for x in program.path(loop).least] or list(program.path(None).most)
    passes = PASSES[compiled.family, case.row, bool(case.constants.get("HAS_GRAD"))]
    return _of_memory(compiled, code, compiled.tile, passes * BYTES[compiled.element])


def _of_memory(compiled: Compiled, code: Sequence[Instruction], elements: int, moved: float) -> dict[str, Any]:
    """Elements of which so many bytes each pass through main memory."""
    # on their way to a processor they pass L2
    total, mufu = moved * elements, counted(code)["mufu"]
    work = Work(memory_bytes=total, l2_bytes=total, after=len(code), mufu=mufu, hidden="latency")
    return _shares(compiled, work) | {
        "per_element": len(code) * compiled.threads / elements,
        "bytes_per_element": moved,
    }


def _shares(compiled: Compiled, work: Work) -> dict[str, Any]:
    arguments = (compiled.config.num_warps, compiled.num_programs)
    found = [share(work, compiled.chip, level, *arguments) for level in LEVELS]
    return {"share": [x for x, _ in found], "limit": found[1][1]}


def _sorted(kinds: Any) -> dict[str, int]:
    return dict(sorted(kinds.items(), key=lambda x: (-x[1], x[0])))
