"""`python -m bench.gpu.times FOLDER`: the ops at the sizes that they are made for, the device's time and the host's
apart, and beside each row of the launch tables a few others: a line each in times.jsonl, the faster in launch.patch.

`--once` calls the largest ops once, for a profiler.
"""

import argparse
import difflib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cross_attentions import WORKLOADS, operands
from bench.gpu.items import FAILURES, Item, go_on_from, run_items
from bench.gpu.lines import append, read
from bench.measure import relative_error
from bench.ops import adamw, contrastive, distill, ema, linear_cross_entropy, sigmoid, token_contrastive
from bench.static.cases import CASES
from mmkernels import attention, contrastive_loss, distillation_loss, sigmoid_loss
from mmkernels import linear_cross_entropy as lce
from mmkernels._launch import Launch, Table, architecture

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")
# seconds of calls that are timed together, and how often; the least counts
BATCH_S, ROUNDS, MOST_CALLS = 0.02, 3, 200
# of the time of the table's row, above which another is not proposed
FASTER = 0.98
Call = Callable[[], Any]
# of a row: kernel, bytes an element, architecture
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Flagship:
    """An op at a size that it is made for.

    Attributes:
        name: of the op, with its shape.
        make: on a device, the call that is timed; its tensors are what it gives.
        op: the folder of its kernels, whose table it reads.
        rows: of the table, in bfloat16, that its kernels are launched with.
    """

    name: str
    make: Callable[[torch.device], Call]
    op: str = ""
    rows: tuple[str, ...] = ()


def _gradients(loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], *rest: Any) -> Call:
    wrt = [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(loss(*leaves, *rest).sum(), wrt)


def _contrastive(size: int, width: int, device: torch.device) -> Call:
    return _gradients(contrastive_loss, contrastive.features(size, width, torch.bfloat16, device))


def _sigmoid(size: int, width: int, device: torch.device) -> Call:
    return _gradients(sigmoid_loss, sigmoid.trained(size, width, torch.bfloat16, device))


def _linear_cross_entropy(rows: int, width: int, vocab: int, device: torch.device) -> Call:
    return _gradients(lce, linear_cross_entropy.head(rows, width, vocab, 0, torch.bfloat16, device))


def _attention(name: str, device: torch.device) -> Call:
    workload = WORKLOADS[name]
    shape = workload.on(device.type)
    mask = None if workload.mask is None else workload.mask(shape, device)
    run = partial(attention, mask=mask, backend="mmkernels")
    return _gradients(run, operands(shape, torch.bfloat16, device))


def _tokens(size: int, device: torch.device) -> Call:
    made = token_contrastive.features((size, 32, size, 256), torch.bfloat16, device)
    return _gradients(token_contrastive.ours, made)


def _distill(rows: int, classes: int, device: torch.device) -> Call:
    student, teacher, center = distill.logits(rows, classes, torch.bfloat16, device)
    return _gradients(distillation_loss, (student,), teacher, *distill.TEMPS, center)


def _ema(device: torch.device) -> Call:
    return partial(ema.ours, *ema.lists("few", "bf16", device))


def _adamw(device: torch.device) -> Call:
    return adamw.ours(adamw.Lists("few", "bf16", device))


BOTH = ("fwd", "bwd")
# the largest, and those with goals, first
FLAGSHIPS = (
    Flagship("contrastive_loss 32768x768", partial(_contrastive, 32768, 768), "contrastive", BOTH),
    Flagship("sigmoid_loss 65536x768", partial(_sigmoid, 65536, 768), "sigmoid", ("fwd",)),
    Flagship("linear_cross_entropy 4096x4096x128256", partial(_linear_cross_entropy, 4096, 4096, 128256)),
    *(
        Flagship(f"attention {name}", partial(_attention, name), "attention", tuple(f"{x}_{width}" for x in passes))
        for passes in [("fwd", "bwd_q", "bwd_k")]
        for name, width in (("Q-Former", 64), ("LLaVA packed", 128), ("Llama-3.2-Vision tower", 128))
    ),
    Flagship("ema_update_ 67M", _ema),
    Flagship("adamw_update_ 67M", _adamw),
    Flagship("token_contrastive_loss 1024", partial(_tokens, 1024), "token_contrastive", BOTH),
    Flagship("distillation_loss 640x65536", partial(_distill, 640, 65536)),
    Flagship("contrastive_loss 8192x768", partial(_contrastive, 8192, 768)),
)


def table_of(op: str) -> Table | None:
    """The launch table of an op's kernels."""
    return next((x.table for x in CASES if x.kernel.fn.__module__.split(".")[1] == op), None)


def candidates(config: Launch) -> tuple[Launch, ...]:
    """Neighbours of a row, nearest first: other stages, other warps, half or twice a side."""
    m, n = config.block_m, config.block_n
    found = (
        replace(config, num_stages=config.num_stages + 1),
        replace(config, num_stages=max(config.num_stages - 1, 1)),
        replace(config, num_warps=4 if config.num_warps == 8 else 8),
        replace(config, block_m=max(m // 2, 16), num_warps=4),
        replace(config, block_n=max(n // 2, 16), num_warps=4),
        replace(config, block_n=2 * n) if n <= m else replace(config, block_m=2 * m),
    )
    return tuple(dict.fromkeys(x for x in found if x != config))


def measured(call: Call, device: torch.device) -> dict[str, Any]:
    """Seconds of a call on the device, by a graph's replays or, of what no graph holds, by events around calls in a
    row, and of the host until it has asked for one."""
    call()
    _wait(device)
    began = time.perf_counter()
    call()
    host_s = time.perf_counter() - began
    _wait(device)
    whole_s = time.perf_counter() - began
    if device.type != "cuda":
        return {"device_s": whole_s, "host_s": whole_s, "by": "clock"}
    graph = _captured(call)
    calls = max(1, min(int(BATCH_S / whole_s), MOST_CALLS))
    times = [_batch_s(call if graph is None else graph.replay, calls) for _ in range(ROUNDS)]
    return {"device_s": min(times), "host_s": host_s, "by": "events" if graph is None else "graph"}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _batch_s(call: Call, calls: int) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def _captured(call: Call) -> torch.cuda.CUDAGraph | None:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
    # what waits for the device cannot be captured, and what reads the host's numbers refuses to be
    except (RuntimeError, ValueError):
        torch.cuda.synchronize()
        return None
    return graph


def _with_row(flagship: Flagship, key: Key, config: Launch, call: Call) -> Any:
    """The result of a call with another row in the table, or its times; the table is as it was afterwards."""
    table = table_of(flagship.op)
    assert isinstance(table, dict)
    before = table[key]
    table[key] = config
    try:
        return call()
    finally:
        table[key] = before


def rows_of(flagship: Flagship, arch: int) -> Iterator[tuple[Key, Launch]]:
    """Rows that are tried, and the candidates beside each; what a table does not have is left out."""
    table = table_of(flagship.op) or {}
    for row in flagship.rows:
        if (key := (row, 2, arch)) in table:
            yield from ((key, config) for config in candidates(table[key]))


def row_items(device: torch.device = CUDA) -> list[Item]:
    """Every flagship once with each candidate, so that it is compiled."""
    found = []
    for flagship in FLAGSHIPS:
        tried = [None, *rows_of(flagship, architecture(device))]
        found += [Item(f"{flagship.name} {x}", partial(_once, flagship, x, device)) for x in tried]
    return found


def _once(flagship: Flagship, tried: tuple[Key, Launch] | None, device: torch.device) -> dict[str, Any]:
    call = flagship.make(device)
    if tried is None:
        call()
    else:
        _with_row(flagship, tried[0], tried[1], call)
    _wait(device)
    return {}


def items(folder: Path, device: torch.device, arch: int, flagships: tuple[Flagship, ...] = FLAGSHIPS) -> list[Item]:
    """Each flagship by the table, and all of them before their candidates."""
    lines = folder / "times.jsonl"
    whole = [Item(x.name, partial(_time, x, device)) for x in flagships]
    return whole + [Item(f"{x.name} rows", partial(_time_rows, x, device, arch, lines, folder)) for x in flagships]


def _time(flagship: Flagship, device: torch.device) -> dict[str, Any]:
    return measured(flagship.make(device), device)


def _time_rows(flagship: Flagship, device: torch.device, arch: int, lines: Path, folder: Path) -> dict[str, Any]:
    """A line a candidate; what gives other numbers than the table's row is no candidate."""
    call = flagship.make(device)
    gold, base_s = _tensors(call()), measured(call, device)["device_s"]
    tried = 0
    for key, config in rows_of(flagship, arch):
        line: dict[str, Any] = {
            "flagship": flagship.name,
            "row": list(key),
            "config": _words(config),
            "table_s": base_s,
        }
        try:
            found = _with_row(flagship, key, config, lambda: (_tensors(call()), measured(call, device)))
            line |= {"error": _disagreement(found[0], gold), **found[1]}
        except FAILURES as error:
            line |= {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        append(lines, **line)
        tried += 1
        (folder / "launch.patch").write_text(patch(read(lines)))
    return {"tried": tried}


def _words(config: Launch) -> list[int]:
    return [config.block_m, config.block_n, config.block_d, config.num_warps, config.num_stages]


def _tensors(result: Any) -> list[Tensor]:
    return [x.clone() for x in result or () if isinstance(x, Tensor)]


def _disagreement(found: list[Tensor], gold: list[Tensor]) -> str | None:
    worst = max((relative_error(x, y) / torch.finfo(x.dtype).eps ** 0.5 for x, y in zip(found, gold)), default=0.0)
    return None if worst <= 1 else "gives other numbers than the table's row"


def patch(found: list[dict[str, Any]], root: Path = ROOT) -> str:
    """A unified diff of the launch tables, of the fastest candidate of each row where it is faster than the row."""
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in found:
        if "config" in line and line["error"] is None and line["device_s"] <= FASTER * line["table_s"]:
            op = next(x.op for x in FLAGSHIPS if x.name == line["flagship"])
            key = (op, *map(str, line["row"]))
            # a row that two flagships read is the first one's, which is the larger
            is_same = key in best and best[key]["flagship"] == line["flagship"]
            if key not in best or (is_same and line["device_s"] < best[key]["device_s"]):
                best[key] = line
    changed: dict[Path, str] = {}
    for (op, name, size, arch), line in best.items():
        row = re.compile(rf'(\("{name}", {size}, {arch}\): )Launch\([^)]*\)')
        for path in sorted((root / "kernels/mmkernels" / op).glob("*.py")):
            text = changed.get(path, path.read_text())
            if row.search(text):
                numbers = ", ".join(map(str, line["config"]))
                changed[path] = row.sub(lambda x, n=numbers: f"{x[1]}Launch({n})", text)
    return "".join(_diff(path, text, root) for path, text in changed.items())


def _diff(path: Path, text: str, root: Path) -> str:
    name, lines = path.relative_to(root), path.read_text().splitlines(keepends=True)
    return "".join(difflib.unified_diff(lines, text.splitlines(keepends=True), f"a/{name}", f"b/{name}"))


def shown(line: dict[str, Any]) -> str:
    if line["error"] or "device_s" not in line:
        return f"{line['item']:45s} {line['error'] or str(line['tried']) + ' other rows'}"
    return f"{line['item']:45s} {1e3 * line['device_s']:9.3f} ms by {line['by']}, host {1e3 * line['host_s']:7.3f} ms"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.times", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--once", action="store_true", help="the largest ops, each once")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first item")
    options = parser.parse_args(arguments)
    if options.once:
        for flagship in FLAGSHIPS[:4]:
            _once(flagship, None, CUDA)
        return 0
    todo = items(options.folder, CUDA, architecture(CUDA))[options.first :]
    broken_at = run_items(todo, options.folder / "times.jsonl", shown)
    print((options.folder / "launch.patch").read_text() if (options.folder / "launch.patch").is_file() else "")
    if broken_at is not None:
        go_on_from("bench.gpu.times", options.first + broken_at, [str(options.folder)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
