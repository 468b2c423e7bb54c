"""Machine code, as `cuobjdump -sass` prints it, as loops and the paths through them.

A path is what one thread runs. Where code branches, two paths say what it costs: the one of the fewest and the one of
the most instructions. A loop that another holds adds nothing to the outer one's paths if it multiplies matrices or only
waits, else one turn.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:\{\s*)?(.*?)\s*;", re.MULTILINE)
GUARD = re.compile(r"^@!?U?P\w+\s+")
TARGET = re.compile(r"(?:^|[\s,(])(0x[0-9a-f]+)\)?$")
CLASSES = {
    "product": "HGMMA HMMA UTCHMMA UTCQMMA QGMMA QMMA IMMA DMMA",
    "ffma": "FFMA FFMA2",
    "fmul": "FMUL FMUL2",
    "fadd": "FADD FADD2",
    "minmax": "FMNMX FMNMX3",
    "compare": "FSETP FSEL FSET FCHK",
    "mufu": "MUFU",
    "double": "DADD DMUL DFMA DSETP",
    "convert": "F2F F2FP F2I I2F I2FP F2IP HADD2 HFMA2 HMUL2 HSETP2",
    "shuffle": "SHFL REDUX VOTE MATCH",
    "lds": "LDS LDSM",
    "sts": "STS STSM",
    "tensor memory": "LDTM STTM",
    "cp.async": "LDGSTS",
    "tma load": "UTMALDG UBLKCP",
    "tma store": "UTMASTG UTMAREDG",
    "ldg": "LDG LD",
    "stg": "STG ST RED REDG ATOM ATOMG",
    "local": "LDL STL",
    "barrier": "BAR SYNCS WARPSYNC UTCBAR",
    "wait": "LDGDEPBAR DEPBAR WARPGROUP FENCE MEMBAR UTMACMDFLUSH UTMACCTL CCTL ERRBAR ARRIVES",
    "branch": "BRA BSSY BSYNC CALL RET EXIT BREAK BRX JMP",
}  # fmt: skip
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# integers, addresses, predicates and moves, of a thread or of a warp
INTEGER = "integer"
TENSOR_CORES = tuple(CLASSES["product"].split())
# fused multiply-adds of a loop that makes up a product without tensor cores
MANY_FFMA = 64
# instructions of a loop that only waits for a barrier
WAIT_LOOP = 8


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @cached_property
    def bare(self) -> str:
        """Without its predicate."""
        return GUARD.sub("", self.text)

    @property
    def opcode(self) -> str:
        return self.bare.split()[0].rstrip(",")

    @property
    def root(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        return CLASS_OF.get(self.root, INTEGER)

    @property
    def num_bytes(self) -> int:
        """Read from or written to global memory by a thread; of a bulk copy none, its size is in its descriptor."""
        if self.kind not in ("ldg", "stg", "cp.async"):
            return 0
        widths = [_WIDTHS[word] for word in self.opcode.split(".") if word in _WIDTHS]
        return max(widths, default=4)

    @property
    def target(self) -> int | None:
        found = TARGET.search(self.bare)
        return int(found[1], 16) if found else None

    @property
    def always_leaves(self) -> bool:
        """A branch or an end that no predicate guards."""
        operands = self.bare.removeprefix(self.opcode).strip()
        is_plain = self.root != "BRA" or re.fullmatch(r"0x[0-9a-f]+", operands) is not None
        return self.bare == self.text and is_plain and self.root in ("BRA", "EXIT", "RET", "BRX")


@dataclass
class Block:
    """Instructions that are run one after the other, and the addresses where it goes on."""

    code: list[Instruction]
    after: tuple[int, ...] = ()

    @property
    def address(self) -> int:
        return self.code[0].address

    @cached_property
    def issued(self) -> tuple[Instruction, ...]:
        return tuple(x for x in self.code if x.root != "NOP")


@dataclass(frozen=True)
class Path:
    """The ways through some code of the fewest and of the most instructions."""

    least: tuple[Instruction, ...] = ()
    most: tuple[Instruction, ...] = ()

    @property
    def between(self) -> Counter[str]:
        """What is not run every time, by class."""
        return counted(self.most) - counted(self.least)


def counted(code: Iterable[Instruction]) -> Counter[str]:
    return Counter(x.kind for x in code)


@dataclass
class Loop:
    """A natural loop: the addresses of its first block, of those that jump back to it, and of all of its blocks."""

    head: int
    latches: set[int]
    blocks: set[int]
    outer: "Loop | None" = None


class Program:
    """A kernel's machine code."""

    def __init__(self, dump: str) -> None:
        self.code = [Instruction(int(address, 16), text) for address, text in LINE.findall(dump)]
        self.blocks = {block.address: block for block in _blocks(self.code)}
        self.loops = _loops(self.blocks, self.code[0].address)

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [x for address in sorted(blocks) for x in self.blocks[address].issued]

    @cached_property
    def product_loops(self) -> list[Loop]:
        """The innermost ones that multiply matrices."""
        has_tensor_cores = any(x.root in TENSOR_CORES for x in self.code)
        found = [loop for loop in self.loops if self._multiplies(loop, has_tensor_cores)]
        return [loop for loop in found if not any(other.outer is loop for other in found)]

    def _multiplies(self, loop: Loop, has_tensor_cores: bool) -> bool:
        body = self.instructions(loop.blocks)
        if has_tensor_cores:
            return any(x.root in TENSOR_CORES for x in body)
        return sum(x.kind == "ffma" for x in body) >= MANY_FFMA

    def path(self, within: Loop | None) -> Path:
        """Through a turn of a loop, or from the kernel's entry to its end."""
        edges, costs = self._graph(within)
        if within is None:
            return _extremes(self.code[0].address, {n for n in costs if not edges[n]}, edges, costs)
        return _extremes(within.head, {self._node(x, within) for x in within.latches}, edges, costs)

    def through(self, address: int) -> tuple[Instruction, ...]:
        """The shortest way from the kernel's entry to its end by a block."""
        edges, costs = self._graph(None)
        node = self._node(address, None)
        to = _extremes(self.code[0].address, {node}, {**edges, node: set()}, costs).least
        return to + _extremes(node, {n for n in costs if not edges[n]}, edges, costs | {node: Path()}).least

    def are_in_turn(self, one: Loop, other: Loop) -> bool:
        """Whether a turn of the loop that holds both may run the one and then the other."""
        if one.outer is not other.outer:
            return False
        edges, _ = self._graph(one.outer)
        return other.head in _reached(one.head, edges) or one.head in _reached(other.head, edges)

    def _node(self, address: int, within: Loop | None) -> int:
        """The first block of the inner loop that a block belongs to, else itself."""
        return next((x.head for x in self.loops if x.outer is within and address in x.blocks), address)

    def _graph(self, within: Loop | None) -> tuple[dict[int, set[int]], dict[int, Path]]:
        """What follows each node of a loop or of the whole kernel, and what a node costs."""
        blocks = set(self.blocks) if within is None else within.blocks
        node = {address: self._node(address, within) for address in blocks}
        edges: dict[int, set[int]] = {n: set() for n in node.values()}
        for address in blocks:
            for after in self.blocks[address].after:
                is_back = within is not None and after == within.head
                if after in blocks and not is_back and node[after] != node[address]:
                    edges[node[address]].add(node[after])
        return edges, {n: self._cost(n, within) for n in set(node.values())}

    def _cost(self, node: int, within: Loop | None) -> Path:
        loop = next((x for x in self.loops if x.outer is within and x.head == node), None)
        if loop is None:
            return Path(self.blocks[node].issued, self.blocks[node].issued)
        is_product = any(x is loop or _holds(loop, x) for x in self.product_loops)
        return Path() if is_product or self._only_waits(loop) else self.path(loop)

    def _only_waits(self, loop: Loop) -> bool:
        body = self.instructions(loop.blocks)
        return len(body) <= WAIT_LOOP and any(x.root == "SYNCS" for x in body)


def _reached(start: int, edges: dict[int, set[int]]) -> set[int]:
    reached, waiting = set(), [start]
    while waiting:
        for after in edges[waiting.pop()] - reached:
            reached.add(after)
            waiting.append(after)
    return reached


def _holds(outer: Loop, loop: Loop | None) -> bool:
    while loop is not None:
        loop = loop.outer
        if loop is outer:
            return True
    return False


def _blocks(code: list[Instruction]) -> list[Block]:
    joins: dict[str, int] = {}
    targets: dict[int, int] = {}
    for x in code:
        name = x.bare.removeprefix(x.opcode).split(",")[0].strip()
        if x.root == "BSSY" and x.target is not None:
            joins[name] = x.target
        elif x.root == "BSYNC" and name in joins:
            targets[x.address] = joins[name]
        elif x.target is not None and (x.root == "BRA" or (x.root == "CALL" and x.bare != x.text)):
            # a guarded call leaves a loop; one without a guard comes back
            targets[x.address] = x.target
    starts = {code[0].address, *targets.values()}
    found: list[Block] = []
    for x in code:
        if x.address in starts or not found or found[-1].code[-1].kind == "branch":
            found.append(Block([]))
        found[-1].code.append(x)
    for block, following in zip(found, [*found[1:], None], strict=True):
        last = block.code[-1]
        jump = targets.get(last.address)
        leaves = last.always_leaves or (last.root == "BSYNC" and jump is not None and last.bare == last.text)
        after = [] if leaves or following is None else [following.address]
        block.after = tuple([*after, *([] if jump is None else [jump])])
    _fill_jump_tables(found)
    return found


def _fill_jump_tables(blocks: list[Block]) -> None:
    """A jump by a table, which is not in the dump, goes to the blocks behind it that nothing else leads to."""
    calls = {x.target for block in blocks for x in block.code if x.root == "CALL"}
    led_to = {after for block in blocks for after in block.after} | calls
    orphans = [x.address for x in blocks if x.address not in led_to and x.issued]
    for block in blocks:
        if block.code[-1].root == "BRX":
            block.after = tuple(x for x in orphans if x > block.address)


def _loops(blocks: dict[int, Block], entry: int) -> list[Loop]:
    """Natural loops, each with the smallest one around it; code that the entry does not reach has none."""
    before: dict[int, set[int]] = defaultdict(set)
    reached, waiting = {entry}, [entry]
    while waiting:
        at = waiting.pop()
        for after in blocks[at].after:
            before[after].add(at)
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    over = _dominators(reached, before, entry)
    found: dict[int, Loop] = {}
    for latch in sorted(reached):
        for head in blocks[latch].after:
            if head in over[latch]:
                loop = found.setdefault(head, Loop(head, set(), {head}))
                loop.latches.add(latch)
                waiting = [latch]
                while waiting:
                    at = waiting.pop()
                    if at not in loop.blocks:
                        loop.blocks.add(at)
                        waiting += before[at]
    by_size = sorted(found.values(), key=lambda loop: len(loop.blocks))
    for i, loop in enumerate(by_size):
        loop.outer = next((o for o in by_size[i + 1 :] if loop.head in o.blocks), None)
    return sorted(by_size, key=lambda loop: loop.head)


def _dominators(reached: set[int], before: dict[int, set[int]], entry: int) -> dict[int, set[int]]:
    over = {at: set(reached) for at in reached} | {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for at in sorted(reached - {entry}):
            new = {at} | set.intersection(*(over[b] for b in before[at]))
            changed |= new != over[at]
            over[at] = new
    return over


def _extremes(start: int, ends: set[int], edges: dict[int, set[int]], costs: dict[int, Path]) -> Path:
    """The ways of fewest and most instructions from the start to one of the ends of a graph without cycles."""
    order: list[int] = []
    stack, seen = [(start, iter(sorted(edges[start])))], {start}
    while stack:
        at, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(at)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(sorted(edges[following]))))
    found = []
    for pick, code in ((min, "least"), (max, "most")):
        # by node the instructions from it to an end, and the node that follows
        best: dict[int, tuple[int, int | None]] = {}
        for at in order:
            ways = [(best[n][0], n) for n in edges[at] if n in best]
            length, following = (0, None) if at in ends else pick(ways) if ways else (0, at)
            if following != at:
                best[at] = len(getattr(costs[at], code)) + length, following
        way, at = [], start if start in best else None
        while at is not None:
            way += getattr(costs[at], code)
            at = best[at][1]
        found.append(tuple(way))
    return Path(*found)
