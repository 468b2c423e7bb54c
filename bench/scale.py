"""The global contrastive loss on 8, 64 and 512 simulated ranks: exactness, bytes sent, memory; beside what
`mmcore.plan` says of it. `python -m bench.scale FILE` measures and writes JSON, and a plot beside it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from bench.measure import in_process, peak_resident_bytes
from bench.ops.contrastive import make_features
from bench.ranks import Alone, Ranks
from mmcore.losses import global_contrastive_loss
from mmcore.ops import contrastive_loss
from mmcore.plan.exchange import loss
from mmcore.plan.job import Exchange

NUM_RANKS = (8, 64, 512)
HOW = ("gather", "ring")
# Of the simulation, in which every rank computes: small, so that 262,144 blocks take minutes. Of the rank whose memory
# is measured: large enough to see.
ROWS, WIDTH = 4, 32
ROWS_OF_ONE, WIDTH_OF_ONE = 1024, 256


def simulate(num_ranks: int, how: str, rows: int = ROWS, width: int = WIDTH) -> dict[str, Any]:
    """Loss and gradients of all ranks against one process, in float64, and what a rank sends.

    The errors are the largest, of the loss as it is, of a gradient by the gradient's largest element.
    """
    torch.set_num_threads(1)
    size = num_ranks * rows
    a, b, scale = make_features(size, size, width, 0, "trained", 0)
    transport, began = Ranks(num_ranks), time.perf_counter()

    def on_rank(rank: int) -> list[Tensor]:
        own = slice(rank * rows, (rank + 1) * rows)
        return _gradients(global_contrastive_loss, _leaves(a[own], b[own], scale), _limit(how))

    found = transport.run(on_rank)
    seconds = time.perf_counter() - began
    expected = _gradients(contrastive_loss, _leaves(a, b, scale))
    # data parallelism takes the mean over ranks
    together = [torch.cat([of_rank[i] for of_rank in found]) / num_ranks for i in (1, 2)]
    of_scale = torch.stack([of_rank[3] for of_rank in found]).mean()
    errors = {"loss": max(float((of_rank[0] - expected[0]).abs()) for of_rank in found)}
    for name, x, y in zip(("da", "db", "dscale"), (*together, of_scale), expected[1:], strict=True):
        errors[name] = float((x - y).abs().max() / y.abs().max())
    planned = loss(Exchange(width), rows, num_ranks, is_cpu=True, is_ring=how == "ring", size=8)
    most = max(transport.sent, key=lambda sent: sum(sent.values()))
    return {
        "ranks": num_ranks,
        "how": how,
        "rows": rows,
        "width": width,
        "errors": errors,
        "sent": dict(most),
        "sent_bytes": sum(most.values()),
        "planned_sent_bytes": sum(planned.sent.values()),
        "seconds": round(seconds, 1),
    }


def measure_one(num_ranks: int, how: str, rows: int = ROWS_OF_ONE, width: int = WIDTH_OF_ONE) -> dict[str, Any]:
    """The memory of one rank's loss and gradients, float32; in a process of its own, see `measured_one`."""
    a, b, scale = make_features(rows, rows, width, 0, "trained", 0)
    leaves, few = (_leaves(x.float(), y.float(), scale) for x, y in ((a, b), (a[:8], b[:8])))

    def once(num_ranks: int = num_ranks, leaves: tuple[Tensor, ...] = leaves) -> None:
        Alone(num_ranks).run(lambda _: _gradients(global_contrastive_loss, leaves, _limit(how)))

    once(2, few)  # loads what it needs
    planned = loss(Exchange(width), rows, num_ranks, is_cpu=True, is_ring=how == "ring")
    return {
        "ranks": num_ranks,
        "how": how,
        "rows": rows,
        "width": width,
        "measured_bytes": peak_resident_bytes(once),
        "planned_bytes": planned.gathered + planned.workspace,
    }


def measured_one(num_ranks: int, how: str) -> dict[str, Any]:
    """`measure_one` in a process of its own."""
    return in_process("bench.scale", "one", str(num_ranks), how)


def plot(document: dict[str, Any], path: Path) -> None:
    """Bytes sent and memory of a rank by the number of ranks: points measured, lines planned."""
    figure, ranks = Figure(figsize=(10, 4.2), layout="constrained"), [2**i for i in range(3, 10)]
    sent, memory = figure.subplots(1, 2)
    colours = {"gather": "#c4572b", "ring": "#2b6cb0"}
    panels = (
        (sent, "simulated", "sent_bytes", lambda x: sum(x.sent.values()), 8),
        (memory, "one", "measured_bytes", lambda x: x.gathered + x.workspace, 4),
    )
    for axes, key, measured, planned, size in panels:
        points = document[key]
        rows, width = points[0]["rows"], points[0]["width"]
        for how in HOW:
            line = [
                planned(loss(Exchange(width), rows, n, is_cpu=True, is_ring=how == "ring", size=size)) for n in ranks
            ]
            axes.plot(ranks, line, color=colours[how], lw=1.6, label=f"{how}, planned")
            of_how = [p for p in points if p["how"] == how]
            axes.plot(
                [p["ranks"] for p in of_how],
                [p[measured] for p in of_how],
                "o",
                ms=7,
                color=colours[how],
                markeredgecolor="white",
                label=f"{how}, measured",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.yaxis.set_major_formatter(FuncFormatter(_bytes))
        axes.set_xlabel(f"ranks, {rows} rows of {width} features each")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    sent.set_title("sent by a rank in a step (all ranks in one process)", fontsize=10)
    memory.set_title("memory of a rank beyond its features", fontsize=10)
    figure.savefig(path, dpi=140)


def _bytes(size: float, _: object) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size:g} B"


def _limit(how: str) -> int:
    return 0 if how == "ring" else 2**62


def _leaves(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, ...]:
    scales = torch.tensor(scale, dtype=a.dtype)
    return tuple(x.clone().requires_grad_() for x in (a, b, scales))


def _gradients(op: Any, leaves: tuple[Tensor, ...], limit: int | None = None) -> list[Tensor]:
    """The loss, and its gradients in a, b and the scale."""
    value = op(*leaves, **({} if limit is None else {"gather_limit_bytes": limit}))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def main(arguments: list[str]) -> None:
    if arguments[0] == "one":
        print(json.dumps(measure_one(int(arguments[1]), arguments[2])))
        return
    path = Path(arguments[0])
    cases = [(n, how) for n in NUM_RANKS for how in HOW]
    document = {"torch": torch.__version__, "one": [measured_one(*case) for case in cases], "simulated": []}
    for case in cases:
        document["simulated"].append(simulate(*case))
        print(json.dumps(document["simulated"][-1]), flush=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    plot(document, path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
