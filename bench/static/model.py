"""A cycle model of a GPU's processor: what a kernel's machine code would reach of the roofline. It predicts, and no run
has confirmed it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

LEVELS = ("low", "mid", "high")


@dataclass(frozen=True)
class Chip:
    """Rates of a processor (SM) a clock, but for `clock_hz` and the number of `processors`.

    Attributes:
        tensor: FLOP of dense bfloat16 products by the architecture's own instruction.
        mma_sync: the same by mma.sync.
        ffma: FLOP of float32 without tensor cores.
        memory: bytes of main memory, at its stated peak.
        l2: bytes that L2 gives one processor while all of them ask, low to high.
        columns: of tensor memory.
    """

    name: str
    processors: int
    clock_hz: float
    tensor: float
    mma_sync: float
    ffma: float
    memory: float
    l2: tuple[float, float, float]
    shared_bytes: int
    columns: int = 0


# Processors, rates a clock and peaks of main memory are of the makers' data sheets; the clock is one that products keep
# up, mma.sync's share on sm_90 (0.62) is of published microbenchmarks; L2 and sm_100's mma.sync are assumed.
CHIPS: Mapping[int, Chip] = {
    80: Chip("A100", 108, 1.35e9, 2048, 2048, 128, 14.0, (22, 28, 36), 164 << 10),
    90: Chip("H200", 132, 1.70e9, 4096, 2540, 256, 21.4, (28, 34, 45), 228 << 10),
    100: Chip("B200", 148, 1.80e9, 8192, 2048, 256, 30.0, (30, 38, 50), 228 << 10, 512),
}


@dataclass(frozen=True)
class Level:
    """How well things go: shares of issue slots that instructions fill, and cycles that nothing hides.

    Attributes:
        issue: of straight code, whose instructions wait for one another.
        loop_issue: of a product's loop without tensor cores, which is unrolled for it.
        fill: cycles from the first load of a tile to its first product, and of its last stores.
        turn: cycles of barriers and waits in a turn of attention's loop.
        latency: cycles from a load of main memory to its value, under load.
    """

    issue: float
    loop_issue: float
    fill: float
    turn: float
    latency: float


ASSUMED: Mapping[str, Level] = {
    "low": Level(0.50, 0.75, 1600, 500, 1200),
    "mid": Level(0.65, 0.85, 1200, 300, 900),
    "high": Level(0.80, 0.92, 850, 200, 700),
}
# Of their peaks, what products and copies reach in the best case.
TENSOR_SHARE, MEMORY_SHARE = 0.90, 0.92
# Threads' functions (exp2, reciprocal, ...) of a scheduler a clock, of which a processor has four.
MUFU_RATE, SCHEDULERS, WARP = 4, 4, 32
REGISTERS, MOST_WARPS, RESERVED_BYTES = 65536, 64, 1024


@dataclass(frozen=True)
class Work:
    """What a program does in a turn: a tile of logits, a tile of keys or a chunk.

    Attributes:
        product: cycles of the products at the peak rate, all that are run.
        useful: cycles of those that the formula asks for; None: all.
        l2_bytes: of operands.
        memory_bytes: that pass through main memory.
        beside: instructions of a thread beside the products, while they run.
        after: instructions of a thread for which the products' results are needed.
        mufu: of those, how many are special functions.
        hidden: "fill", "turn", "latency" or, where the next tile's loads are under way, None: what is waited for.
        is_fma: whether the instructions beside are the products.
    """

    product: float = 0.0
    useful: float | None = None
    l2_bytes: float = 0.0
    memory_bytes: float = 0.0
    beside: float = 0.0
    after: float = 0.0
    mufu: float = 0.0
    hidden: str | None = "fill"
    is_fma: bool = False


def programs(chip: Chip, registers: int, shared_bytes: int, warps: int, columns: int = 0) -> tuple[int, str]:
    """Programs that a processor holds at a time, and what there is no more of."""
    # registers are given to a warp by 256
    of_warp = -(-registers * WARP // 256) * 256
    fitting = {
        "warps": MOST_WARPS // warps,
        "registers": REGISTERS // of_warp // warps,
        "shared memory": chip.shared_bytes // (shared_bytes + RESERVED_BYTES),
    }
    if columns and chip.columns:
        fitting["tensor memory"] = chip.columns // columns
    name = min(fitting, key=lambda x: fitting[x])
    return fitting[name], name


def cycles(work: Work, chip: Chip, level: str, warps: int, num_programs: int) -> dict[str, float]:
    """Cycles of a processor a turn, by what asks for them; the largest is the prediction.

    Everything but "a program alone" overlaps, that of one program with the others' too.
    """
    assumed, slots = ASSUMED[level], warps / SCHEDULERS
    beside = work.beside * slots / (assumed.loop_issue if work.is_fma else assumed.issue)
    after = work.after * slots / assumed.issue
    mufu = work.mufu * slots * WARP / MUFU_RATE
    product = 0.0 if work.is_fma else work.product / TENSOR_SHARE
    l2 = work.l2_bytes / chip.l2[LEVELS.index(level)]
    waited = getattr(assumed, work.hidden) if work.hidden else 0.0
    alone = max(product, l2, beside) + max(after, mufu) + waited
    return {
        "products": product,
        "L2": l2,
        "main memory": work.memory_bytes / (chip.memory * MEMORY_SHARE),
        "issue": beside + after,
        "special functions": mufu,
        "a program alone": alone / num_programs,
    }


def share(work: Work, chip: Chip, level: str, warps: int, num_programs: int) -> tuple[float, str]:
    """Of the roofline, useful products at their peak or else main memory at its, and what limits it."""
    found = cycles(work, chip, level, warps, num_programs)
    limit = max(found, key=found.__getitem__)
    least = (work.product if work.useful is None else work.useful) or work.memory_bytes / chip.memory
    return least / found[limit], limit


def seconds(turn: Work, around: Work, turns: int, total: int, chip: Chip, level: str, warps: int, held: int) -> float:
    """Of so many programs in all, which take turns and what is around them; a processor holds some at a time, and the
    last round takes as long as the others."""
    of_turn, of_rest = (cycles(work, chip, level, warps, 1) for work in (turn, around))
    asked = {name: turns * of_turn[name] + of_rest[name] for name in of_turn}
    alone = asked.pop("a program alone")
    return math.ceil(total / (chip.processors * held)) * max(alone, held * max(asked.values())) / chip.clock_hz
